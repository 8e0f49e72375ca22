"""The results of compare.py: compare.json, tables, and compare.png."""

import json
from collections.abc import Callable, Iterable
from itertools import cycle, pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from federation.app.checkpoint import RESUMABLE_KEYS
from federation.app.config import RunConfig
from federation.app.run_folder import write_atomically

SPENT = 0.7, 1.02  # which part of a budget counts as all of it, since it may end within an epoch or a round


class Point(NamedTuple):
    """An accuracy on the whole test set, and the budget spent so far."""

    visits: int  # of training samples, by all clients together
    steps: int  # sequential steps: in each round those of the client with the most samples
    seconds: float
    accuracy: float


Cell = dict[str, Any]  # one training with one seed: its "points" and further results
Cells = dict[str, Cell]  # by name
Numbers = list[float]  # one per seed

ROWS = {  # of the table, with the trainings from which their accuracies are taken
    "centralized": ("centralized", "centralized, as many steps", "centralized, as long"),
    "local only, IID": ("local only, IID",),
    "local only, non-IID": ("local only, non-IID",),
    "federated, IID": ("federated, IID",),
    "federated, non-IID": ("federated, non-IID",),
}
STRATEGY = "federated, non-IID, "  # the beginning of the name of a training by a further strategy, and of its row
GAP_STEPS = {  # from centralized to federated training, one change at a time, with equal sample visits
    "optimizer restart": "optimizer restart",
    "smaller shards": "smaller shards",
    "averaging": "federated, IID",
    "skew": "federated, non-IID",
    "partial participation": "partial participation",
}


# ------------------------------------------------------------------------------------------------------ the file


