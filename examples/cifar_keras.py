"""Train a small convolutional network on CIFAR-10, in plain Keras 3 (on TensorFlow, if nothing else is set).

    python examples/cifar_keras.py                      # 3 epochs
    python examples/cifar_keras.py --data DIR --epochs 10

The network, the optimizer and the batch size are those of Flower's TensorFlow quickstart.
"""

import argparse
import functools
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # otherwise TensorFlow prints messages at every start
import keras
from keras import layers

Data = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, 32, 32, 3), labels (n,)

CLASSES = 10
DATA_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "cifar10"
DOWNLOADED = "keras.datasets.cifar10"  # CIFAR-10 as Keras downloads it
EMBEDDED = "embedded"  # the name of the generated data set


def Net() -> keras.Model:
    """Return the network: (n, 32, 32, 3) bytes to (n, 10) probabilities; 42,442 parameters."""
    net = keras.Sequential([
        keras.Input((32, 32, 3)), layers.Rescaling(1 / 255),
        layers.Conv2D(32, 3, activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(),
        layers.Flatten(), layers.Dropout(0.5, name="dropout"), layers.Dense(CLASSES, activation="softmax"),
    ])  # fmt: skip
    net.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    net.optimizer.build(net.trainable_variables)  # otherwise a saved model is loaded with a warning
    return net


@functools.cache
def worker() -> keras.Model:
    """Return the net that trains and tests in place of all others: TensorFlow takes seconds to trace a new one."""
    return Net()


def train(
    net: keras.Model, data: Data, *, epochs: int = 3, lr: float = 0.001, batch_size: int = 32, seed: int = 0,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:  # fmt: skip
    """Train `net` in place with Adam and return the mean loss per sample of the last epoch.

    Each epoch visits every sample once. Its order and its dropout are drawn from `seed + epoch` (counted from 0).
    `after_epoch(epoch, loss)` is called after each, from 1.
    """
    images, labels = data
    worker().set_weights(net.get_weights())
    for variable in worker().optimizer.variables:  # Adam starts anew, but is not traced again
        variable.assign(keras.ops.zeros_like(variable))
    worker().optimizer.learning_rate = lr
    for epoch in range(epochs):
        order = np.random.default_rng(seed + epoch).permutation(len(labels))
        worker().get_layer("dropout").seed_generator.state.assign(keras.random.SeedGenerator(seed + epoch).state)
        with tqdm(total=-(-len(labels) // batch_size), desc=f"epoch {epoch + 1}", leave=False, disable=None) as bar:
            advance = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs, bar=bar: bar.update())
            options = {"batch_size": batch_size, "shuffle": False, "verbose": 0, "callbacks": [advance]}
            mean_loss = float(worker().fit(images[order], labels[order], **options).history["loss"][0])
        net.set_weights(worker().get_weights())
        after_epoch(epoch + 1, mean_loss)
    return mean_loss


def test(net: keras.Model, data: Data, *, batch_size: int = 500) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    worker().set_weights(net.get_weights())
    loss, accuracy = worker().evaluate(*data, batch_size=batch_size, verbose=0)
    return float(loss), float(accuracy)


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)`."""
    source = find_data(root)
    if source == EMBEDDED:
        return embedded_data(10_000, seed=1), embedded_data(2_000, seed=2)
    if source == DOWNLOADED:
        (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
        return (x_train, y_train[:, 0].astype(np.int64)), (x_test, y_test[:, 0].astype(np.int64))
    return load_folder(Path(source))


def find_data(root: str | None = None) -> str:
    """Return the folder that has the images, or the name of another data set. Raises ValueError if `root` has none."""
    if root in (EMBEDDED, DOWNLOADED):
        return root
    folder = Path(root or DATA_DIR).expanduser().absolute()
    if (folder / "train").is_dir():
        return str(folder)
    if root:
        raise ValueError(f"data folder {folder} does not exist or has no train/<class>/ and test/<class>/ with images")
    try:
        keras.datasets.cifar10.load_data()
        return DOWNLOADED
    except Exception as error:  # without a network, many kinds are possible
        print(f"WARNING: {DATA_DIR} has no images, and Keras cannot load CIFAR-10: {' '.join(str(error).split())}\n"
              "WARNING: Using a small EMBEDDED data set, not CIFAR-10. To train on your own images, use --data DIR.",
              file=sys.stderr)  # fmt: skip
    return EMBEDDED


def load_folder(root: Path) -> tuple[Data, Data]:
    """Return the images in `root/train/<class>/` and `root/test/<class>/`, resized to 32×32, and their labels."""
    train, test = (sorted((root / split).glob("[!._]*/[!.]*")) for split in ("train", "test"))
    classes, others = (sorted({path.parent.name for path in files}) for files in (train, test))
    if len(classes) != CLASSES or classes != others:
        raise ValueError(f"{root}/train has images of the classes {classes}, {root}/test of {others}; "
                         f"{CLASSES} are needed, the same in train/ and test/")  # fmt: skip
    images, labels = decode([*train, *test]), np.array([classes.index(path.parent.name) for path in [*train, *test]])
    return (images[: len(train)], labels[: len(train)]), (images[len(train) :], labels[len(train) :])


def decode(files: list[Path]) -> NDArray[np.uint8]:
    """Return the images in `files`: they are decoded once, and kept in a file that is read as they are used."""
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    cache = DATA_DIR.with_name("cifar10-keras") / f"{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npy"
    if not cache.is_file():
        images = np.empty((len(files), 32, 32, 3), np.uint8)
        for row, path in enumerate(tqdm(files, "reading images", leave=False, disable=None)):
            try:
                images[row] = keras.utils.load_img(path, target_size=(32, 32), interpolation="bicubic")
            except Exception as error:  # each format raises its own
                raise ValueError(f"image {path} is damaged: {error}") from None
        save(lambda path: np.save(path, images), cache)
    return np.load(cache, mmap_mode="r")


def embedded_data(samples: int, seed: int) -> Data:
    """Generate noisy images of ten coarse patterns, each shifted by up to four pixels."""
    patterns = np.random.default_rng(0).integers(0, 60, (CLASSES, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    moved = np.stack([np.roll(patterns, (i // 9 - 4, i % 9 - 4), (1, 2)) for i in range(81)], axis=1)
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    images = moved[labels, random.integers(81, size=samples)] + random.integers(0, 196, (samples, 32, 32, 3), np.uint8)
    return images, labels


def save(write: Callable[[Path], object], path: Path) -> None:
    """Let `write` write a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder, path.name))
        Path(folder, path.name).replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", metavar="DIR", help="images in DIR/train/<class>/ and DIR/test/<class>/")
    parser.add_argument("--epochs", type=int, default=3, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--lr", type=float, default=0.001, metavar="F", help="learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar_keras"), metavar="DIR", help="for model.keras")
    args = parser.parse_args()
    for option, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0}.items():
        if not least <= (value := getattr(args, option)) < 2**31:
            parser.error(f"argument --{option.replace('_', '-')}: {value} is not in the range {least} to {2**31 - 1}")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"cifar_keras.py: {error}")
    except KeyboardInterrupt:
        sys.exit("cifar_keras.py: stopped")


def run(args: argparse.Namespace) -> None:
    """Train for `args.epochs`, and print a line and save the model after each."""
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written should show before the training
    source = find_data(args.data)
    train_data, test_data = load_data(source)
    print(f"{len(train_data[1]):,} training and {len(test_data[1]):,} test images: {source}")
    print("epoch  train loss  test loss  accuracy  seconds")
    keras.utils.set_random_seed(args.seed)
    net = Net()
    started = time.perf_counter()

    def after_epoch(epoch: int, train_loss: float) -> None:
        seconds = time.perf_counter() - started
        test_loss, accuracy = test(net, test_data)
        print(f"{epoch:5}  {train_loss:10.4f}  {test_loss:9.4f}  {accuracy:8.4f}  {seconds:7.1f}", flush=True)
        save(net.save, args.out / "model.keras")

    options = {name: getattr(args, name) for name in ("epochs", "lr", "batch_size", "seed")}
    train(net, train_data, **options, after_epoch=after_epoch)
    print(f"saved {args.out / 'model.keras'}")


if __name__ == "__main__":
    main()
