"""Images from parameters: the config's sampler, compiled for a mesh, over ranges of image indices."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, UInt8

from ddpm_jax import rng, sharding
from ddpm_jax.config import Config
from ddpm_jax.rng import Purpose
from ddpm_jax.sampling import sample
from ddpm_jax.training import build_schedule, build_unet


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Pixels of [-1, 1] as round((x + 1) 127.5), clipped to 0..255."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


def sample_key(seed: int) -> Key[Array, ""]:
    """The key that the samples of a seed are drawn with, its SAMPLE stream."""
    return rng.stream(rng.root_key(seed), Purpose.SAMPLE)


def make_generator(
    config: Config, mesh: Mesh
) -> Callable[[Any, Key[Array, ""], Int[Array, " B"]], UInt8[Array, "B H W C"]]:
    """Compiles (params, key, indices) -> uint8 images (B, H, W, C): the whole reverse chain, one program for each B.

    B must be a multiple of the mesh's devices, over which the images are split.
    """
    schedule, unet, d = build_schedule(config), build_unet(config), config.diffusion
    size = config.data.image_size

    def generate(params, key, indices):
        def model(x_t, t):
            return unet.apply({"params": params}, x_t, t)

        images = sample(
            schedule,
            model,
            key,
            jax.lax.with_sharding_constraint(indices, sharding.split(mesh)),
            image_shape=(size, size, config.data.channels),
            prediction=d.prediction,
            variance=d.variance,
        )
        return to_uint8(images)

    return jax.jit(generate, out_shardings=sharding.split(mesh))


def generate_batches(
    generator: Callable, params: Any, key: Key[Array, ""], indices: range, *, batch_size: int, num_devices: int
) -> Iterator[tuple[range, UInt8[np.ndarray, "n H W C"]]]:
    """Yields (index range, images) for fixed ranges of `batch_size` indices: range(0, batch_size), and so on.

    Every batch has the same shape, rounded up to a multiple of num_devices; what pads the last one is left out.
    """
    size = -(-min(batch_size, len(indices)) // num_devices) * num_devices
    for first in range(indices.start, indices.stop, size):
        part = range(first, min(first + size, indices.stop))
        images = generator(params, key, jnp.arange(first, first + size, dtype=jnp.int32))
        yield part, np.asarray(images)[: len(part)]
