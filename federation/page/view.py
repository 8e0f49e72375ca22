"""What the page says of a run: metrics.json, turned into the few numbers and texts that are shown."""

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

from federation.app.config import defaults
from federation.page import curves, shown

View = dict[str, Any]
STATUSES = "running", "finished", "failed"
RECENT = 5  # rounds, whose mean duration tells how long the others will take
MOST_REASONS = 100  # of those who were left out
CELLS = 200_000  # of the map of who holds what; with more of them the picture in the run folder is the place to look
SHADES = 10


def empty_view(path: Path, status: str) -> View:
    """Return what is shown of a run folder of which nothing has been read yet."""
    return make_view(path, {}) | {"status": status}


def make_view(path: Path, metrics: Mapping[str, Any]) -> View:
    """Return what is shown of a run. `metrics` may be of an earlier version, and lack any key."""
    rounds: list[curves.Row] = list(metrics.get("rounds") or [])
    config = dict(metrics.get("config") or {})
    status = metrics.get("status") if metrics.get("status") in STATUSES else "unknown"
    runs, clients = status == "running", _clients(metrics, rounds, status == "running")
    return {
        "folder": str(path), "name": path.name, "status": status, "damage": "",
        "task": metrics.get("task") or path.name, "data": _name((metrics.get("dataset") or {}).get("name")),
        **_progress(metrics, rounds, config, runs), **_totals(metrics, rounds),
        "rounds": [{"round": at, **_without_columns(row)} for at, row in enumerate(rounds)], "columns": columns(rounds),
        "charts": curves.charts(rounds),
        "clients": clients, "here": sum(client["here"] for client in clients),
        "left_out": _left_out(metrics, rounds), "refused": list(metrics.get("refused") or [])[::-1],
        "held": _held((metrics.get("partitions") or {}).get("train") or []),
        "config": _config(config), "about": _about(metrics),
    }  # fmt: skip


def _name(data: str | None) -> str:
    """Return the last part of the path of a data set."""
    return PureWindowsPath(data or "").name  # which knows both separators


# ------------------------------------------------------------------------------------------------------- round and time


def _progress(metrics: Mapping[str, Any], rounds: Sequence[curves.Row], config: Mapping[str, Any], runs: bool) -> View:
    now = dict(metrics.get("now") or {}) if runs else {}
    done = max(0, len(rounds) - 1)
    total = config.get("num-server-rounds") or done
    spent = sum((row.get("seconds") or 0) + (row.get("waiting_seconds") or 0) for row in rounds)
    lasting = time.time() - now["round_since"] if now.get("round_since") else 0.0
    view = {"round": min(done + 1, total) if runs else done, "done": done, "total": total}
    view |= {"doing": now.get("doing") or "", "asked": now.get("asked") or 0, "pending": len(now.get("pending") or ())}
    view["for"] = time.time() - now["since"] if now.get("since") else None
    view["spent"] = spent + lasting
    return view | {"left": _time_left(rounds, total - done, lasting) if runs else None}


def _time_left(rounds: Sequence[curves.Row], rounds_left: int, lasting: float) -> float | None:
    """Return how long a run will take if its rounds take as long as the last ones; None before the first."""
    took = [row.get("seconds") or 0 for row in rounds[1:]][-RECENT:]
    mean = sum(took) / len(took) if took else 0
    return max(mean * rounds_left - min(lasting, mean), 0) if took else None


def _totals(metrics: Mapping[str, Any], rounds: Sequence[curves.Row]) -> View:
    last = rounds[-1] if rounds else {}
    latest = []
    for name in curves.metric_names(rounds):
        side = next((side for side in ("server", "clients", "train") if last.get(f"{side}_{name}") is not None), None)
        if side:
            latest.append({"name": name, "side": side, "value": last[f"{side}_{name}"]})
    sums = {key: sum(row.get(key) or 0 for row in rounds) for key in ("bytes_down", "bytes_up", "dropped")}
    return {"latest": latest[:4], "best": metrics.get("best"), **sums}


