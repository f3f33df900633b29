"""Devices and processes: the mesh, the shardings of state and batch, and broadcasts from process 0.

The mesh has two axes, `data` and `fsdp`. Batches are split over both, large arrays of the state over `fsdp`. The layout changes
where numbers are computed, never which.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddpm_jax.core import peers
from ddpm_jax.core.errors import RunError, UsageError, first_line

HEARTBEAT_SECONDS = 40  # a process that is silent for longer counts as gone
BATCH_AXES = ("data", "fsdp")


def start_processes(*, timeout: float = 300.0) -> None:
    """Joins the processes of a multi-host run by `jax.distributed.initialize()`. Call it before anything else of JAX.

    It detects TPU pods, GKE and Slurm. Elsewhere it reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
        timeout: Seconds to wait for the other processes; then this one ends.

    Raises:
        UsageError: If the processes are neither detected nor given.
    """
    address, count, index = (
        os.environ.get(f"JAX_{name}") for name in ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    )
    at = f" at {address}" if address else ""
    whom = f"the other processes of this run{at}" if index == "0" or not index else f"process 0 of this run{at}"
    jax.config.update("jax_enable_preemption_service", False)  # its handler would replace ours for SIGTERM
    try:
        processes, process = (int(number) if number else None for number in (count, index))
        peers.listen()
        with peers.patience(whom, seconds=timeout):
            jax.distributed.initialize(
                address,
                processes,
                process,
                initialization_timeout=int(timeout) + 60,  # later than ours, since JAX's timeout aborts the process
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        raise UsageError(
            f"the processes of this run cannot be joined ({first_line(error)}); outside of TPU pods, GKE and Slurm set "
            "JAX_COORDINATOR_ADDRESS (process 0's host and a free port), JAX_NUM_PROCESSES and JAX_PROCESS_ID for each, or "
            "leave out --distributed"
        ) from None
    # Gloo connects at the first collective and gives up after 30 s. Connect now, while all processes are here.
    multihost_utils.sync_global_devices("joined")
    peers.others[:] = [i for i in range(jax.process_count()) if i != jax.process_index()]


def first_decides(decide: Callable[[], int | None]) -> int:
    """Runs `decide` on process 0 and broadcasts the result, so that only one process reads and writes files. None is 0.

    If `decide` raises, process 0 raises its error, and the others raise a UsageError or RunError. All processes must call it.
    """
    if jax.process_count() == 1:
        return decide() or 0
    value: int = 0
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            value = decide() or 0
        except Exception as problem:  # any error must reach the others, which wait for the broadcast
            error = problem
    kind = 0 if error is None else 1 if isinstance(error, UsageError) else 2
    told = np.array([value, kind], np.int32)  # `decide` may return a bool; the broadcast needs one type
    value, kind = multihost_utils.broadcast_one_to_all(told).tolist()
    if error is not None:
        raise error
    if kind:
        raise (UsageError if kind == 1 else RunError)("the first process has stopped; its message says why")
    return value


def first_gives(give: Callable[[], bytes | None]) -> bytes | None:
    """Runs `give` on process 0 and broadcasts its bytes, or None. Raises as `first_decides`. All processes must call it."""
    content: bytes | None = None

    def size() -> int:
        nonlocal content
        content = give()
        return -1 if content is None else len(content)

    length = first_decides(size)
    if length > 0 and jax.process_count() > 1:
        content = multihost_utils.broadcast_one_to_all(np.frombuffer(content or bytes(length), np.uint8)).tobytes()
    return None if length < 0 else content or b""


def first_reads(path: epath.Path) -> bytes | None:
    """Reads a file on process 0 and broadcasts its content; None if there is no file. All processes must call it."""

    def read() -> bytes | None:
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            return None

    return first_gives(read)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process. All processes must call it."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises UsageError on all processes if one has other facts than process 0: its command or its data, say.

    facts: values of JSON by name, which may be nested. All processes must call it.
    """
    if jax.process_count() == 1:
        return
    ours = json.dumps(facts, default=str)
    theirs = first_gives(ours.encode) or b"{}"
    a, b = (flatten_dict(json.loads(side), sep=".") for side in (theirs, ours))
    told = {name: [repr(side[name]) if name in side else "nothing" for side in (a, b)] for name in {**a, **b}}
    different = [f"{name} (there {there}, here {here})" for name, (there, here) in told.items() if there != here]
    if any_process(bool(different)):
        raise UsageError(
            f"this process differs from process 0 in {', '.join(different)}; start the same command with the same data on each"
            if different
            else "another process differs from the first one; its message says in what"
        )


