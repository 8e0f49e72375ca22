"""What the processes of a run use while it lasts: memory and CPU time, by kind of process."""

import statistics
import time
from collections.abc import Iterable
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
Sample = dict[str, Any]  # "seconds" since the start, and by kind: "count", "pss" and "largest" in MB, "cpu" in seconds


def kind(process: psutil.Process) -> str:
    """Return what a process is. A child that is forked from a fork server has a name of its own, but its arguments."""
    told = f"{process.name()} {' '.join(process.cmdline())}"
    if process.name().startswith("flwr-") or process.name().startswith("flower-"):
        told = process.name()
    return next((name for sign, name in KINDS.items() if sign in told), "other")


class Watcher:
    """Samples some processes, and all that they start, in a thread until the end of a `with` block."""

    def __init__(self, roots: Iterable[int], interval: float) -> None:
        """`roots` are process ids; `interval` is in seconds, from the end of a sample to the next."""
        self.roots, self.interval = list(roots), interval
        self.samples: list[Sample] = []
        self.peaks: dict[str, float] = {}  # MB: the largest that a single process of a kind has ever been
        self.cpu: dict[tuple[int, float], tuple[str, float]] = {}  # of each process, also of those that have ended
        self.kinds: dict[tuple[int, float], str] = {}
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
        sample: Sample = {"seconds": round(time.perf_counter() - self.started, 2)}
        for process in self._processes():
            with suppress(psutil.Error, OSError):  # it has ended meanwhile
                self._add(process, sample)
        for name, spent in self.cpu.values():
            if name in sample:
                sample[name]["cpu"] = sample[name].get("cpu", 0.0) + spent
        return sample

    def _processes(self) -> list[psutil.Process]:
        found = []
        for root in self.roots:
            with suppress(psutil.Error):
                found += [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
        return found

    def _add(self, process: psutil.Process, sample: Sample) -> None:
        identity = process.pid, process.create_time()
        name = self._kind(identity, process)
        memory, spent = process.memory_full_info().pss / MB, sum(process.cpu_times()[:2])
        self.cpu[identity] = name, spent
        entry = sample.setdefault(name, {"count": 0, "pss": 0.0, "largest": 0.0})
        entry |= {"count": entry["count"] + 1, "pss": entry["pss"] + memory, "largest": max(entry["largest"], memory)}
        self.peaks[name] = max(self.peaks.get(name, 0.0), peak(process.pid))

    def _kind(self, identity: tuple[int, float], process: psutil.Process) -> str:
        """Return the kind of a process, which it gets soon after its start, and keeps."""
        name = self.kinds.get(identity) or kind(process)
        if name not in ("fork server", "other", "launchers"):
            self.kinds[identity] = name
        return name

    # ------------------------------------------------------------------------------------------------------ results

    def peak_sum(self) -> float:
        """Return the peak of the sum over all processes, in MB of proportional set size."""
        return max((sum(e["pss"] for e in entries(sample).values()) for sample in self.samples), default=0.0)

    def peak_of(self) -> dict[str, float]:
        """Return the peak of the sum over the processes of each kind, in MB of proportional set size."""
        names = {name for sample in self.samples for name in entries(sample)}
        return {name: max(entries(one).get(name, {}).get("pss", 0.0) for one in self.samples) for name in sorted(names)}

    def cpu_of(self) -> dict[str, float]:
        """Return the CPU seconds of each kind of process, without what a process used after its last sample."""
        used: dict[str, float] = {}
        for name, spent in self.cpu.values():
            used[name] = used.get(name, 0.0) + spent
        return used


def entries(sample: Sample) -> dict[str, dict[str, float]]:
    """Return what a sample says, by kind of process."""
    return {name: value for name, value in sample.items() if name != "seconds"}


def peak(pid: int) -> float:
    """Return the largest resident set size that a process has ever had, in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 / MB for line in lines if line.startswith("VmHWM")), 0.0)


def slope(points: list[tuple[float, float]]) -> float:
    """Return the slope of the straight line through points, by the median of all pairs' slopes (Theil and Sen).

    A few points that are far from the line, such as peaks within a round, do not change it.
    """
    pairs = [(a, b) for place, a in enumerate(points) for b in points[place + 1 :] if b[0] != a[0]]
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs) if pairs else 0.0
