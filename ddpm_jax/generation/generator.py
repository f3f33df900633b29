"""Generating images: a sampler compiled for an experiment and a mesh, run over ranges of image indices."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, Shaped
from tqdm import tqdm

from ddpm_jax.core import rng, sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.rng import Purpose
from ddpm_jax.core.room import check_devices
from ddpm_jax.generation.given import Given, Tables, given_at
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.generation.starts import make_start
from ddpm_jax.sampling import Model
from ddpm_jax.sampling.guidance import guide
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.workdir import Run, load_run

Generate = Callable[..., Any]  # (params, key, indices, labels, conditions=) -> images


def sample_key(seed: int) -> Key[Array, ""]:
    """The key of a seed's samples: its SAMPLE stream."""
    return rng.stream(rng.root_key(seed), Purpose.SAMPLE)


def with_guide(run: Run, options: SamplerOptions) -> Run:
    """The run with the run of `options.guide_with`, whose newest EMA parameters guide it.

    Raises UsageError if the other run is of other images or another process, or has no effect.
    """
    if not options.guide_with:
        return run
    if options.guidance == 1:
        raise UsageError("--guide-with has no effect at --guidance 1; give a larger one")
    guide = load_run(options.guide_with, mesh=run.mesh)

    def meaning(experiment: Experiment) -> tuple[Any, ...]:
        process = experiment.process
        image = experiment.image_shape, experiment.pixels, experiment.conditioning
        return *image, process.prediction, process.schedule.betas.tolist()

    if meaning(guide.experiment) != meaning(run.experiment):
        raise UsageError(
            f"--guide-with {options.guide_with} is a run of other images, conditions or prediction, or another schedule; give "
            "one whose outputs mean the same"
        )
    renamed = guide.classes and run.classes and guide.classes != run.classes
    if guide.experiment.num_classes and (guide.experiment.num_classes != run.experiment.num_classes or renamed):
        raise UsageError(
            f"--guide-with {options.guide_with} is a run of other classes; give one of the same, or of none"
        )
    if guide.note and jax.process_index() == 0:
        tqdm.write(f"Note: of the run that guides, {guide.note}.")
    return dataclasses.replace(run, guide=guide)


def parameters(run: Run) -> Any:
    """What the run's generator takes as params: the run's, or a pair with those of its guide."""
    return run.params if run.guide is None else (run.params, run.guide.params)


def guided(experiment: Experiment, options: SamplerOptions, other: Experiment | None) -> Callable[..., Model]:
    """(params, labels, condition) -> the model that is sampled: of the classes and conditions, guided as the options say.

    other: the experiment of `guide_with`; params is then a pair, of the experiment's and the other's. Raises UsageError if
    there is nothing to guide by.
    """
    for name in ("guidance_interval", "guidance_rescale"):
        if options.guidance == 1 and getattr(options, name) != getattr(SamplerOptions(), name):
            raise UsageError(
                f"--{name.replace('_', '-')} has no effect at --guidance 1; leave it out, or give a larger one"
            )
    if options.guidance != 1 and other is None and not experiment.num_classes:
        raise UsageError(
            f"--guidance {options.guidance:g} needs a run with classes, but this one has none; leave it out, or name another "
            "run by --guide-with"
        )
    if options.guidance != 1 and other is None:
        _ = experiment.null_label  # refused before anything is compiled
    first, last = options.guidance_interval or (0, 0)
    if not (math.isfinite(options.guidance) and 0 <= options.guidance_rescale <= 1 and 0 <= first <= last):
        raise UsageError(
            f"got --guidance {options.guidance:g}, --guidance-interval {first} {last} and --guidance-rescale "
            f"{options.guidance_rescale:g}; give a number, a first t that is not after the last, and a share from 0 to 1"
        )

    def of(params: Any, labels: Any, condition: Any = None) -> Model:
        if options.guidance == 1:
            return experiment.model(params, labels=labels, condition=condition)
        both = None
        if other is None:
            null = experiment.model(params, condition=condition)
            # Each image beside its twin without a class, so that both are on one device.
            pairs = jnp.stack([labels, jnp.full_like(labels, experiment.null_label)], axis=1).reshape(-1)
            twice = None if condition is None else condition.repeat(2, axis=0)
            doubled = experiment.model(params, labels=pairs, condition=twice)

            def both(x_t, t):
                output = doubled(x_t.repeat(2, axis=0), t.repeat(2, axis=0))
                return output[0::2], output[1::2]
        else:
            params, others = params
            null = other.model(others, labels=labels if other.num_classes else None, condition=condition)
        return guide(
            experiment.model(params, labels=labels, condition=condition),
            null,
            options.guidance,
            interval=options.guidance_interval,
            rescale=options.guidance_rescale,
            both=both,
        )

    return of