def _about(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    dataset, versions = metrics.get("dataset") or {}, metrics.get("versions") or {}
    pairs = [
        ("data", dataset.get("name")),
        ("training samples", dataset.get("train")),
        ("test samples", dataset.get("test")),
    ]
    pairs += [("SHA-256 of the final weights", metrics.get("final_weights_sha256")), *versions.items()]
    return [(key, shown.number(value)) for key, value in pairs if value is not None]


# ------------------------------------------------------------------------------------------------------------- clients


def _clients(metrics: Mapping[str, Any], rounds: Sequence[curves.Row], runs: bool) -> list[View]:
    """Return what there is to say of each client, those first who are not well."""
    roster = metrics.get("roster") or _roster_of_others(rounds)
    now = dict(metrics.get("now") or {}) if runs else {}
    pending, left_out = set(now.get("pending") or ()), _left_out_now(metrics, rounds, runs)
    tested = _by_client(next((row["tested"] for row in reversed(rounds) if row.get("tested")), {}))
    keys = [*roster]
    clients = [dict(zip(keys, values, strict=True)) for values in zip(*roster.values(), strict=True)]
    for client in clients:
        number = client["client"]
        client["tested"] = tested.get(number, {})
        client["left_out"] = left_out.get(number, "")
        client["state"] = _state(client, number in pending, now.get("doing", ""), runs)
    return sorted(clients, key=lambda client: (client["state"] not in ("gone", "left out"), client["client"]))


def _state(client: View, is_pending: bool, doing: str, runs: bool) -> str:
    if not client["here"]:
        return "gone"
    if is_pending:
        return doing
    return "left out" if client["left_out"] else "here" if runs else "took part"


def _left_out_now(metrics: Mapping[str, Any], rounds: Sequence[curves.Row], runs: bool) -> dict[int, str]:
    """Return why clients were left out of this round or, unless one goes on, of the last one."""
    last = (rounds[-1].get("left_out") or []) if rounds else []
    found = [*last, *(metrics.get("left_out") or [])] if runs else last
    return {client: entry["reason"] for entry in found for client in entry["clients"]}


def _roster_of_others(rounds: Sequence[curves.Row]) -> dict[str, list[Any]]:
    """Return the columns of the clients of a run that has noted none: of an earlier version, or another program."""
    trained: dict[str, list[Any]] = next((row["trained"] for row in reversed(rounds) if row.get("trained")), {})
    numbers = trained.get("client") or []
    columns = {"client": numbers, "name": [""] * len(numbers), "here": [True] * len(numbers)}
    return columns | {"train": trained.get("samples") or [None] * len(numbers)}


def _by_client(columns: Mapping[str, list[Any]]) -> dict[int, dict[str, Any]]:
    names = [name for name in columns if name not in ("client", "samples", "seconds")]
    return {
        client: {name: columns[name][at] for name in names} | {"seconds": (columns.get("seconds") or {at: None})[at]}
        for at, client in enumerate(columns.get("client") or ())
    }


def _left_out(metrics: Mapping[str, Any], rounds: Sequence[curves.Row]) -> list[View]:
    """Return who was left out, when, and why, the latest first."""
    roster = metrics.get("roster") or {}
    names = dict(zip(roster.get("client") or (), roster.get("name") or (), strict=False))
    this_round = {"round": len(rounds), "left_out": metrics.get("left_out") or []}
    found = []
    for row in (this_round, *reversed(rounds)):
        for entry in reversed(row.get("left_out") or []):
            who = [f"{client} ({names[client]})" if names.get(client) else str(client) for client in entry["clients"]]
            found.append({"round": row["round"], "doing": entry["doing"], "reason": entry["reason"], "who": who})
    return found[:MOST_REASONS]


# ------------------------------------------------------------------------------------------- rounds, partitions, config


def columns(rounds: Sequence[curves.Row]) -> list[tuple[str, str]]:
    """Return the columns of the table of rounds: their keys, and their headings."""
    names = curves.metric_names(rounds)
    found = [(f"{side}_{name}", f"{heading} {name}") for name in reversed(names) for side, heading in HEADINGS.items()]
    found = [*found, *FURTHER]
    return [(key, heading) for key, heading in found if any(row.get(key) is not None for row in rounds)]


HEADINGS = {"train": "train", "clients": "clients’", "server": "server’s"}
FURTHER = [
    ("consensus", "consensus"), ("epsilon", "epsilon"), ("clients", "clients"), ("dropped", "left out"),
    ("bytes_down", "sent"), ("bytes_up", "received"), ("seconds", "time"), ("waiting_seconds", "waiting"),
]  # fmt: skip


def _without_columns(row: curves.Row) -> curves.Row:
    return {key: value for key, value in row.items() if not isinstance(value, dict | list)}


def _held(partitions: Sequence[Sequence[int]]) -> View:
    """Return how many training samples of each class each client holds, and how dark each cell is."""
    classes = max(map(len, partitions), default=0)
    darkest = max((max(counts, default=0) for counts in partitions), default=0)
    drawn = classes * len(partitions) <= CELLS
    shades = [[shade(count, darkest) for count in counts] for counts in partitions] if drawn else []
    return {"clients": len(partitions), "classes": classes, "most": darkest, "shades": shades, "counts": partitions,
            "text": "".join(f"{level:x}" for row in shades for level in row)}  # fmt: skip


def shade(count: int, darkest: int) -> int:
    """Return how dark a cell is, from 0, only for none at all, to SHADES."""
    return max(1, round(SHADES * count / darkest)) if count and darkest else 0


def _config(config: Mapping[str, Any]) -> list[View]:
    """Return the run config, what is not the default first."""
    usual = _defaults()
    rows = [
        {"key": key, "value": shown_value(value), "changed": key in usual and value != usual[key]}
        for key, value in config.items()
    ]
    return sorted(rows, key=lambda row: not row["changed"])


@cache
def _defaults() -> dict[str, Any]:
    return defaults()


def shown_value(value: Any) -> str:
    """Return a value of the run config as in pyproject.toml."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if isinstance(value, str) else str(value)
