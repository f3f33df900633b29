"""Measuring the compiled programs of sample.py and train.py, and the feed of batches.

Measurements are rows: dictionaries of plain values such as seconds, FLOPs and bytes.
"""

import dataclasses
import functools
import io
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from ddpm_jax.benchmark import trace
from ddpm_jax.benchmark.timing import Timing, host_memory, peak_tflops, take_turns
from ddpm_jax.config import Config, check
from ddpm_jax.core import sharding
from ddpm_jax.data import batch_indices, make_feed, open_source
from ddpm_jax.data.pictures import DecodedPictures, centre_box
from ddpm_jax.generation.generator import make_generator, sample_key
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.generation.starts import build_sampler
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import abstract_state, init_sharded_state, make_train_step, one_step

Row = dict[str, Any]
Peer = Callable[[], Any]  # runs the same work in another library and waits for it


class How(NamedTuple):
    """How programs are measured: timed runs, TFLOP/s of a device (None: the known ones), and the folder of profiles, if any."""

    repeats: int
    peak: float | None = None
    trace: str = ""


COLUMNS = {
    "what": ("what", ""),
    "device_gib": ("GiB", "d"),
    "steps": ("steps", "d"),
    "batch": ("batch", "d"),
    "dtype": ("dtype", ""),
    "devices": ("devices", "d"),
    "compile_s": ("compile s", ".1f"),
    "warm_up_s": ("warm-up s", ".3f"),
    "median_s": ("median s", ".4f"),
    "spread": ("spread", ".1%"),
    "ms_each": ("ms each", ".2f"),  # network evaluation, training step or batch
    "images_per_s": ("images/s", ".1f"),
    "tflops": ("TFLOP/s", ".3f"),
    "peak_share": ("of peak", ".1%"),
    "memory_mib": ("MiB a device", ".0f"),
    "host_mib": ("MiB of the host", ".0f"),
    "ratio_to_peer": ("time / peer's", ".2f"),
}


def network_flops(experiment: Experiment, batch: int) -> float:
    """FLOPs of one network evaluation of `batch` images, by XLA's cost analysis.

    It analyses the lowered program, since the compiled one calls libraries on GPUs, which the analysis may not count.
    """
    x = jax.ShapeDtypeStruct((batch, *experiment.image_shape), jnp.float32)
    params = abstract_state(experiment).params
    t = jax.ShapeDtypeStruct((batch,), jnp.int32)
    labels = 0 if experiment.num_classes else None
    return _flops(lambda params, x, t: experiment.model(params, labels=labels)(x, t), params, x, t)


def step_flops(experiment: Experiment) -> float:
    """FLOPs of one training step in theory: without rematerialisation, dropout or accumulation."""
    config = experiment.config
    model = dataclasses.replace(config.model, remat=False, dropout=0.0)
    plain = dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, accumulation=1))
    alone = Experiment.from_config(plain)
    return _flops(one_step(alone), abstract_state(alone), image_shapes(experiment))


def _flops(function: Callable[..., Any], *arguments: Any) -> float:
    analysis: Any = jax.jit(function).lower(*arguments).cost_analysis()
    return analysis["flops"]


def image_shapes(experiment: Experiment, *steps: int) -> Any:
    """The shapes of training batches: (*steps, B, H, W, C), as images are stored; with classes a pair of it and (*steps, B)."""
    shape = (*steps, experiment.config.train.batch_size)
    images = jax.ShapeDtypeStruct((*shape, *experiment.image_shape), experiment.pixels.dtype)
    return (images, jax.ShapeDtypeStruct(shape, jnp.int32)) if experiment.num_classes else images


