"""Compiling for TPUs that are not present: memory, FLOPs and collectives of the programs on each chip of a topology.

The compiler is the package libtpu (extra `tpu`). It needs no TPU and no driver.
"""

import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from ddpm_jax.benchmark.cycles import cycles, products
from ddpm_jax.benchmark.hlo import ARRAY
from ddpm_jax.benchmark.programs import Row, image_shapes, memory
from ddpm_jax.benchmark.timing import peak_tflops
from ddpm_jax.benchmark.traffic import traffic
from ddpm_jax.config import check
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, first_line
from ddpm_jax.generation.generator import make_generator, sample_key
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.generation.starts import build_sampler
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import abstract_state, make_train_step

COLLECTIVES = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
)
COLUMNS = {
    "what": ("what", ""),
    "steps": ("steps", "d"),
    "batch": ("batch", "d"),
    "dtype": ("dtype", ""),
    "devices": ("chips", "d"),
    "compile_s": ("compile s", ".0f"),
    "memory_mib": ("MiB a chip", ".0f"),
    "of_hbm": ("of HBM", ".0%"),
    "gflops": ("GFLOP a chip and step", ".1f"),
    "arithmetic_ms": ("arithmetic ms", ".2f"),
    "traffic_gb": ("GB to and from HBM", ".2f"),
    "memory_ms": ("memory ms", ".2f"),
    "bound_by": ("bound by", ""),
    "expected_ms": ("compiler's ms", ".2f"),
    "collectives": ("collectives", ""),
}


class Chip(NamedTuple):
    """What bounds a TPU chip beside its peak TFLOP/s: HBM in GiB and GB/s, from the vendor, and FLOPs in a cycle of the compiler.

    libtpu expects 117, 127, 252 and 456 thousand FLOPs a cycle of one product of 4,096 x 4,096 matrices, in the order below.
    """

    hbm_gib: int
    hbm_gb_per_s: float
    flops_per_cycle: int


CHIPS = {
    "TPU v4": Chip(32, 1228.0, 131_072),
    "TPU v5 lite": Chip(16, 819.0, 131_072),
    "TPU v5": Chip(95, 2765.0, 262_144),
    "TPU v6 lite": Chip(32, 1640.0, 524_288),
}


class Collective(NamedTuple):
    """A collective instruction of a compiled program: its kind, the bytes of its result on a device, and its arrays."""

    kind: str
    bytes: int
    arrays: int


# %all-reduce.1 = (f32[3,3]{1,0:T(8,128)}, f32[]) all-reduce(%a, %b), ...; an asynchronous one has a -start and a -done.
_INSTRUCTION = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>\S.*?) (?P<kind>{COLLECTIVES})(?P<start>-start)?\(", re.MULTILINE
)


def collectives(hlo: str) -> list[Collective]:
    """Every collective of a program's HLO text, in order; one inside a loop counts once."""
    found = []
    for match in _INSTRUCTION.finditer(hlo):
        sizes = [
            math.prod(int(n) for n in array["shape"].split(",") if n) * int(array["bits"] or 8) // 8
            for array in ARRAY.finditer(match["type"])
        ]
        if match["start"] and match["kind"] != "all-reduce":  # their type lists the operands before the results
            count = 1 if match["kind"] == "collective-permute" else len(sizes) // 2
            sizes = sizes[count : 2 * count]
        found.append(Collective(match["kind"], sum(sizes), len(sizes)))
    return found


def tell(found: Iterable[Collective]) -> str:
    """2 all-reduce of 142,985,229 B; 1 all-gather of 3,072 B"""
    found = list(found)
    counts = Counter(c.kind for c in found)
    totals = {kind: sum(c.bytes for c in found if c.kind == kind) for kind in counts}
    return "; ".join(f"{n} {kind} of {totals[kind]:,} B" for kind, n in counts.items()) or "none"


def describe_topology(name: str) -> list[jax.Device]:
    """The devices of a TPU topology such as v5e:2x4, for compiling. Raises UsageError without libtpu or for another name."""
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError("--compile-for needs libtpu, the TPU compiler; install it: pip install -e '.[tpu]'")
    # Without these, libtpu queries the machine's metadata server, and refuses to start twice on one machine.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises several types for a wrong name
        raise UsageError(
            f"--compile-for {name} cannot be compiled for; libtpu says: {first_line(error)}; "
            "give a topology such as v5e:2x4, v4:2x2x1 or v5p:2x2x2"
        ) from None


