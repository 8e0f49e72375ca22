"""Train a small convolutional network on MNIST. Plain JAX with Flax NNX and optax, one file.

    python examples/mnist_jax.py                      # 3 epochs
    python examples/mnist_jax.py --data mnist.npz --epochs 10

Images stay in memory as bytes, and every step is one call of a compiled function, which is compiled once per shape.
"""

import argparse
import functools
import gzip
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

try:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
except ModuleNotFoundError as error:
    sys.exit(f"mnist_jax.py: {error}; install what it needs by: pip install '.[jax]'")

Data = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, 28, 28), labels (n,)

CLASSES = 10
DATA_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mnist"  # where MNIST is looked for
EMBEDDED = "embedded"  # the name of the generated stand-in, for machines that have neither data nor a network
URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


class Net(nnx.Module):
    """Two convolutions, each of which halves the image, and two dense layers: (n, 28, 28) bytes to (n, 10) logits.

    Strides halve it, since the gradient of pooling takes XLA three times as long on a CPU.
    """

    def __init__(self, seed: int = 0) -> None:
        random = nnx.Rngs(seed)
        self.conv1 = nnx.Conv(1, 16, (5, 5), strides=2, rngs=random)
        self.conv2 = nnx.Conv(16, 32, (5, 5), strides=2, rngs=random)
        self.dense1 = nnx.Linear(7 * 7 * 32, 64, rngs=random)
        self.dense2 = nnx.Linear(64, CLASSES, rngs=random)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None] / 255
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        x = nnx.relu(self.dense1(x.reshape(len(x), -1)))
        return self.dense2(x)


