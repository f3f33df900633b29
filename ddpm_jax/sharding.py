"""How a run lies on its devices: the mesh, the shardings of state and batch, and starting several processes.

The mesh has two axes: `data`, over which batches are split, and `fsdp`, over which batches and big arrays of the state are.
The layout changes where numbers are computed, never which.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

BATCH_AXES = ("data", "fsdp")


def start_processes() -> None:
    """Joins the processes of a multi-host run: `jax.distributed.initialize()`.

    It detects TPU pods, GKE and Slurm; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    Call it before anything else of JAX.
    """
    jax.distributed.initialize()


def make_mesh(*, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """All devices (or the given ones) as a mesh of axes (data, fsdp). Raises ValueError if fsdp does not divide them."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise ValueError(f"got fsdp={fsdp} with {len(devices)} devices, expected a divisor of their number")
    # Auto axes: with the default Explicit ones Linen's table look-ups and dropout have no sharding rule.
    return Mesh(np.array(devices).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """The given axis, a batch of images, is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """The sharding of each array of a state (arrays or ShapeDtypeStructs): replicated, or its last axis that the fsdp axis
    divides split over it, where it has at least 2**16 entries (smaller ones cost more to gather than to hold).
    """
    size = mesh.shape["fsdp"]

    def one(leaf):
        if size > 1 and leaf.size >= 2**16:
            for axis in reversed(range(leaf.ndim)):
                if leaf.shape[axis] % size == 0:
                    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))
        return replicated(mesh)

    return jax.tree.map(one, state)