def memory(compiled: Any) -> Row:
    """Bytes on each device that a compiled program needs; donated arguments count once."""
    m = compiled.memory_analysis()
    if m is None:
        return {}
    parts = {
        "arguments": m.argument_size_in_bytes,
        "results": m.output_size_in_bytes,
        "shared": m.alias_size_in_bytes,
        "temporaries": m.temp_size_in_bytes,
        "code": m.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["shared"]
    return {"memory_bytes": parts, "memory_mib": total / 2**20}


def compile_program(function: Any, *arguments: Any) -> tuple[Any, Row]:
    """Compiles a function; returns it and the cost: seconds and memory."""
    start = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    return compiled, {"compile_s": time.perf_counter() - start} | memory(compiled)


def _row(labels: Row, timing: Timing, *, times: int, images: int, flops: float = 0.0, peak: float | None = None) -> Row:
    """The row of a call of `times` evaluations, steps or batches on `images` images. peak: TFLOP/s of all devices."""
    row = labels | {
        "warm_up_s": timing.warm_up,
        "repeats_s": timing.repeats,
        "median_s": timing.median,
        "spread": timing.spread,
        "ms_each": 1e3 * timing.median / times,
        "images_per_s": images / timing.median,
    }
    if flops:
        row |= {"flops": flops, "tflops": flops / timing.median / 1e12}
        row |= {"peak_share": row["tflops"] / peak} if peak else {}
    return row


def _measure(labels: Row, call: Callable[[], Any], peer: Peer | None, mesh: Mesh, how: How, **work: Any) -> list[Row]:
    """The rows of a call and of its peer, timed alternately."""
    device = mesh.devices.flat[0]
    peak = how.peak or peak_tflops(device, labels["dtype"])
    ours, *theirs = take_turns([call] if peer is None else [call, peer], how.repeats)
    rows = [_row(labels | {"devices": mesh.devices.size}, ours, peak=peak and peak * mesh.devices.size, **work)]
    stats = device.memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        rows[0]["peak_bytes_so_far"] = stats["peak_bytes_in_use"]  # since the process started, on the first device
    if theirs:
        rows[0]["ratio_to_peer"] = ours.median / theirs[0].median
        same = {name: labels[name] for name in ("steps", "batch", "dtype") if name in labels}
        what = {"what": f"{labels['what']}, torch", "devices": 1}
        rows.append(_row(what | same, theirs[0], peak=peak, **work))
    return rows


def sampling(
    experiment: Experiment,
    params: Any,
    options: SamplerOptions,
    batch: int,
    *,
    how: How,
    peer: Peer | None = None,
) -> list[Row]:
    """Measures sample.py's program, the whole reverse chain, on the largest number of devices that divides the batch."""
    config, sampler = experiment.config, build_sampler(experiment.process, options)
    mesh = sharding.make_mesh(devices=jax.devices()[: math.gcd(batch, jax.device_count())])
    arguments = jax.device_put(
        (params, sample_key(config.seed), jnp.arange(batch, dtype=jnp.int32)), sharding.replicated(mesh)
    )
    compiled, costs = compile_program(make_generator(experiment, mesh, options), *arguments)
    labels = {"what": options.sampler, "steps": len(sampler), "batch": batch, "dtype": config.model.dtype} | costs
    work = {"times": len(sampler), "images": batch, "flops": len(sampler) * network_flops(experiment, batch)}

    def call():
        return jax.block_until_ready(compiled(*arguments))

    rows = _measure(labels, call, peer, mesh, how, **work)
    _record(call, how, labels, compiled)
    return rows


def training(experiment: Experiment, *, how: How, peer: Peer | None = None) -> list[Row]:
    """Measures train.py's program: train.steps_per_dispatch steps of train.batch_size images, already on the devices."""
    config = experiment.config
    check(config, num_devices=jax.device_count())
    mesh = sharding.make_mesh(fsdp=config.train.fsdp)
    steps, batch = config.train.steps_per_dispatch, config.train.batch_size
    generator, (low, high) = np.random.default_rng(0), config.data.value_range or (0, 256)

    def draw(a):
        return generator.uniform(
            *((0, experiment.num_classes) if a.dtype == jnp.int32 else (low, high)), a.shape
        ).astype(a.dtype)

    images = jax.device_put(jax.tree.map(draw, image_shapes(experiment, steps)), sharding.split(mesh, axis=1))
    state = init_sharded_state(experiment, mesh)
    compiled, costs = compile_program(make_train_step(experiment, mesh=mesh), state, images, None)
    labels = {"what": "train step", "steps": steps, "batch": batch, "dtype": config.model.dtype} | costs

    def call():
        nonlocal state
        state, _ = jax.block_until_ready(compiled(state, images, None))

    work = {"times": steps, "images": steps * batch, "flops": steps * step_flops(experiment)}
    rows = _measure(labels, call, peer, mesh, how, **work)
    _record(call, how, labels, compiled)
    return rows


def _record(call: Callable[[], Any], how: How, labels: Row, compiled: Any) -> None:
    """Profiles a program, if that is wanted, as train_step_1_128_bfloat16, say."""
    if how.trace:
        name = "_".join(str(labels[key]) for key in ("what", "steps", "batch", "dtype")).replace(" ", "_")
        trace.record(call, how.trace, name, compiled.as_text())


def data(config: Config, *, repeats: int, num_batches: int = 64) -> list[Row]:
    """Measures the feed of batches up to the devices, beside a baseline on the same images.

    The baseline is a bare NumPy gather, or Pillow alone for pictures decoded at every step. The host's memory is that of the
    whole process, after both.
    """
    check(config, num_devices=jax.device_count())
    source, mesh = open_source(config.data), sharding.make_mesh(fsdp=config.train.fsdp)
    batch, steps = config.train.batch_size, config.train.steps_per_dispatch
    look_up = jax.jit(
        lambda dataset, places: jax.tree.map(lambda array: array[places], dataset),
        out_shardings=sharding.split(mesh, axis=1),
    )
    dispatches = range(0, max(num_batches, steps) // steps * steps, steps)
    wanted = [batch_indices(config.seed, first, steps, batch, len(source)) for first in dispatches]
    times = len(wanted) * steps
    # The run ends with these batches: reading further ahead would take time from the baseline.
    ended = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=times))
    feed = make_feed(ended, source, mesh)

    def ours():
        for first in dispatches:
            batches, dataset = feed(first, steps)
            jax.block_until_ready(batches if dataset is None else look_up(dataset, batches))

    def gather():
        for indices in wanted:
            source.read(indices)

    alone: tuple[str, Callable[[], None]] = ("NumPy gather", gather)
    if isinstance(source.images, DecodedPictures):
        indices = np.concatenate(wanted).reshape(-1)
        alone = ("Pillow alone", functools.partial(pillow_alone, source.images, indices, config.data.workers))
    rows = [
        _row({"what": what, "steps": times, "batch": batch}, timing, times=times, images=times * batch)
        for what, timing in zip(("data feed", alone[0]), take_turns([ours, alone[1]], repeats), strict=True)
    ]
    held = host_memory()
    rows[0] |= {} if held is None else {"host_mib": held / 2**20}
    return rows


def pillow_alone(images: DecodedPictures, indices: Iterable[int], workers: int) -> None:
    """The baseline: Pillow reads, decodes, crops and resizes the pictures in as many threads."""
    size, mode = images.shape[1:3], "L" if images.shape[3] == 1 else "RGB"

    def one(i):
        with Image.open(io.BytesIO(images.pictures.read(i))) as picture:
            box = centre_box(picture.size, size)
            picture.convert(mode).resize(size[::-1], Image.Resampling.BICUBIC, box=box)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for _ in pool.map(one, indices):
            pass