def train(
    net: Net,
    data: Data,
    *,
    epochs: int = 3,
    lr: float = 0.03,
    batch_size: int = 32,
    momentum: float = 0.9,
    seed: int = 0,
    after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:
    """Train `net` in place with SGD and return the mean loss per sample of the last epoch.

    Each epoch visits every sample once, in an order drawn from `seed + epoch` (counted from 0), so that E calls
    of one epoch see the batches of one call of E. `after_epoch(epoch, loss)` is called after each, from 1.
    """
    images, labels = map(jnp.asarray, data)
    graph, weights = nnx.split(net)
    velocity = optax.sgd(lr, momentum).init(weights)
    for epoch in range(epochs):
        order = np.random.default_rng(seed + epoch).permutation(len(labels))
        losses = []
        for rows in tqdm(list(batches(order, batch_size)), f"epoch {epoch + 1}", leave=False, disable=None):
            weights, velocity, loss = train_step(graph, weights, velocity, images, labels, rows, lr, momentum)
            losses.append(loss)
        nnx.update(net, weights)
        mean_loss = float(np.sum(losses, dtype=float)) / len(labels)
        after_epoch(epoch + 1, mean_loss)
    return mean_loss


@functools.partial(jax.jit, static_argnums=0)
def train_step(
    graph: Any, weights: Any, velocity: Any, images: jax.Array, labels: jax.Array, rows: jax.Array,
    lr: float, momentum: float,
) -> tuple[Any, Any, jax.Array]:  # fmt: skip
    """Return the weights and the velocity after a step on the samples in `rows`, and the sum of their losses."""

    def mean_loss(weights: Any) -> jax.Array:
        logits = nnx.merge(graph, weights)(images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    loss, gradient = jax.value_and_grad(mean_loss)(weights)
    step, velocity = optax.sgd(lr, momentum).update(gradient, velocity)
    return optax.apply_updates(weights, step), velocity, loss * len(rows)


def test(net: Net, data: Data, *, batch_size: int = 500) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    images, labels = map(jnp.asarray, data)
    sums = [test_step(*nnx.split(net), images, labels, rows) for rows in batches(np.arange(len(labels)), batch_size)]
    loss, correct = np.sum(sums, axis=0, dtype=float) / len(labels)
    return float(loss), float(correct)


@functools.partial(jax.jit, static_argnums=0)
def test_step(
    graph: Any, weights: Any, images: jax.Array, labels: jax.Array, rows: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of the losses of the samples in `rows`, and how many of them are classified correctly."""
    logits = nnx.merge(graph, weights)(images[rows])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
    return losses.sum(), (logits.argmax(1) == labels[rows]).sum()


def batches(rows: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    return (rows[i : i + size] for i in range(0, len(rows), size))


def save(net: Net, path: Path) -> None:
    """Write the weights as an .npz file of arrays called `conv1.kernel` and so on."""
    np.savez(path, **{".".join(key): weight[...] for key, weight in nnx.to_flat_state(nnx.state(net))})


def load(path: Path | str) -> Net:
    """Return a net with the weights that `save` wrote."""
    net = Net()
    with np.load(path) as saved:
        flat = [(key, weight.replace(jnp.asarray(saved[".".join(key)])))
                for key, weight in nnx.to_flat_state(nnx.state(net))]  # fmt: skip
    nnx.update(net, nnx.from_flat_state(flat))
    return net


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)` from the place that `find_data(root)` names."""
    source = find_data(root)
    if source == EMBEDDED:
        return embedded_data(6_000, seed=1), embedded_data(1_000, seed=2)
    read = read_npz if source.endswith(".npz") else read_idx
    try:
        return checked(*read(Path(source), "train")), checked(*read(Path(source), "test"))
    except Exception as error:  # a damaged file shows itself in many ways
        raise ValueError(f"no usable MNIST in {source}: {error}; remove or mend it") from None


def find_data(root: str | None = None) -> str:
    """Say where the data are: in `root`, in the usual place (MNIST is downloaded if need be), or embedded here.

    Data that were named are never replaced: raises ValueError if `root` holds neither mnist.npz nor the four IDX files.
    """
    place = Path(root or DATA_DIR).expanduser().absolute()
    if root == EMBEDDED:
        return EMBEDDED
    if place.suffix == ".npz" and place.is_file():
        return str(place)
    if (place / "mnist.npz").is_file():
        return str(place / "mnist.npz")
    if list(place.glob("train-images*")):
        return str(place)
    if root:
        raise ValueError(f"{place} is not MNIST: name mnist.npz, or a folder with it or with "
                         "train-images-idx3-ubyte.gz and the three other files")  # fmt: skip
    try:
        import pooch

        return str(pooch.retrieve(URL, SHA256, fname="mnist.npz", path=DATA_DIR))
    except Exception as error:  # no network shows itself in many ways, and each has the same remedy
        print(
            f"WARNING: {DATA_DIR} has no MNIST, and it cannot be downloaded ({type(error).__name__}). Using a small\n"
            "WARNING: EMBEDDED data set instead: its accuracies say nothing about MNIST. Name yours with --data.",
            file=sys.stderr,
        )
    return EMBEDDED


def read_npz(path: Path, split: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return images and labels of a split from a file in the layout of Keras's mnist.npz."""
    with np.load(path) as saved:
        return saved[f"x_{split}"], saved[f"y_{split}"]


def read_idx(folder: Path, split: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return images and labels of a split from a folder with the four original files, gzipped or not."""
    prefix = {"train": "train", "test": "t10k"}[split]
    return idx(folder, f"{prefix}-images"), idx(folder, f"{prefix}-labels")


def idx(folder: Path, name: str) -> NDArray[np.uint8]:
    """Return the array in an IDX file: 0, 0, 8 for bytes, the number of dimensions, each of them, and the bytes."""
    path = min(folder.glob(f"{name}*"), default=folder / name)  # -idx3-ubyte or .idx3-ubyte, and .gz
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of bytes")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def checked(images: NDArray[Any], labels: NDArray[Any]) -> Data:
    """Return one split. Raises ValueError unless it is n images of 28×28 bytes, and n labels below 10."""
    if images.dtype != np.uint8 or images.shape != (len(labels), 28, 28) or not len(labels):
        raise ValueError(f"images are {images.dtype} of shape {images.shape}, with {len(labels)} labels; "
                         "needed are n images of 28×28 bytes and n labels")  # fmt: skip
    if (
        labels.shape != (len(labels),)
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() < CLASSES
    ):
        raise ValueError(f"labels should be whole numbers from 0 to {CLASSES - 1}")
    return images, labels.astype(np.int64)


def embedded_data(samples: int, seed: int) -> Data:
    """Generate images of ten coarse patterns, each a few pixels off its place and covered with noise."""
    patterns = np.random.default_rng(0).integers(0, 60, (CLASSES, 7, 7), np.uint8).repeat(4, 1).repeat(4, 2)
    moved = np.stack([np.roll(patterns, (i // 9 - 4, i % 9 - 4), (1, 2)) for i in range(81)], axis=1)
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    images = moved[labels, random.integers(81, size=samples)] + random.integers(0, 196, (samples, 28, 28), np.uint8)
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", metavar="PATH", help="mnist.npz, or a folder with the four IDX files")
    parser.add_argument("--epochs", type=int, default=3, metavar="N")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--lr", type=float, default=0.03, metavar="F", help="learning rate")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist_jax"), metavar="DIR", help="for model.npz")
    args = parser.parse_args()
    for option, least in {"epochs": 1, "batch_size": 1, "lr": 1e-9, "seed": 0}.items():
        if not least <= (value := getattr(args, option)) < 2**31:
            parser.error(f"argument --{option.replace('_', '-')}: {value} is not in the range {least} to {2**31 - 1}")
    try:
        run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"mnist_jax.py: {error}")
    except KeyboardInterrupt:
        sys.exit("mnist_jax.py: stopped")


def run(args: argparse.Namespace) -> None:
    """Train for `args.epochs`, and print a line and save the model after each."""
    args.out.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=args.out).close()  # a folder that cannot be written should show before the training
    source = find_data(args.data)
    train_data, test_data = load_data(source)
    print(f"{len(train_data[1]):,} training and {len(test_data[1]):,} test images: {source}; on {jax.devices()[0]}")
    print("epoch  train loss  test loss  accuracy  seconds")
    net = Net(args.seed)
    started = time.perf_counter()

    def after_epoch(epoch: int, train_loss: float) -> None:
        seconds = time.perf_counter() - started
        test_loss, accuracy = test(net, test_data)
        print(f"{epoch:5}  {train_loss:10.4f}  {test_loss:9.4f}  {accuracy:8.4f}  {seconds:7.1f}", flush=True)
        with tempfile.TemporaryDirectory(dir=args.out) as folder:  # so that model.npz is never seen half written
            save(net, Path(folder, "model.npz"))
            Path(folder, "model.npz").replace(args.out / "model.npz")

    train(
        net, train_data, epochs=args.epochs, lr=args.lr, batch_size=args.batch_size, seed=args.seed,
        after_epoch=after_epoch,
    )  # fmt: skip
    print(f"saved {args.out / 'model.npz'}")


if __name__ == "__main__":
    main()
