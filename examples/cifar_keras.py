"""Train a small convolutional network on CIFAR-10. Plain Keras 3 (on TensorFlow, if nothing else is set), one file.

    python examples/cifar_keras.py                      # 3 epochs
    python examples/cifar_keras.py --data DIR --epochs 10

The network, the optimizer and the batch size are those of Flower's TensorFlow quickstart.
"""

import argparse
import functools
import hashlib
import os
import pickle
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # or TensorFlow talks of itself at every start
try:
    import keras
    from keras import layers
except ModuleNotFoundError as error:
    sys.exit(f"cifar_keras.py: {error}; install what it needs by: pip install '.[keras]'")

Data = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, 32, 32, 3), labels (n,)

CLASSES = 10
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
DATA_DIR = CACHE / "cifar10"  # where CIFAR-10 is looked for
EMBEDDED = "embedded"  # the name of the generated stand-in, for machines that have neither data nor a network
ORIGINAL = "cifar-10-batches-py"  # the folder that CIFAR-10 comes in
URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
MD5 = {
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".tif", ".tiff", ".webp"}


def Net() -> keras.Model:
    """Return the network: (n, 32, 32, 3) bytes to (n, 10) probabilities; 42,442 parameters."""
    net = keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    net.compile(keras.optimizers.Adam(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    net.optimizer.build(net.trainable_variables)  # or the saved model would be loaded with a warning
    return net


@functools.cache
def bench() -> keras.Model:
    """Return the net that does the work for all others, in their place.

    TensorFlow traces the steps of every net anew, which takes seconds, and memory that it never gives back.
    """
    return Net()


def train(
    net: keras.Model,
    data: Data,
    *,
    epochs: int = 3,
    lr: float = 0.001,
    batch_size: int = 32,
    seed: int = 0,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:
    """Train `net` in place with Adam and return the mean loss per sample of the last epoch.

    Each epoch visits every sample once, in an order drawn from `seed + epoch` (counted from 0), which the dropout
    is drawn from, too. `after_epoch(epoch, loss)` is called after each, from 1.
    """
    images, labels = data
    worker = bench()
    worker.set_weights(net.get_weights())
    restart(worker.optimizer, lr)
    for epoch in range(epochs):
        order = np.random.default_rng(seed + epoch).permutation(len(labels))
        seed_dropout(worker, seed + epoch)
        with tqdm(total=-(-len(labels) // batch_size), desc=f"epoch {epoch + 1}", leave=False, disable=None) as bar:
            history = worker.fit(
                images[order], labels[order], batch_size=batch_size, shuffle=False, verbose=0, callbacks=[advance(bar)]
            )
        net.set_weights(worker.get_weights())
        mean_loss = float(history.history["loss"][0])
        after_epoch(epoch + 1, mean_loss)
    return mean_loss


def restart(optimizer: keras.Optimizer, lr: float) -> None:
    """Make `optimizer` as good as new."""
    for variable in optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))
    optimizer.learning_rate = lr


def advance(bar: tqdm) -> keras.callbacks.Callback:
    return keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: bar.update())


def seed_dropout(net: keras.Model, seed: int) -> None:
    """Make what the dropout layers drop depend on `seed` alone, and not on when they were made."""
    for layer in net.layers:
        if isinstance(layer, layers.Dropout):
            layer.seed_generator.state.assign(keras.random.SeedGenerator(seed).state)


def test(net: keras.Model, data: Data, *, batch_size: int = 500) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    worker = bench()
    worker.set_weights(net.get_weights())
    loss, accuracy = worker.evaluate(*data, batch_size=batch_size, verbose=0)
    return float(loss), float(accuracy)


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)` from the place that `find_data(root)` names."""
    source = find_data(root)
    if source == EMBEDDED:
        return embedded_data(10_000, seed=1), embedded_data(2_000, seed=2)
    load = load_folder if (Path(source) / "train").is_dir() else load_original
    return load(Path(source), "train"), load(Path(source), "test")


def find_data(root: str | None = None) -> str:
    """Say where the data are: in `root`, in the usual place (CIFAR-10 is downloaded if need be), or embedded here.

    Data that were named are never replaced: raises ValueError if `root` is not there or holds no data.
    """
    folder = Path(root or DATA_DIR).expanduser().absolute()
    if root == EMBEDDED:
        return EMBEDDED
    if (folder / "train").is_dir() or (folder / ORIGINAL).is_dir():
        return str(folder)
    if root and not folder.is_dir():
        raise ValueError(f"data folder {folder} does not exist")
    if root and any(folder.iterdir()):  # CIFAR-10 must not take the place of what is in it
        raise ValueError(f"data folder {folder} has no train/<class>/ and test/<class>/ with images, nor CIFAR-10")
    try:
        archive = keras.utils.get_file("cifar-10.tar.gz", URL, file_hash=SHA256, cache_dir=CACHE, cache_subdir="")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        return str(folder)
    except Exception as error:  # no network shows itself in many ways, and each has the same remedy
        if root:
            why = " ".join(str(error).split())
            raise ValueError(f"{folder} has no train/ and test/, and CIFAR-10 cannot be downloaded: {why}") from None
    print(
        f"WARNING: {DATA_DIR} has no CIFAR-10, and it cannot be downloaded. Using a small EMBEDDED data set instead:\n"
        "WARNING: its accuracies say nothing about CIFAR-10. Name your own images with --data DIR.",
        file=sys.stderr,
    )
    return EMBEDDED


def load_original(root: Path, split: str) -> Data:
    """Return one split of CIFAR-10 as it is distributed: pickled, which is why nothing but the known files is read."""
    batches = []
    for name, digest in MD5[split].items():
        path = root / ORIGINAL / name
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.md5(content).hexdigest() != digest:
            raise ValueError(f"{path} is missing or damaged; remove {path.parent}, so that it is downloaded anew")
        batches.append(pickle.loads(content, encoding="bytes"))
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return images, np.concatenate([batch[b"labels"] for batch in batches]).astype(np.int64)


def load_folder(root: Path, split: str) -> Data:
    """Return one split of the images in `root/<split>/<class>/`, scaled to 32×32 if need be."""
    classes = class_names(root / split)
    if len(classes) != CLASSES or classes != class_names(root / "train"):
        raise ValueError(f"{root / split} has {len(classes)} classes ({', '.join(classes)}); "
                         f"{CLASSES} are needed, the same in train/ and test/")  # fmt: skip
    paths = sorted(path for name in classes for path in (root / split / name).iterdir() if path.name[0] != ".")
    files = [path for path in paths if path.suffix.lower() in IMAGES]
    if len(files) < len(paths):
        formats = sorted({path.suffix or path.name for path in paths if path.suffix.lower() not in IMAGES})
        print(f"WARNING: {len(paths) - len(files)} files in {root / split} are skipped: no image format that "
              f"Keras reads ({', '.join(formats)})", file=sys.stderr)  # fmt: skip
    if empty := sorted({*classes} - {path.parent.name for path in files}):
        raise ValueError(f"{root / split} has no images of the classes {', '.join(empty)}")
    labels = np.array([classes.index(path.parent.name) for path in files], np.int64)
    return decoded(files, split), labels


def class_names(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, but for .ipynb_checkpoints, __MACOSX and others of their kind."""
    return sorted(path.name for path in folder.glob("*/") if not path.name.startswith((".", "__")))


def decoded(files: list[Path], split: str) -> NDArray[np.uint8]:
    """Return the images in `files`: a view of a file, made on first use, of which only rows that are used are read."""
    facts = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]  # an edited file shows
    cache = CACHE / "cifar10-keras" / f"{split}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.npy"
    with suppress(OSError, ValueError, EOFError):
        return np.load(cache, mmap_mode="r")
    images = np.stack([decode(path) for path in tqdm(files, f"reading {split} images", leave=False, disable=None)])
    try:
        save(lambda path: np.save(path, images), cache)
    except OSError as error:
        print(f"WARNING: decoded images are not kept for the next start: {error}", file=sys.stderr)
    return images


def decode(path: Path) -> NDArray[np.uint8]:
    try:
        return np.asarray(keras.utils.load_img(path, target_size=(32, 32), interpolation="bicubic"), np.uint8)
    except Exception as error:  # each format has its own
        raise ValueError(f"image {path} is damaged: {error}") from None


def embedded_data(samples: int, seed: int) -> Data:
    """Generate images of ten coarse patterns, each a few pixels off its place and covered with noise."""
    patterns = np.random.default_rng(0).integers(0, 60, (CLASSES, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    moved = np.stack([np.roll(patterns, (i // 9 - 4, i % 9 - 4), (1, 2)) for i in range(81)], axis=1)
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    images = moved[labels, random.integers(81, size=samples)] + random.integers(0, 196, (samples, 32, 32, 3), np.uint8)
    return images, labels


def save(write: Callable[[Path], object], path: Path) -> None:
    """Let `write` fill a file, and put it at `path` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder, path.name))
        Path(folder, path.name).replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", metavar="DIR", help="images in DIR/train/<class>/ and DIR/test/<class>/, or CIFAR-10")
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

    train(
        net, train_data, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        after_epoch=after_epoch,
    )  # fmt: skip
    print(f"saved {args.out / 'model.keras'}")


if __name__ == "__main__":
    main()