def make_mesh(*, fsdp: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a run, with the axes (data, fsdp).

    Args:
        fsdp: Size of the fsdp axis.
        devices: Devices of the mesh; default all.

    Returns:
        The mesh.

    Raises:
        ValueError: If fsdp does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) % fsdp:
        raise ValueError(f"got fsdp={fsdp} with {len(devices)} devices, expected a divisor of their number")
    # Auto axes: Linen's table look-ups and dropout have no sharding rule for the default Explicit ones.
    return Mesh(np.array(devices).reshape(-1, fsdp), BATCH_AXES, axis_types=(AxisType.Auto, AxisType.Auto))


_YNNPACK = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def _accepted(options: tuple[tuple[str, str], ...]) -> bool:
    """Whether the installed XLA knows these options."""
    try:
        jax.jit(lambda: 0, compiler_options=dict(options)).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """XLA's options for a program that runs the network on these devices.

    On CPU, XLA gives what is listed to YNNPACK. By default that is convolutions too, which are faster without it: training by a
    twentieth to a third, sampling by up to a quarter. An XLA that does not know the option does as it does by default.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return _YNNPACK if on_cpu and _accepted(tuple(_YNNPACK.items())) else None


def jit_replicated(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`jax.jit` of a function (params, ...) that runs the network, with its results on every device of the mesh."""

    @functools.wraps(function)
    def with_whole(params, *args, **kwargs):
        return function(whole(params, mesh), *args, **kwargs)

    return jax.jit(with_whole, out_shardings=replicated(mesh), compiler_options=compiler_options(mesh))


def round_up(count: int, num_devices: int) -> int:
    """The least multiple of num_devices that is at least count, so that every device gets as many images."""
    return -(-count // num_devices) * num_devices


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that replicates an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh, *, axis: int = 0) -> NamedSharding:
    """The sharding that splits one axis, the batch, over all devices."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH_AXES))


def state_sharding(mesh: Mesh, state: Any) -> Any:
    """The sharding of each array of a state (arrays or ShapeDtypeStructs).

    An array of at least 2**16 entries is split over the fsdp axis, along its last axis that fsdp divides. Smaller arrays are
    replicated, since gathering them costs more than holding them.
    """
    size = mesh.shape["fsdp"]

    def one(leaf):
        if size > 1 and leaf.size >= 2**16:
            for axis in reversed(range(leaf.ndim)):
                if leaf.shape[axis] % size == 0:
                    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))
        return replicated(mesh)

    return jax.tree.map(one, state)


def whole(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays of a state inside a compiled program, gathered on every device if fsdp splits them.

    Left to itself, XLA splits the network along the axes that its parameters are split along, and moves images instead.
    """
    if mesh is None or mesh.shape["fsdp"] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, replicated(mesh))


def scattered(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays like those of a state inside a compiled program, such as gradients, split as `state_sharding` says."""
    if mesh is None or mesh.shape["fsdp"] == 1:
        return tree
    return jax.lax.with_sharding_constraint(tree, state_sharding(mesh, tree))


def to_host(tree: Any) -> Any:
    """The arrays of a tree as NumPy arrays, each whole on every process. All processes must call it."""

    def one(array):
        whole = array.is_fully_addressable or array.is_fully_replicated
        return np.asarray(array if whole else multihost_utils.process_allgather(array, tiled=True))

    return jax.tree.map(one, tree)
