"""What the processes of a run use while it lasts: memory and CPU time, by kind of process."""

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import psutil

KINDS = {  # by what the name of a process or its command line has in it; the first that is found counts
    "flower-superlin": "SuperLink", "flwr-serverapp": "server", "flwr-simulation": "server",
    "flower-supernod": "SuperNode", "flwr-clientapp": "client", "flower-superexe": "SuperExec",
    "fleet_proxy": "proxy", "fork_server.py": "fork server", "ray::": "actor", "raylet": "Ray", "gcs_server": "Ray",
    "/ray/": "Ray", "stand_in.py": "launchers", "flwr": "launchers", "server.py": "launchers", "client.py": "launchers",
}  # fmt: skip
MB = 1e6
Sample = dict[str, Any]  # "seconds" since the start, the "round", and by kind: "pss" in MB, "cpu" in seconds
Points = list[tuple[float, float]]


def kind(process: psutil.Process) -> str:
    """Return what a process is. A child that is forked from a fork server has a name of its own, but its arguments."""
    told = f"{process.name()} {' '.join(process.cmdline())}"
    if process.name().startswith("flwr-") or process.name().startswith("flower-"):
        told = process.name()
    return next((name for sign, name in KINDS.items() if sign in told), "other")


class Watcher:
    """Samples some processes, and all that they start, in a thread until the end of a `with` block."""

    def __init__(self, roots: Iterable[int], interval: float, current_round: Callable[[], int] = lambda: 0) -> None:
        """`roots` are process ids; `interval` is in seconds, from the end of a sample to the next."""
        self.roots, self.interval, self.current_round = list(roots), interval, current_round
        self.samples: list[Sample] = []
        self.peaks: dict[str, float] = {}  # MB: the largest that a single process of a kind has ever been
        self.cpu: dict[tuple[int, float], tuple[str, float]] = {}  # of each process, also of those that have ended
        self.ended = Event()
        self.thread = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watcher":
        self.started = time.perf_counter()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.ended.is_set():
            self.samples.append(self._sample())
            self.ended.wait(self.interval)

    def _sample(self) -> Sample:
        sample: Sample = {"seconds": time.perf_counter() - self.started, "round": self.current_round()}
        for process in self._processes():
            with suppress(psutil.Error, OSError):  # it has ended meanwhile
                self._add(process, sample)
        for name, spent in self.cpu.values():
            if name in sample:
                sample[name]["cpu"] += spent
        return sample

    def _processes(self) -> list[psutil.Process]:
        found = []
        for root in self.roots:
            with suppress(psutil.Error):
                found += [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        return found

    def _add(self, process: psutil.Process, sample: Sample) -> None:
        identity = process.pid, process.create_time()
        name = kind(process)
        memory, spent = process.memory_full_info().pss / MB, sum(process.cpu_times()[:2])
        self.cpu[identity] = name, spent
        entry = sample.setdefault(name, {"pss": 0.0, "cpu": 0.0})
        entry["pss"] += memory
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak(process.pid))

    # ------------------------------------------------------------------------------------------------------ results

    def peak_sum(self) -> float:
        """Return the peak of the sum over all processes, in MB of proportional set size."""
        return max((sum(e["pss"] for e in entries(sample).values()) for sample in self.samples), default=0.0)

    def peak_of(self) -> dict[str, float]:
        """Return the peak of the sum over the processes of each kind, in MB of proportional set size."""
        held = ((name, [one[name]["pss"] for one in self.samples if name in one]) for name in self.kinds_seen())
        return {name: max(values) for name, values in held}

    def series(self, name: str, value: str, first: int = 1) -> Points:
        """Return the round and a value of a kind of processes in each sample from a round on."""
        found = [one for one in self.samples if one["round"] >= first and name in one]
        return [(one["round"], one[name][value]) for one in found]

    def kinds_seen(self) -> list[str]:
        return sorted({name for sample in self.samples for name in entries(sample)})


def entries(sample: Sample) -> dict[str, dict[str, float]]:
    """Return what a sample says, by kind of process."""
    return {name: value for name, value in sample.items() if name not in ("seconds", "round")}


def peak(pid: int) -> float:
    """Return the largest resident set size that a process has ever had, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / MB for line in lines if line.startswith("VmHWM")), 0.0)


def slope(points: Points) -> float:
    """Return the slope of the straight line through points, by the median of all pairs' slopes (Theil and Sen).

    A few points that are far from the line, such as peaks within a round, do not change it.
    """
    pairs = [(a, b) for place, a in enumerate(points) for b in points[place + 1 :] if b[0] != a[0]]
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs) if pairs else 0.0
