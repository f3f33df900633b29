"""Timing calls, and reporting the results with the hardware and versions."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from ddpm_jax.core.provenance import commit, processor
from ddpm_jax.core.version import __version__

# Dense bfloat16 TFLOP/s of one device, from the vendors, by JAX's device_kind (some chips have two names).
# A device of TPU v2 and v3 is a core, half a chip.
PEAK_TFLOPS = {
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
    "NVIDIA L4": 121.0,
}


class Timing(NamedTuple):
    """Seconds of the first call, which warms up, and of its repeats."""

    warm_up: float
    repeats: list[float]

    @property
    def median(self) -> float:
        """The median of the repeats, in seconds."""
        return statistics.median(self.repeats)

    @property
    def spread(self) -> float:
        """The range of the repeats, as a share of the median."""
        return (max(self.repeats) - min(self.repeats)) / self.median


def take_turns(calls: Sequence[Callable[[], Any]], repeats: int) -> list[Timing]:
    """Times the calls in turn, so that other load on the machine affects all. Each call must wait for its result.

    What is measured comes first. Other versions' `benchmark/worker.py` puts its own function in this one's place, so name and
    arguments stay as they are.
    """

    def seconds(call):
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    rounds = [[seconds(call) for call in calls] for _ in range(1 + repeats)]
    return [Timing(first, list(rest)) for first, *rest in zip(*rounds, strict=True)]


def host_memory() -> int | None:
    """Bytes of anonymous memory of this process, without mapped files, whose pages the system can drop; None if not Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return kib[0] * 1024 if kib else None


def peak_tflops(device: jax.Device, dtype: str) -> float | None:
    """The device's peak in this dtype, or None if it is unknown.

    By JAX's defaults float32 runs in TF32 on GPUs, at half the peak of bfloat16, and in one bfloat16 pass on TPUs.
    """
    peak = PEAK_TFLOPS.get(device.device_kind)
    return peak and peak * (0.5 if dtype == "float32" and device.platform == "gpu" else 1.0)


def environment() -> dict[str, Any]:
    """The hardware and versions of a measurement."""
    names = ("jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "torch", "diffusers")
    versions = {"ddpm-jax": __version__}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # not installed
    checkout = commit()
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    } | ({"commit": checkout} if checkout else {})


def table(rows: Iterable[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> str:
    """Rows as an aligned text table. columns: key -> (heading, format); empty columns are left out."""
    rows = list(rows)
    used = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    lines = [[heading for heading, _ in used.values()]]
    for row in rows:
        lines.append([format(row[k], f) if row.get(k) is not None else "" for k, (_, f) in used.items()])
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
