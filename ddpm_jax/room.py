"""What a computation needs of memory and disk, said before it is begun: "this needs N bytes, there are M"."""

import os
import shutil
from pathlib import Path

from ddpm_jax.errors import UsageError


def gib(count: int) -> str:
    """A number of bytes as a person reads it: 1.5 GiB, 300 MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def free_memory() -> int | None:
    """Bytes of memory that this process may still take of the host, or None where the system does not tell (not Linux).

    The least of what the machine has available and what the process's control group leaves, to which the system's cache of
    files counts as free: it gives way.
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
    """Bytes of a control group's memory that are files' content only."""
    counts = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    return sum(int(counts.get(name, 0)) for name in ("active_file", "inactive_file"))


def check_memory(needed: int, what: str, remedy: str) -> None:
    """Raises UsageError where `needed` bytes of host memory are not free. what: the subject of the sentence."""
    free = free_memory()
    if free is not None and needed > free:
        raise UsageError(f"{what} needs at least {gib(needed)} of memory, and {gib(free)} are free; {remedy}")


def check_disk(folder: os.PathLike | str, needed: int, what: str, remedy: str) -> None:
    """Raises UsageError where `needed` bytes are not free on the disk of the folder, or of its nearest parent that exists."""
    if "://" in str(folder):
        return
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(f"{what} needs {gib(needed)} on the disk, and {gib(free)} are free in {there}; {remedy}")