def load(path: Path, config: RunConfig) -> dict[str, Cells]:
    """Return the finished cells, by seed. Raises ValueError if they have other settings."""
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text("utf-8"))
        begun, cells = saved["config"], saved["cells"]
        for cell in (cell for of_seed in cells.values() for cell in of_seed.values()):
            cell["points"] = [Point(*point) for point in cell["points"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or choose another --out") from None
    for key, value in config.values().items():
        if key not in RESUMABLE_KEYS - {"num-server-rounds"} | {"seed"} and begun.get(key) != value:
            raise ValueError(f"{path} compares with {key}={begun.get(key)!r}, not {value!r}; choose another --out")
    return dict(cells)


def save(path: Path, config: RunConfig, cells: dict[str, Cells], **more: Any) -> None:
    text = json.dumps({"config": config.values(), "cells": cells, **more}, indent=1)
    write_atomically(path, lambda unfinished: unfinished.write_text(text + "\n", "utf-8"))


# ----------------------------------------------------------------------------------------------------- the tables


def summary(seeds: list[Cells]) -> dict[str, dict[str, Any]]:
    """Return the rows of the table and the steps of the gap, with a number per seed."""
    rows = ROWS | {name: (name,) for name in _strategies(seeds)}
    return {
        "table": {row: _row(seeds, row, trainings) for row, trainings in rows.items() if row in seeds[0]},
        "gap": _gap(seeds) if "optimizer restart" in seeds[0] else {},
    }


def _strategies(seeds: list[Cells]) -> list[str]:
    """Return the names of the trainings by further strategies."""
    return [name for name in seeds[0] if name.startswith(STRATEGY)]


def _row(seeds: list[Cells], row: str, trainings: tuple[str, ...]) -> dict[str, Any]:
    own = [cells[row] for cells in seeds]
    return {
        **{axis: [_read(cells, trainings, axis) for cells in seeds] for axis in Point._fields[:3]},
        "took": [cell["points"][-1].seconds for cell in own],
        **{key: [cell[key] for cell in own] for key in ("bytes_down", "bytes_up", "clients") if key in own[0]},
    }


def _read(cells: Cells, trainings: Iterable[str], axis: str) -> float | None:
    """Return the accuracy of a training when it has used up the budget of "federated, IID", if it ever has."""
    least, most = (part * getattr(cells["federated, IID"]["points"][-1], axis) for part in SPENT)
    points = [point for name in trainings for point in cells.get(name, {"points": []})["points"]]
    fitting = [(getattr(point, axis), point.accuracy) for point in points if least <= getattr(point, axis) <= most]
    return float(max(fitting)[1]) if fitting else None


def _gap(seeds: list[Cells]) -> dict[str, Numbers]:
    """Return the change of accuracy, in points, caused by each step and by all of them together."""
    names = ("centralized", *GAP_STEPS.values())
    ends = [[100 * cells[name]["points"][-1].accuracy for cells in seeds] for name in names]
    pairs = [*pairwise(ends), (ends[0], ends[-1])]
    costs = [[after - before for before, after in zip(*pair, strict=True)] for pair in pairs]
    return dict(zip([*GAP_STEPS, "all together"], costs, strict=True))


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Return the table, the accuracies of single clients, and the gap, as text."""
    table, gap = results["table"], results["gap"]
    head = "".join(f"{text:>18}" for text in ("sample visits", "steps", "seconds"))
    width = max(24, *(len(name) + 2 for name in table))
    lines = ["", f"{'accuracy at equal':{width}}{head}{'took (s)':>12}{'MB down':>10}{'MB up':>8}"]
    lines += [f"{name:{width}}{_line(row)}" for name, row in table.items()]
    lines += [_clients(name, row["clients"]) for name, row in table.items() if "clients" in row]
    lines += ["", "from centralized to federated, in points of accuracy at equal sample visits"] if gap else []
    lines += [f"{name:24}{_spread(points, '+.2f'):>18}" for name, points in gap.items()]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    accuracies = "".join(f"{_spread(row[axis], '.4f'):>18}" for axis in Point._fields[:3])
    down, up = (mean(row.get(key, [0])) / 1e6 for key in ("bytes_down", "bytes_up"))
    return f"{accuracies}{mean(row['took']):12.1f}{down:10.1f}{up:8.1f}"


def _clients(name: str, accuracies: list[Numbers]) -> str:
    every = [accuracy for of_seed in accuracies for accuracy in of_seed]
    return f"{name}: {_spread(every, '.4f')} over clients and seeds, {min(every):.4f} to {max(every):.4f}"


def _spread(numbers: list[Any], form: str) -> str:
    """Return mean ± standard deviation, or a dash if a number is missing."""
    if None in numbers:
        return "-"
    return f"{mean(numbers):{form}}" + (f" ± {stdev(numbers):{form.lstrip('+')}}" if len(numbers) > 1 else "")


# ---------------------------------------------------------------------------------------------------- the picture

LINES: dict[str, dict[str, Any]] = {
    "centralized": {"color": "black", "marker": "o"},
    "federated, IID": {"color": "#0072b2", "marker": "s"},
    "federated, non-IID": {"color": "#d55e00", "marker": "^"},
}
OTHERS = ("#009e73", "#cc79a7", "#f0e442", "#999999")  # colours of further strategies, in turn
MARKS = {"local only, IID": ("#56b4e9", "D"), "local only, non-IID": ("#e69f00", "v")}


def draw(path: Path, seeds: list[Cells], results: dict[str, dict[str, Any]], title: str, samples: int) -> None:
    """Plot accuracy against sample visits and against time, and the gap step by step."""
    from matplotlib.figure import Figure  # imported here because it takes a second

    figure = Figure(figsize=(15, 4.8), layout="constrained")
    by_visits, by_time, *gap = figure.subplots(1, 3 if results["gap"] else 2)
    _lines(by_visits, seeds, lambda point: point.visits / samples, "sample visits, in epochs of the whole data set")
    _lines(by_time, seeds, lambda point: point.seconds, "seconds on this machine")
    for name, (colour, marker) in MARKS.items():
        if name in seeds[0]:
            _mark(by_visits, [cells[name] for cells in seeds], samples, name, color=colour, marker=marker)
    by_visits.legend(frameon=False, fontsize=9)
    by_time.sharey(by_visits)
    for axes in gap:
        _bars(axes, results["gap"])
    figure.suptitle(title)
    write_atomically(path, lambda unfinished: figure.savefig(unfinished, dpi=120))


def _lines(axes: Any, seeds: list[Cells], across: Callable[[Point], float], label: str) -> None:
    """Plot the mean over the seeds, with the standard deviation as a band."""
    others = zip(_strategies(seeds), cycle(OTHERS))
    further = {name: {"color": colour, "marker": ".", "linestyle": "--"} for name, colour in others}
    for name, style in (LINES | further).items():
        by_seed = zip(*(cells[name]["points"] for cells in seeds), strict=True)
        rows = [([across(p) for p in points], [p.accuracy for p in points]) for points in by_seed]
        x, y = [mean(at) for at, _ in rows], [mean(accuracies) for _, accuracies in rows]
        axes.plot(x, y, label=name, markersize=4, **style)
        if len(seeds) > 1:
            low, high = zip(*((mean(ys) - stdev(ys), mean(ys) + stdev(ys)) for _, ys in rows), strict=True)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel=label, ylabel="accuracy on the whole test set")
    axes.grid(alpha=0.3)


def _mark(axes: Any, cells: list[Cell], samples: int, name: str, **style: Any) -> None:
    """Mark the mean of the clients that train alone, with a line from the worst to the best one."""
    every = [accuracy for cell in cells for accuracy in cell["clients"]]
    x, middle = cells[0]["points"][-1].visits / samples, mean(every)
    spread = [[middle - min(every)], [max(every) - middle]]
    axes.errorbar([x * (1.02 if "non" in name else 1)], [middle], spread, capsize=3, linestyle="", label=name, **style)


def _bars(axes: Any, gap: dict[str, Numbers]) -> None:
    names = list(gap)
    values = [mean(numbers) for numbers in gap.values()]
    errors = [stdev(numbers) for numbers in gap.values()] if len(gap["skew"]) > 1 else None
    colours = ["#999999"] * (len(names) - 1) + ["black"]
    bars = axes.barh(names, values, xerr=errors, color=colours, ecolor="#d55e00", capsize=3)
    axes.bar_label(bars, [f"{value:+.1f}" for value in values], padding=4)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="points of accuracy, at equal sample visits", title="from centralized to federated")
    axes.grid(alpha=0.3, axis="x")
