"""A folder of images, for tests of what reads one."""

from pathlib import Path

from PIL import Image

from cifar_data import embedded_data


def write_images(root: Path, train: int, test: int) -> Path:
    """Write a folder of images, ten classes in both splits, and return it."""
    for split, count in (("train", train), ("test", test)):
        images, labels = embedded_data(count, seed=1)
        for number, (image, label) in enumerate(zip(images.numpy(), labels.tolist(), strict=True)):
            (root / split / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / split / str(label) / f"{number}.png")
    return root
