"""What a benchmark ran on: processor, devices, versions, threads, and who else was at work."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn", "econml"),
    *("torch", "tabpfn", "tabicl", "causalpfn"),
)
# What sets the number of threads of the libraries that take part.
_THREAD_SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "XLA_FLAGS")


def cores() -> int:
    """Processor cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Processor, memory, devices, versions and thread settings, as plain values."""
    import jax

    devices = jax.devices()
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "processor": _processor(),
        "cores": cores(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "devices": f"{len(devices)} {devices[0].platform} ({devices[0].device_kind})",
        "python": platform.python_version(),
        "versions": versions,
        "threads": {name: os.environ.get(name, "not set") for name in _THREAD_SETTINGS},
    }


class Load:
    """Processor time that others take on this machine, from its creation on; Linux only."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy_seconds(), _own_seconds()

    def of_others(self) -> float | None:
        """Cores that other processes, and other guests of the host, have kept busy on average.

        Child processes count as others until they have been waited for.
        """
        clock, busy, own = self._start
        busy_now = _busy_seconds()
        if busy is None or busy_now is None:
            return None
        seconds = time.perf_counter() - clock
        return max(0.0, (busy_now - busy - (_own_seconds() - own)) / seconds)


def _own_seconds() -> float:
    return sum(os.times()[:4])


def _busy_seconds() -> float | None:
    """Seconds that all cores together have not been idle since the machine started."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _wait, *others = map(int, fields)
    return (user + nice + system + sum(others)) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
