"""Compare server.py --simulate with Flower's quickstart-pytorch: the time of the same work, including start-up.

    python benchmarks/simulation.py --data DIR [--repeats 1]

The work: 2 simulated clients, 3 rounds of 1 local epoch, LeNet, SGD with momentum 0.9, batch 32, learning rate 0.01.
DIR has images in train/<class>/ and test/<class>/.

- ours: `python server.py --simulate 2`, from its start to its end; each client trains on all of its half of the data;
- quickstart: the app in quickstart/, from the start of its SuperLink to its ServerApp's last line, with the engine's
  defaults: two cores per client, polling for replies every three seconds. Each client trains on 80 % of its half.

Both use the same engine and the same environment, and both test each round's model on the clients and on all of
DIR/test. cifar.py decodes a folder of images once; this is done, and timed, before the repeats.
"""

import argparse
import statistics
import time
from pathlib import Path

from harness import federate, run_app

import cifar
from federation.launch.command import run_command

QUICKSTART = Path(__file__).resolve().parent / "quickstart"
CLIENTS = 2
Run = tuple[float, float]  # seconds, and the final model's accuracy on the whole test set


def ours(data: Path) -> Run:
    started = time.perf_counter()
    settings = "num-server-rounds=3 local-epochs=1 learning-rate=0.01 batch-size=32"
    metrics, _ = federate("--simulate", str(CLIENTS), "--data", str(data), "--run-config", settings)
    return time.perf_counter() - started, metrics["rounds"][-1]["server_accuracy"]


def quickstart(data: Path) -> Run:
    result, seconds = run_app(QUICKSTART, {"data": str(data)}, simulate=CLIENTS)
    return seconds, result["accuracy"]


def decode(data: Path) -> None:
    if not (data / "train").is_dir() or not (data / "test").is_dir():
        raise ValueError(f"{data} has no train/ and test/; the quickstart reads images in <class>/ folders of both")
    started = time.perf_counter()
    (_, labels), _ = cifar.load_data(str(data))
    print(f"{len(labels):,} training images, opened by cifar.py in {time.perf_counter() - started:.1f} s (not counted)")


def command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="an image folder")
    parser.add_argument("--repeats", type=int, default=1, metavar="N")
    args = parser.parse_args()
    data = args.data.expanduser().absolute()
    decode(data)
    print("repeat   ours (s)  accuracy   quickstart (s)  accuracy   ratio")
    ratios = []
    for repeat in range(1, args.repeats + 1):
        (own, own_accuracy), (other, other_accuracy) = ours(data), quickstart(data)
        ratios.append(other / own)
        print(f"{repeat:6} {own:10.1f} {own_accuracy:9.4f} {other:16.1f} {other_accuracy:9.4f} {ratios[-1]:7.2f}")
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"server.py is {statistics.median(ratios):.2f} x as fast as the quickstart ({spread})")
    return 0


if __name__ == "__main__":
    run_command(command)
