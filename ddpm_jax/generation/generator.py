"""Generating images: a sampler compiled for an experiment and a mesh, run over ranges of image indices."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key, Shaped

from ddpm_jax.core import rng, sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.rng import Purpose
from ddpm_jax.core.room import check_devices
from ddpm_jax.diffusion.process import Process
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.sampling import Sampler, draw_x_T, make_sampler, reverse
from ddpm_jax.training.experiment import Experiment

Generate = Callable[..., Any]  # (params, key, indices) -> images


def build_sampler(process: Process, options: SamplerOptions) -> Sampler:
    """The sampler of these options. Raises UsageError if they do not go together."""
    if options.steps == ():
        raise UsageError("--steps has no value; give one, or leave it out for all steps")
    try:
        return make_sampler(
            process,
            options.sampler,
            steps=options.steps or (),
            spacing=options.spacing,
            eta=options.eta,
            clip={"static": True, "none": False, "dynamic": 0.995}[options.clip],
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def sample_key(seed: int) -> Key[Array, ""]:
    """The key of a seed's samples: its SAMPLE stream."""
    return rng.stream(rng.root_key(seed), Purpose.SAMPLE)


def make_generator(
    experiment: Experiment, mesh: Mesh, options: SamplerOptions | None = None, *, watch: Sequence[int] = ()
) -> Generate:
    """Compiles (params, key, indices) -> images: the whole reverse chain, one program for each batch size B.

    Args:
        experiment: The experiment of the parameters.
        mesh: The devices that the batch is split over; B must be a multiple of their number.
        options: How images are drawn; default the paper's Algorithm 2 over all steps.
        watch: Rows of the sampler after which x_t is returned.

    Returns:
        The compiled function: indices int (B,) to images (B, H, W, C), uint8 or float32 as the data set's, replicated on every
        device. With `watch` it returns (images, x_t), with x_t (len(watch), B, H, W, C) of the same type.

    Raises:
        UsageError: For options that do not go together.
    """
    options = SamplerOptions() if options is None else options
    sampler = build_sampler(experiment.process, options)

    def generate(params, key, indices):
        indices = jax.lax.with_sharding_constraint(indices, sharding.split(mesh))
        x_T = draw_x_T(key, indices, experiment.image_shape)
        x, seen = reverse(sampler, experiment.model(params), key, indices, x_T, watch=watch)
        stored = experiment.pixels.from_network
        return (stored(x), stored(seen.x)) if len(watch) else stored(x)

    return jax.jit(generate, out_shardings=sharding.replicated(mesh))


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


def generate_batches(
    generate: Generate, params: Any, key: Key[Array, ""], ranges: Iterable[range], *, batch_size: int, num_devices: int
) -> Iterator[tuple[range, Shaped[np.ndarray, "n H W C"]]]:
    """Yields (range, images) for each range, while the devices compute the next one.

    Every batch is padded to batch_size (rounded up to a multiple of num_devices), and the padding is dropped.
    """
    size, waiting = sharding.round_up(batch_size, num_devices), None
    for part in ranges:
        images = generate(params, key, np.arange(part.start, part.start + size, dtype=np.int32))
        if waiting is not None:
            yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]
        waiting = part, images
    if waiting is not None:
        yield waiting[0], np.asarray(waiting[1])[: len(waiting[0])]
