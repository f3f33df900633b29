"""Checks of free memory and disk space before a computation starts."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_jax.core.errors import UsageError


def gib(count: int) -> str:
    """A number of bytes as text: 1.5 GiB, 300 MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def free_memory() -> int | None:
    """Bytes of host memory that this process can still allocate; None on systems other than Linux.

    The smaller of the machine's available memory and what the process's control group leaves. The page cache counts as free,
    since the system drops it on demand.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (most := limit.read_text().strip()).isdecimal():
        held = int(used.read_text()) - _cached_files(limit.with_name("memory.stat"))
        free = min(free, max(0, int(most) - held))
    return free


def _cached_files(stat: Path) -> int:
    """Bytes of a control group's memory that are page cache."""
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raises UsageError if fewer than `needed` bytes of host memory are free. what: the subject of the sentence."""
    free = free_memory()
    if free is not None and needed > free:
        raise UsageError(f"{what} needs at least {gib(needed)} of memory, and {gib(free)} are free; {remedy}")


def check_devices(devices: Sequence[Any], needed: int, what: str, remedy: str) -> None:
    """Raises UsageError if one of this process's devices has fewer than `needed` bytes free, where it reports them.

    CPU devices share the host's memory, so that each of them adds to what is needed there.
    """
    if devices[0].platform == "cpu":
        check_memory(needed * len(devices), what, remedy)
        return
    for device in devices:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats and needed > (free := stats["bytes_limit"] - stats.get("bytes_in_use", 0)):
            has = f"{gib(needed)} of memory on each device, and {gib(free)} are free on {device}"
            raise UsageError(f"{what} needs at least {has}; {remedy}")


def check_disk(folder: os.PathLike | str, needed: int, what: str, remedy: str) -> None:
    """Raises UsageError if fewer than `needed` bytes are free on the folder's disk (its nearest parent, if it does not exist)."""
    if "://" in str(folder):
        return
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(f"{what} needs {gib(needed)} on the disk, and {gib(free)} are free in {there}; {remedy}")