def make_generator(
    experiment: Experiment,
    mesh: Mesh,
    options: SamplerOptions | None = None,
    *,
    watch: Sequence[int] = (),
    guide: Run | None = None,
    given: Given | None = None,
) -> Generate:
    """Compiles (params, key, indices, labels, conditions, ...) -> images: the reverse chain, one program for each batch size B.

    Args:
        experiment: The experiment of the parameters.
        mesh: The devices that the batch is split over; B must be a multiple of their number.
        options: How images are drawn; default the paper's Algorithm 2 over all steps.
        watch: Rows of the sampler after which x_t is returned.
        guide: The run that guides (`with_guide`).
        given: Pictures given; they are further arguments by name, the rows of `Given.tables`.

    Returns:
        The compiled function: indices int (B,) to images (B, H, W, C), uint8 or float32 as the data set's, replicated on every
        device. Of an experiment with classes, labels are int (B,), by default all classes in turn; with conditions, these are
        given as they are stored, (B, h, w, K). With `watch` it returns (images, x_t), with x_t (len(watch), B, H, W, C) of the
        same type.

    Raises:
        UsageError: For options that do not go together.
    """
    options = SamplerOptions() if options is None else options
    start = make_start(experiment, options, None if given is None else given.options)
    model = guided(experiment, options, None if guide is None else guide.experiment)

    def generate(params, key, indices, labels=None, conditions=None, **tables):
        indices, conditions, tables = jax.lax.with_sharding_constraint(
            (indices, conditions, tables), sharding.split(mesh)
        )
        if experiment.num_classes:
            labels = indices % experiment.num_classes if labels is None else labels
            labels = jax.lax.with_sharding_constraint(labels, sharding.split(mesh))
        condition = conditions
        if conditions is not None and experiment.conditioning is not None:
            condition = experiment.conditioning.to_network(conditions)
        x, seen = start(model(params, labels, condition), key, indices, watch, **tables)
        stored = experiment.pixels.from_network
        return (stored(x), stored(seen.x)) if len(watch) else stored(x)

    return sharding.jit_replicated(generate, mesh)


@dataclass(frozen=True)
class Batches:
    """`indices` split into ranges of `size`, the last one perhaps shorter. Ranges are computed on access."""

    indices: range
    size: int

    def __len__(self) -> int:
        return -(-len(self.indices) // self.size)

    def __getitem__(self, place: int) -> range:
        if not 0 <= place < len(self):
            raise IndexError(place)
        return self.indices[place * self.size : (place + 1) * self.size]

    def __iter__(self) -> Iterator[range]:
        return (self[place] for place in range(len(self)))


def batch_ranges(indices: range, *, batch_size: int, num_devices: int) -> Batches:
    """The indices split into batches; batch_size is rounded up to a multiple of num_devices."""
    return Batches(indices, sharding.round_up(min(batch_size, len(indices)), num_devices))


def check_batch(experiment: Experiment, mesh: Mesh, batch_size: int) -> None:
    """Raises UsageError if a batch cannot fit in memory, which holds at least four copies of the images and two activations."""
    H, W, C = experiment.image_shape
    model, widest = experiment.config.model, 0
    if not experiment.has_own_network:
        widest = max((H // 2**i) * (W // 2**i) * model.ch * mult for i, mult in enumerate(model.ch_mult))
    needed = batch_size * (16 * H * W * C + 2 * widest * jnp.dtype(model.dtype).itemsize)
    check_devices(mesh.local_devices, needed // mesh.devices.size, f"--batch-size {batch_size}", "use a smaller one")


def draw(
    generate: Generate,
    params: Any,
    key: Key[Array, ""],
    part: range,
    *,
    size: int,
    given: Tables | None = None,
) -> Any:
    """Starts what the generator gives for `size` images from the first of `part` on, and returns before it is computed.

    size: a multiple of the devices, at least the length of `part`; the images after those of `part` are padding, for the caller
    to drop. given: what images are drawn with, by the generator's argument.
    """
    indices = np.arange(part.start, part.start + size, dtype=np.int32)
    return generate(params, key, indices, **given_at(given or {}, indices))


def generate_batches(
    generate: Generate,
    params: Any,
    key: Key[Array, ""],
    ranges: Iterable[range],
    *,
    size: int,
    given: Tables | None = None,
) -> Iterator[tuple[range, Shaped[np.ndarray, "n H W C"]]]:
    """Yields (range, images) for each range, while the devices compute the next one.

    Every batch is padded to `size`, as `draw` takes it, and the padding is dropped.
    """
    started = ((part, draw(generate, params, key, part, size=size, given=given)) for part in ranges)
    for (part, images), _ in itertools.pairwise(itertools.chain(started, [(range(0), None)])):
        yield part, np.asarray(images)[: len(part)]
        del images  # before another batch is started
