"""Prints what a bug report needs: ddpm-jax env

JAX is imported last, since an installation in which that fails is reported too.
"""

import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_jax.core.errors import first_line
from ddpm_jax.core.version import __version__

SETTINGS = ("CUDA_VISIBLE_DEVICES", "DDPM_JAX_", "JAX_", "LIBTPU_", "NCCL_", "TF_CPP_", "TFDS_", "TPU_", "XLA_")
BESIDE = ("jax", "nvidia", "libtpu")  # packages that those we ask for bring, and that decide what a device does


def versions() -> dict[str, str]:
    """The installed packages that ours asks for, and those of JAX."""
    try:
        lines = importlib.metadata.requires("ddpm-jax") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = []
    asked = {_spelled(re.split(r"[^\w.-]", line)[0]) for line in lines}
    found = {_spelled(d.name): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in sorted(found) if name in asked or name.startswith(BESIDE)}


def _spelled(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def facts() -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which they are printed."""
    yield "ddpm-jax", f"{__version__} in {Path(__file__).parent.parent}"
    yield "python", f"{platform.python_version()} in {sys.executable}"
    yield "system", f"{platform.platform()}, {os.cpu_count()} cores"
    yield "packages", ", ".join(f"{name} {version}" for name, version in versions().items())
    for name in sorted(os.environ):
        if name.startswith(SETTINGS):
            yield name, os.environ[name]
    try:
        import jax

        from ddpm_jax.core.provenance import processor

        yield "processor", processor()
        device = jax.devices()[0]
        about = " ".join(device.client.platform_version.split())
        yield "devices", f"{jax.device_count()} {device.device_kind}, {device.platform}, {about}"
    except Exception as error:  # a broken installation raises almost anything
        yield "devices", f"none, since JAX does not start: {first_line(error)}"


def main(arguments: Any) -> None:
    """Prints them."""
    for name, value in facts():
        print(f"{name}: {value}", flush=True)
