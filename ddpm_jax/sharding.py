"""How a run lies on its devices: the mesh, the shardings of state and batch, and starting several processes.

The mesh has two axes: `data`, over which batches are split, and `fsdp`, over which batches and big arrays of the state are.
The layout changes where numbers are computed, never which.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax import peers
from ddpm_jax.errors import RunError, UsageError, first_line

HEARTBEAT_SECONDS = 40  # after which a process that is silent counts as gone
BATCH_AXES = ("data", "fsdp")


def start_processes(*, timeout: float = 300.0) -> None:
    """Joins the processes of a multi-host run: `jax.distributed.initialize()`. Call it before anything else of JAX.

    It detects TPU pods, GKE and Slurm; elsewhere it takes the environment's JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Raises UsageError if neither says which processes there are. timeout: seconds after which a process whose
    others have not come ends.
    """
    address, count, index = (
        os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    )
    at = f" at {address}" if address else ""
    whom = f"the other processes of this run{at}" if index == "0" or not index else f"process 0 of this run{at}"
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        processes, process = (int(number) if number else None for number in (count, index))
        peers.listen()
        with peers.patience(whom, seconds=timeout):
            jax.distributed.initialize(
                address,
                processes,
                process,
                initialization_timeout=int(timeout) + 60,  # ours comes first: JAX's ends in an abort
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the processes of this run cannot be joined ({first_line(error)}); outside of TPU pods, GKE and Slurm set "
            "JAX_COORDINATOR_ADDRESS (process 0's host and a free port), JAX_NUM_PROCESSES and JAX_PROCESS_ID for each, or "
            "leave out --distributed"
        ) from None
    # Gloo connects at the first computation together, and gives up after 30 s: here, where all have just come.
    multihost_utils.sync_global_devices("joined")
    peers.others[:] = [i for i in range(jax.process_count()) if i != jax.process_index()]


def first_decides(decide: Callable[[], int]) -> int:
    """What `decide` returns on the first process, on all of them; so files are looked at and written by one.

    An error there is raised there, and on the others a UsageError or RunError that says so.
    """
    if jax.process_count() == 1:
        return decide()
    value: int = 0
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            value = decide()
        except Exception as problem:  # whatever it is: the others wait
            error = problem
    kind = 0 if error is None else 1 if isinstance(error, UsageError) else 2
    told = np.array([value, kind], np.int32)  # one type on all processes, also where decide gives a bool
    value, kind = multihost_utils.broadcast_one_to_all(told).tolist()
    if error is not None:
        raise error
    if kind:
        raise (UsageError if kind == 1 else RunError)("the first process has stopped; its message says why")
    return value


def first_reads(path: epath.Path) -> bytes | None:
    """A file's content as the first process finds it, or None if no file is there: the same on all, which must all ask."""
    content = b""

    def look() -> int:
        nonlocal content
        try:
            content = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return -1
        return len(content)

    size = first_decides(look)
    if size > 0 and jax.process_count() > 1:
        content = multihost_utils.broadcast_one_to_all(np.frombuffer(content or bytes(size), np.uint8)).tobytes()
    return None if size < 0 else content


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process: the same answer on all of them, which must all ask."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def make_mesh(*, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """All devices (or the given ones) as a mesh of axes (data, fsdp). Raises ValueError if fsdp does not divide them."""
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise ValueError(f"got fsdp={fsdp} with {len(devices)} devices, expected a divisor of their number")
    # Auto axes: with the default Explicit ones Linen's table look-ups and dropout have no sharding rule.
    return Mesh(np.array(devices).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


def round_up(count: int, mesh: Mesh) -> int:
    """The least multiple of the mesh's devices that is not below a number of images."""
    return -(-count // mesh.devices.size) * mesh.devices.size


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