def compile_training(experiment: Experiment, devices: list[jax.Device]) -> Row:
    """Compiles train.py's program for images from the host: train.steps_per_dispatch steps of train.batch_size images."""
    config = experiment.config
    check(config, num_devices=len(devices))
    mesh = sharding.make_mesh(fsdp=config.train.fsdp, devices=devices)
    state = abstract_state(experiment)
    steps = config.train.steps_per_dispatch
    labels = {"what": "train step", "steps": steps, "batch": config.train.batch_size, "dtype": config.model.dtype}
    labels["gradient_bytes"] = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.params))
    return labels | _compile(make_train_step(experiment, mesh=mesh), mesh, state, image_shapes(experiment, steps), None)


def compile_sampling(experiment: Experiment, options: SamplerOptions, batch: int, devices: list[jax.Device]) -> Row:
    """Compiles sample.py's program for a batch size that the devices divide."""
    mesh, rows = sharding.make_mesh(devices=devices), len(build_sampler(experiment.process, options))
    params = abstract_state(experiment).params
    everywhere = sharding.replicated(mesh)
    arguments = (params, jax.eval_shape(lambda: sample_key(0)), jax.ShapeDtypeStruct((batch,), jnp.int32))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), arguments)
    labels = {"what": options.sampler, "steps": rows, "batch": batch, "dtype": experiment.config.model.dtype}
    return labels | _compile(make_generator(experiment, mesh, options), mesh, *shapes)


def _compile(function: Any, mesh: Mesh, *arguments: Any) -> Row:
    start, device = time.perf_counter(), mesh.devices.flat[0]
    row: Row = {"devices": mesh.devices.size}
    try:
        compiled = function.trace(*arguments).lower(lowering_platforms=(device.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        too_much = re.search(r"Used \S+ of \S+ hbm", str(error))
        if not too_much:
            raise
        return row | {"compile_s": time.perf_counter() - start, "bound_by": f"does not fit: {too_much[0]}"}
    seconds, hlo = time.perf_counter() - start, compiled.as_text()
    found = collectives(hlo)
    gflops = compiled.cost_analysis()["flops"] / 1e9  # of one step: the loop's body counts once
    row |= memory(compiled) | {
        "compile_s": seconds,
        "gflops": gflops,
        "collectives": tell(found),
        "each_collective": [c._asdict() for c in found],
    }
    return row | roofline(row, hlo, device)


def roofline(row: Row, hlo: str, device: jax.Device) -> Row:
    """The least time of a step by its arithmetic and by its bytes of HBM, each at the chip's peak, and which is longer.

    Beside them the time that the compiler expects, which says how near to these the kernels come that it has found.
    """
    chip, peak = CHIPS.get(device.device_kind), peak_tflops(device, "bfloat16")
    if chip is None or peak is None:
        return {}
    parts, expected = traffic(hlo), cycles(hlo)
    gb, per_ms = sum(parts.values()) / 1e9, peak * 1e9 / chip.flops_per_cycle
    arithmetic, moved = row["gflops"] / peak, 1e3 * gb / chip.hbm_gb_per_s
    found: Row = {
        "arithmetic_ms": arithmetic,
        "traffic_gb": gb,
        "traffic_bytes": parts,
        "memory_ms": moved,
        "bound_by": "arithmetic" if arithmetic > moved else "memory",
        "expected_ms_by_part": {part: count / per_ms for part, count in expected.items()},
        "products": [one._asdict() | {"of_peak": one.gflops / peak / (one.cycles / per_ms)} for one in products(hlo)],
    }
    if expected:
        found["expected_ms"] = sum(expected.values()) / per_ms
    if "memory_mib" in row:
        found["of_hbm"] = row["memory_mib"] / 1024 / chip.hbm_gib
    return found


def tell_parts(row: Row, largest: int = 8) -> str:
    """train step, 8 chips: convolutions: 0.44 GB, 3.10 ms; ...: bytes of HBM and the compiler's time by part, where known."""
    parts, expected = row.get("traffic_bytes", {}), row.get("expected_ms_by_part", {})
    names = sorted({**parts, **expected}, key=lambda name: (-expected.get(name, 0.0), -parts.get(name, 0)))

    def said(some: list[str]) -> str:
        gb, ms = sum(parts.get(name, 0) for name in some) / 1e9, sum(expected.get(name, 0.0) for name in some)
        return f"{gb:.2f} GB" + (f", {ms:.2f} ms" if expected else "")

    told = [f"{name}: {said([name])}" for name in names[:largest]]
    told += [f"other: {said(names[largest:])}"] if names[largest:] else []
    return f"{row['what']}, {row['devices']} chips: {'; '.join(told)}" if told else ""
