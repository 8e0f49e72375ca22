"""Plots of a run: its curves, and the samples of each client."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # colour-blind people can distinguish these (Okabe and Ito 2008)
MOST_AXES = 6
WHOLE = {"integer": True, "min_n_ticks": 1}  # settings of ticks on axes of rounds, clients and classes


def curves(metrics: dict[str, Any], path: Path) -> None:
    """Draw the loss and each other metric per round, with the range between the lowest and the highest client."""
    rounds = metrics["rounds"]
    sides = ("server_", "clients_", "train_")
    keys = [key.removeprefix(side) for row in rounds for key in row for side in sides if key.startswith(side)]
    own = [name for name in dict.fromkeys(keys) if name != "loss"]
    names = [*own[: MOST_AXES - 1], "loss"]
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        _spread(axes, rounds, name)
        _curve(axes, rounds, f"server_{name}", "server, whole test set", "-o", BLUE)
        _curve(axes, rounds, f"clients_{name}", "clients, weighted mean", "x", ORANGE)
        _curve(axes, rounds, f"train_{name}", "clients, training", "--s", GREEN)
        axes.set(xlabel="round", ylabel="mean loss per sample" if name == "loss" else name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        axes.xaxis.get_major_locator().set_params(**WHOLE)
    dataset = metrics["dataset"]
    on = f" on {Path(dataset['name']).name} ({dataset['train']:,} samples)" if dataset["train"] else ""
    figure.suptitle(f"{metrics['task']}{on}, federated")
    figure.savefig(path, dpi=120)


def _curve(axes: Any, rounds: list[dict[str, Any]], key: str, label: str, style: str, colour: str) -> None:
    points = [(row["round"], row[key]) for row in rounds if row.get(key) is not None]
    size = max(3, min(8, 160 / len(rounds)))  # the markers of many rounds would overlap
    axes.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=size) if points else None


def _spread(axes: Any, rounds: list[dict[str, Any]], name: str) -> None:
    """Shade what lies between the lowest and the highest value of a client."""
    found = [(row["round"], (row.get("tested") or {}).get(name) or []) for row in rounds]
    bands = [(number, min(values), max(values)) for number, values in found if len(values) > 1]
    if bands:
        axes.fill_between(*zip(*bands, strict=True), color=ORANGE, alpha=0.15, label="clients, lowest to highest")


def partitions(metrics: dict[str, Any], path: Path) -> None:
    """Draw the number of training samples of each class and client, and above it the total of each client."""
    held = metrics["partitions"]["train"]
    clients, classes = len(held), len(held[0])
    width, height = min(24, 4 + 0.55 * clients), 0.5 + 0.3 * min(classes, 60)  # of the cells, in inches
    figure = Figure(figsize=(width, height + 2.2), layout="constrained")
    total, cells = figure.subplots(2, 1, sharex=True, height_ratios=(1.2, height))
    sizes = [sum(counts) for counts in held]
    total.bar(range(clients), sizes, color=BLUE)
    total.set(ylabel="samples")
    image = cells.imshow([list(row) for row in zip(*held, strict=True)], cmap="Blues", aspect="auto", vmin=0)
    cells.set(xlabel="client", ylabel="class")
    for axis in (cells.xaxis, cells.yaxis):
        axis.get_major_locator().set_params(**WHOLE)
    if clients <= 20 and classes <= 20:
        _numbers(cells, held)
    figure.colorbar(image, ax=cells, label="samples", aspect=5 * height, fraction=0.5 / width, pad=0.1 / width)
    figure.suptitle(f"{metrics['config']['partitioner']} partitions of {sum(sizes):,} training samples")
    figure.savefig(path, dpi=120)


def _numbers(axes: Any, held: list[list[int]]) -> None:
    darkest = max(map(max, held))
    for client, counts in enumerate(held):
        for number, count in enumerate(counts):
            colour = "white" if count > 0.6 * darkest else "black"
            axes.text(client, number, count or "", ha="center", va="center", fontsize=8, color=colour)
