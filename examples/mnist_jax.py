"""Train a small convolutional network on MNIST, in plain JAX with Flax NNX and optax.

    python examples/mnist_jax.py                      # 3 epochs
    python examples/mnist_jax.py --data mnist.npz --epochs 10

Images stay in memory as bytes, and every step is one call of a compiled function, which is compiled once per shape.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray
from tqdm import tqdm

Data = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (n, 28, 28), labels (n,)

CLASSES = 10
DATA_DIR = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "mnist"
EMBEDDED = "embedded"  # the name of the generated data set
URL = "https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz"
SHA256 = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"


class Net(nnx.Module):
    """Two convolutions, each of which halves the image, and two dense layers: (n, 28, 28) bytes to (n, 10) logits."""

    def __init__(self, seed: int = 0) -> None:
        random = nnx.Rngs(seed)
        self.conv1 = nnx.Conv(1, 16, (5, 5), strides=2, rngs=random)  # XLA is slow at the gradient of pooling
        self.conv2 = nnx.Conv(16, 32, (5, 5), strides=2, rngs=random)
        self.dense1 = nnx.Linear(7 * 7 * 32, 64, rngs=random)
        self.dense2 = nnx.Linear(64, CLASSES, rngs=random)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = images[..., None] / 255
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        x = nnx.relu(self.dense1(x.reshape(len(x), -1)))
        return self.dense2(x)


def train(
    net: Net, data: Data, *, epochs: int = 3, lr: float = 0.03, batch_size: int = 32, momentum: float = 0.9,
    seed: int = 0, after_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> float:  # fmt: skip
    """Train `net` in place with SGD and return the mean loss per sample of the last epoch.

    Each epoch visits every sample once, in an order drawn from `seed + epoch` (counted from 0), so that E calls
    of one epoch see the batches of one call of E. `after_epoch(epoch, loss)` is called after each, from 1.
    """
    images, labels = data
    graph, weights = nnx.split(net)
    velocity = optax.sgd(lr, momentum).init(weights)
    for epoch in range(epochs):
        order, losses = np.random.default_rng(seed + epoch).permutation(len(labels)), []
        batches = np.split(order, range(batch_size, len(labels), batch_size))
        for rows in tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=None):
            weights, velocity, loss = train_step(graph, weights, velocity, images[rows], labels[rows], lr, momentum)
            losses.append(loss)
        nnx.update(net, weights)
        mean_loss = float(np.sum(losses, dtype=float)) / len(labels)
        after_epoch(epoch + 1, mean_loss)
    return mean_loss


@functools.partial(jax.jit, static_argnums=0)
def train_step(graph, weights, velocity, images, labels, lr, momentum):
    """Return the weights and the velocity after a step on a batch, and the sum of its losses."""

    def mean_loss(weights):
        logits = nnx.merge(graph, weights)(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradient = jax.value_and_grad(mean_loss)(weights)
    step, velocity = optax.sgd(lr, momentum).update(gradient, velocity)
    return optax.apply_updates(weights, step), velocity, loss * len(labels)


def test(net: Net, data: Data, *, batch_size: int = 500) -> tuple[float, float]:
    """Return the mean loss per sample and the accuracy in 0..1 of `net` on `data`."""
    images, labels = data
    batches = np.split(np.arange(len(labels)), range(batch_size, len(labels), batch_size))
    sums = [test_step(*nnx.split(net), images[rows], labels[rows]) for rows in batches]
    loss, correct = np.sum(sums, axis=0, dtype=float)
    return float(loss) / len(labels), float(correct) / len(labels)


@functools.partial(jax.jit, static_argnums=0)
def test_step(graph, weights, images, labels):
    """Return the sum of the losses of a batch, and how many of its samples are classified correctly."""
    logits = nnx.merge(graph, weights)(images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.sum(), (logits.argmax(1) == labels).sum()


def save(net: Net, path: Path) -> None:
    """Write the weights as arrays called `conv1.kernel` and so on, to an .npz file that is never seen half written."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        arrays = {".".join(key): weight[...] for key, weight in nnx.to_flat_state(nnx.state(net))}
        np.savez(Path(folder, path.name), **arrays)
        Path(folder, path.name).replace(path)


def load(path: Path | str) -> Net:
    """Return a net with the weights that `save` wrote."""
    net, arrays = Net(), np.load(path)
    nnx.update(net, nnx.from_flat_state([(tuple(name.split(".")), jnp.asarray(arrays[name])) for name in arrays]))
    return net


def load_data(root: str | None = None) -> tuple[Data, Data]:
    """Return `(x_train, y_train), (x_test, y_test)`. Raises ValueError if the file is damaged."""
    source = find_data(root)
    if source == EMBEDDED:
        return embedded_data(6_000, seed=1), embedded_data(1_000, seed=2)
    try:
        with np.load(source) as arrays:
            data = [(arrays[f"x_{split}"], arrays[f"y_{split}"].astype(np.int64)) for split in ("train", "test")]
        for x, y in data:
            if x.dtype != np.uint8 or x.shape != (*y.shape, 28, 28) or not 0 <= y.min() <= y.max() < CLASSES:
                raise ValueError(f"it needs n images of 28×28 bytes and n labels from 0 to {CLASSES - 1}")
        return tuple(data)
    except Exception as error:  # a damaged file can raise many kinds
        raise ValueError(f"{source} is damaged or not MNIST: {error}") from None


def find_data(root: str | None = None) -> str:
    """Return the path of mnist.npz, or EMBEDDED if there is none. Raises ValueError if `root` has none."""
    if root == EMBEDDED:
        return EMBEDDED
    path = Path(root or DATA_DIR).expanduser().absolute()
    path = path if path.suffix == ".npz" else path / "mnist.npz"
    if path.is_file():
        return str(path)
    if root:
        raise ValueError(f"data file {path} does not exist")
    try:
        import pooch

        return str(pooch.retrieve(URL, SHA256, fname=path.name, path=DATA_DIR))
    except Exception as error:  # without a network, many kinds are possible
        print(f"WARNING: {DATA_DIR} has no MNIST, and it cannot be downloaded ({type(error).__name__}).\n"
              "WARNING: Using a small EMBEDDED data set, not MNIST. To train on your own file, use --data.",
              file=sys.stderr)  # fmt: skip
    return EMBEDDED


def embedded_data(samples: int, seed: int) -> Data:
    """Generate noisy images of ten coarse patterns, each shifted by up to four pixels."""
    patterns = np.random.default_rng(0).integers(0, 60, (CLASSES, 7, 7), np.uint8).repeat(4, 1).repeat(4, 2)
    moved = np.stack([np.roll(patterns, (i // 9 - 4, i % 9 - 4), (1, 2)) for i in range(81)], axis=1)
    random = np.random.default_rng(seed)
    labels = random.integers(CLASSES, size=samples)
    images = moved[labels, random.integers(81, size=samples)] + random.integers(0, 196, (samples, 28, 28), np.uint8)
    return images, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options]")
    parser.add_argument("--data", metavar="PATH", help="mnist.npz, or the folder that has it")
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
        save(net, args.out / "model.npz")

    options = {name: getattr(args, name) for name in ("epochs", "lr", "batch_size", "seed")}
    train(net, train_data, **options, after_epoch=after_epoch)
    print(f"saved {args.out / 'model.npz'}")


if __name__ == "__main__":
    main()
