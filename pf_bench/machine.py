"""The machine: what it is, who else uses it, how its allocator is set, how much memory a process holds."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import time
from pathlib import Path

__all__ = [
    "MALLOC",
    "QUIET",
    "Load",
    "Patience",
    "describe",
    "forget_peak",
    "memory",
    "release",
    "versions",
]

QUIET = 0.05  # share of the machine that others may use before a measurement counts as disturbed
WINDOW = 0.5  # seconds over which the load of others is looked at
# glibc gives large blocks back to the system on every free, and each new one is then paid for in page faults.
LARGE = str(1 << 36)
MALLOC = {
    "tuned": {"MALLOC_MMAP_THRESHOLD_": LARGE, "MALLOC_TRIM_THRESHOLD_": LARGE},
    "default": {},
    # Everything large goes back at once, so that the resident size is what is in use: for memory only, never for times.
    "exact": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
}
PACKAGES = (
    *("numpy", "scipy", "jax", "jaxlib", "flax", "torch"),
    *("geomloss", "pykeops", "pertpy", "scperturb", "scvi-tools", "scikit-learn", "anndata"),
)
_STAT, _STATUS, _CLEAR = Path("/proc/stat"), Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Load:
    """What others used of the processors since the last look, from the system's counters of 10 ms."""

    def __init__(self) -> None:
        self._last = _counters()

    def others(self) -> float | None:
        """Share of all processors, 0 to 1, including time stolen by the host; None where the system does not say."""
        before, self._last = self._last, _counters()
        if before is None or self._last is None:
            return None
        busy, total, own = (after - start for after, start in zip(self._last, before, strict=True))
        return min(1.0, max(0.0, (busy - own) / total)) if total > 0 else 0.0


def _counters() -> tuple[float, float, float] | None:
    """Busy, total and own processor seconds."""
    if not _STAT.exists():
        return None
    ticks = [int(value) for value in _STAT.read_text().splitlines()[0].split()[1:9]]
    user, nice, system, idle, wait, interrupts, soft, stolen = ticks
    busy = user + nice + system + interrupts + soft + stolen
    unit = os.sysconf("SC_CLK_TCK")
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return busy / unit, (busy + idle + wait) / unit, own


class Patience:
    """Waits for a quiet machine, for a limited time in all."""

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self.waited = 0.0

    def wait(self) -> bool:
        """Whether others left the machine alone for a moment; False when the time is used up before they did."""
        while True:
            load, begin = Load(), time.perf_counter()
            time.sleep(min(WINDOW, max(self.left, 0.02)))
            share = load.others()
            if share is None or share <= QUIET:
                return True
            spent = time.perf_counter() - begin
            self.left, self.waited = self.left - spent, self.waited + spent
            if self.left <= 0:
                return False


def memory() -> tuple[int, int] | None:
    """Resident bytes now, and at their peak; None where the system does not say."""
    if not _STATUS.exists():
        return None
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    now, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, peak


def forget_peak() -> bool:
    """Set the peak back to what is resident now; False where the system does not let us."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def release() -> None:
    """Give back to the system what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: what is free stays, and counts as held before
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def versions() -> dict[str, str]:
    """Versions of Python and of what is measured, where installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe() -> dict[str, str]:
    """Processor, cores, memory and system, without the machine's name."""
    info = Path("/proc/cpuinfo")
    model = platform.processor() or platform.machine()
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    return {
        "processor": model,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{pages / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }
