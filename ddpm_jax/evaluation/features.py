"""Feature functions: from images to feature vectors."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Shaped, UInt8

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data.arrays import Arrays
from ddpm_jax.data.pixels import Pixels
from ddpm_jax.training.experiment import Experiment


class Features(NamedTuple):
    """A feature function: images (B, H, W, C) -> {"features": (B, D)}, and "logits" (B, K) if it classifies.

    Images are as they are stored: uint8, or float32 with data.value_range.

    name: identifies the function with its weights. Results record it, and cached features are keyed by it.
    """

    name: str
    compute: Callable[[Shaped[np.ndarray, "B H W C"]], dict[str, np.ndarray]]


def flat_pixels(images: UInt8[np.ndarray, "B H W C"]) -> dict[str, np.ndarray]:
    """The pixels as features: x / 127.5 - 1, float32 (B, H W C)."""
    return {"features": images.reshape(len(images), -1).astype(np.float32) / 127.5 - 1.0}


PIXELS = Features("pixels", flat_pixels)


def pixel_features(pixels: Pixels) -> Features:
    """The pixels in [-1, 1] as features: `PIXELS`, or those of float32 images."""
    if pixels.value_range is None:
        return PIXELS
    return Features(
        PIXELS.name, lambda images: {"features": np.asarray(pixels.to_network(images)).reshape(len(images), -1)}
    )


def check_pictures(experiment: Experiment) -> None:
    """Raises UsageError if the images have other channels than pictures, which Inception takes."""
    channels = experiment.image_shape[-1]
    if channels not in (1, 3):
        raise UsageError(
            f"Inception takes grey or RGB images, and these have {channels} channels; compare them by their pixels "
            "(--features pixels, in training train.eval_features=pixels) or by a function of your own"
        )


def of_pictures(features: Features, pixels: Pixels) -> Features:
    """Features of 8-bit pictures for an experiment's images: float32 ones are rounded to 256 levels of their range first."""
    if pixels.value_range is None:
        return features
    return Features(f"{features.name}, of 8-bit pictures", lambda images: features.compute(pixels.to_pictures(images)))


def in_one_shape(compiled: Callable[..., dict[str, Array]], images: Shaped[np.ndarray, "n H W C"], size: int) -> Arrays:
    """compiled(images) for a program of `size` images: zeros fill the batch, and their results are dropped."""
    padded = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), images.dtype)])
    return {name: np.asarray(a)[: len(images)] for name, a in compiled(padded).items()}


def on_devices(compute: Callable[..., dict[str, Array]], constants, mesh: Mesh, batch_size: int) -> Callable:
    """Compiles compute(constants, uint8 images) for a mesh. Batches are padded to one size and split over the devices.

    All processes must call the result with the same images, and each gets all features.
    """
    size = sharding.round_up(batch_size, mesh.devices.size)

    def split(constants, images):
        return compute(constants, jax.lax.with_sharding_constraint(images, sharding.split(mesh)))

    compiled = jax.jit(split, out_shardings=sharding.replicated(mesh))
    constants = jax.device_put(constants, sharding.replicated(mesh))

    def over_batches(images):
        program = functools.partial(compiled, constants)
        parts = [in_one_shape(program, images[i : i + size], size) for i in range(0, len(images), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    return over_batches
