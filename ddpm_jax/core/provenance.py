"""What a figure or a checkpoint was made with: the commit, the processor, the software and the devices."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from jax.sharding import Mesh

CHECKOUT = Path(__file__).parents[2]


def commit(checkout: Path = CHECKOUT) -> str:
    """The commit of a checkout, marked dirty if files have been changed since; empty if there is none, or no git."""
    if not (checkout / ".git").exists():
        return ""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def processor() -> str:
    """The name of the CPU; on Linux with its family and model, since one name may be of several that round differently."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    about = {key.strip(): value.strip() for key, found, value in (line.partition(":") for line in lines) if found}
    name = about.get("model name") or platform.processor() or platform.machine()
    return name + (f", family {about['cpu family']}, model {about['model']}" if "cpu family" in about else "")


def made_with(mesh: Mesh) -> dict[str, str]:
    """What a computation's last bits depend on: the versions of JAX and its compiler, the devices and their number."""
    device = mesh.devices.flat[0]
    kind = processor() if device.platform == "cpu" else device.device_kind
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return versions | {"devices": f"{mesh.devices.size} x {kind}"}
