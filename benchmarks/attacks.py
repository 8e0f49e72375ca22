"""Attack a federation, and see which strategies withstand it: a table and a picture, mean ± deviation over seeds.

    python benchmarks/attacks.py                         # continues if it was interrupted; see --help

Of 10 clients, 2 are hostile: the first two. They run the real client code with one more mod, which changes what they
send, or with a script of their own. Where x is the model that they were sent and y the one that they have trained, they
send x - (y - x) (sign), x + 10 (y - x) (scale), x plus Gaussian noise with deviation 1 (noise), or a model that was
trained on the labels 9 - y (labels). Every fifth image of CIFAR-10 (small_cifar.py), 8 rounds of one local epoch with a
learning rate of 0.02; a result is the test accuracy after the last round. Bulyan needs 4 f + 3 clients for f hostile
ones: it has 11 clients, of which 2 are hostile, too.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

import client
from benchmarks.cells import load_cells, save_cells
from benchmarks.in_process import options, play, shortened, spread
from federation.app import membership
from federation.app.client_state import keep_state
from federation.app.config import Settings
from federation.app.job import order_of
from federation.app.mods import explain, play_clients
from federation.app.packing import packed_replies
from federation.app.run_folder import write_atomically

Values = NDArray[Any]
BAD = (0, 1)  # the positions of the hostile clients
FORGED: dict[str, Callable[[Values, Values, np.random.Generator], Values]] = {  # what is sent instead of y
    "sign": lambda x, y, random: x - (y - x),
    "scale": lambda x, y, random: x + 10 * (y - x),
    "noise": lambda x, y, random: x + random.normal(size=x.shape),
}
FLIPPED = "benchmarks.flipped_cifar"  # the script of those that train on wrong labels
ATTACKS = ["none", *FORGED, "labels"]
PARTITIONS: dict[str, Settings] = {
    "IID": {"partitioner": "iid"},
    "Dirichlet 0.5": {"partitioner": "dirichlet", "alpha": 0.5},
}
STRATEGIES = {  # with their parameters and clients
    "fedavg": ("", 10),
    "fedmedian": ("", 10),
    "fedtrimmedavg": ("beta=0.2", 10),
    "krum": ("num_malicious_nodes=2", 10),
    "multikrum": ("num_malicious_nodes=2 num_nodes_to_select=8", 10),
    "bulyan": ("num_malicious_nodes=2", 11),
}
COMMON: Settings = {
    "task": "benchmarks.small_cifar", "num-server-rounds": 8, "learning-rate": 0.02, "fraction-evaluate": 0.0,
    "retries": 0,
}  # fmt: skip
COLOURS = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00"]  # Okabe and Ito 2008
Cells = dict[str, Any]  # by partition, attack, strategy and seed: accuracies per round


# ---------------------------------------------------------------------------------------------------------- the attack


def attacked_app(attack: str) -> ClientApp:
    """Return client.py's app, in which the clients at the positions BAD attack."""

    def mislead(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type != MessageType.TRAIN or order_of(message)["position"] not in BAD:
            return call_next(message, context)
        if attack == "labels":
            own = {**context.run_config, "task": FLIPPED}
            context = Context(context.run_id, context.node_id, context.node_config, context.state, own)
        reply = call_next(message, context)
        if attack in FORGED:
            reply.content["arrays"] = forged(message, reply, attack)
        return reply

    app = ClientApp(mods=[packed_replies, play_clients, explain, mislead, keep_state])
    app.train()(client.train)
    app.evaluate()(client.evaluate)
    app.query("join")(membership.join)
    app.query("leave")(membership.leave)
    return app


def forged(message: Message, reply: Message, attack: str) -> ArrayRecord:
    """Return what a hostile client sends instead of the model that it has trained. All entries have to be real."""
    order = order_of(message)
    sent, trained = (one.content.array_records["arrays"] for one in (message, reply))
    random = np.random.default_rng([order["server-round"], order["position"]])
    pairs = {name: (sent[name].numpy(), array.numpy()) for name, array in trained.items()}
    return ArrayRecord({name: Array(FORGED[attack](x, y, random).astype(y.dtype)) for name, (x, y) in pairs.items()})


# ----------------------------------------------------------------------------------------------------------- the study


def study(cells: Cells, args: argparse.Namespace) -> None:
    """Run what is missing, seed after seed, so that the first of them make a table already."""
    names = [(part, attack, name) for part in args.partition for attack in args.attack for name in args.strategy]
    for seed, (partition, attack, strategy) in ((seed, name) for seed in range(args.seeds) for name in names):
        key = f"{partition}, {attack}, {strategy}, {seed}"
        if key not in cells:
            started, (parameters, clients) = time.perf_counter(), STRATEGIES[strategy]
            own = {"strategy": strategy, "strategy-arguments": parameters, "num-clients": clients, "seed": seed}
            metrics = play(COMMON | PARTITIONS[partition] | own | shortened(args), attacked_app(attack))
            accuracies = [row["server_accuracy"] for row in metrics["rounds"]]
            cells[key] = {"accuracies": accuracies, "status": metrics["status"]}
            save_cells(args.out, cells)
            seconds = time.perf_counter() - started
            print(f"{key}: {accuracies[-1]:.4f}, {metrics['status']}, {seconds:.1f} s", flush=True)


def results(cells: Cells, args: argparse.Namespace, partition: str, attack: str, strategy: str) -> list[float]:
    """Return the accuracies in percent, one per seed that is there."""
    keys = [f"{partition}, {attack}, {strategy}, {seed}" for seed in range(args.seeds)]
    return [100 * cells[key]["accuracies"][-1] for key in keys if key in cells]


def table(cells: Cells, args: argparse.Namespace) -> str:
    """Return a table in Markdown: a column per attack."""
    rows = ["| | " + " | ".join(args.attack) + " |", "|---" * (1 + len(args.attack)) + "|"]
    for partition in args.partition:
        rows.append(f"| **{partition}**" + " |" * (1 + len(args.attack)))
        for strategy in args.strategy:
            columns = [spread(results(cells, args, partition, attack, strategy)) for attack in args.attack]
            rows.append(f"| {strategy} | " + " | ".join(columns) + " |")
    return "\n".join(rows)


def draw(path: Path, cells: Cells, args: argparse.Namespace) -> None:
    """Draw a bar per strategy for each attack, with the deviation over the seeds."""
    from matplotlib.figure import Figure  # here, because it takes a second

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(len(args.partition), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, partition in zip(axes, args.partition, strict=True):
        for number, strategy in enumerate(args.strategy):
            found = [results(cells, args, partition, attack, strategy) for attack in args.attack]
            _bars(panel, found, number, len(args.strategy), strategy)
        panel.axhline(10, color="grey", linestyle=":", linewidth=1)
        panel.set(title=partition, ylabel="test accuracy, %", xticks=range(len(args.attack)), xticklabels=args.attack)
        panel.grid(alpha=0.3, axis="y")
        panel.set_axisbelow(True)
    axes[0].legend(frameon=False, ncols=len(args.strategy), loc="upper center", bbox_to_anchor=(0.5, 1.35))
    axes[-1].set(xlabel="what 2 hostile clients of 10 do (bulyan: of 11); the dotted line is chance")
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=120))


def _bars(panel: Any, found: list[list[float]], number: int, count: int, label: str) -> None:
    at = [place + (number - (count - 1) / 2) * 0.8 / count for place in range(len(found))]
    heights = [mean(values) if values else 0.0 for values in found]
    errors = [stdev(values) if len(values) > 1 else 0.0 for values in found]
    panel.bar(at, heights, 0.8 / count, yerr=errors, label=label, color=COLOURS[number], ecolor="grey", capsize=2)


def main() -> None:
    parser = options(__doc__, "attacks", partition=PARTITIONS, attack=ATTACKS, strategy=STRATEGIES)
    args = parser.parse_args()
    args.partition, args.attack = args.partition or list(PARTITIONS), args.attack or ATTACKS
    args.strategy = args.strategy or list(STRATEGIES)
    cells = load_cells(args.out)
    study(cells, args)
    print(table(cells, args))
    draw(args.out.with_suffix(".png"), cells, args)


if __name__ == "__main__":
    main()
