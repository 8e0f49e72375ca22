"""Test the models that cifar.py and server.py saved, on the same test set.

python benchmarks/side_by_side.py [--data DIR]
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import cifar

MODELS = {"centralized": "runs/centralized/model.pt", "federated": "runs/federated/final_model.pt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", metavar="DIR")
    source = cifar.find_data(parser.parse_args().data)
    _, test_data = cifar.load_data(source)
    print(f"{'model':12} {'test loss':>9} {'accuracy':>9}   on the {len(test_data[1]):,} test images of {source}")
    for name, path in MODELS.items():
        net = cifar.Net()
        net.load_state_dict(torch.load(path, weights_only=True))
        loss, accuracy = cifar.test(net, test_data)
        print(f"{name:12} {loss:9.4f} {accuracy:9.4f}   {path}")


if __name__ == "__main__":
    main()
