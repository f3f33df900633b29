"""The loop that all samplers share: one `lax.scan` over reverse steps, for any function (x_t, t) -> output.

A sampler is a table of rows, one for each network evaluation, and a function that takes x from one row to the next. The loop
draws the noise: image i's depends on (key, i, k) alone, k = 0 for x_T and k = 1, 2, ... for the steps in order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax import rng

Model = Callable[[Float[Array, "B H W C"], Int[Array, " B"]], Float[Array, "B H W D"]]


class Sampler(NamedTuple):
    """A sampler: rows, and step(model, x, row, noise) -> (x, x_0).

    rows: a pytree of host arrays whose first axis, length S, is the order of the steps. step takes x float (B, H, W, C), one
    row, and `noise()`, which gives the step's standard normal draws of x's shape; it returns the next x and the x_0 that the
    step predicted, for those who watch the process.
    """

    rows: Any
    step: Callable[[Model, Array, Any, Callable[[], Array]], tuple[Array, Array]]


def sample_loop(
    sampler: Sampler,
    model: Model,
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    *,
    image_shape: tuple[int, int, int],
) -> Float[Array, "B H W C"]:
    """Draws x_T for each image and takes it through all of the sampler's steps; float32, images in [-1, 1].

    indices: the images' global places, int (B,), which their noise depends on.
    """
    keys = rng.image_keys(key, indices)
    x_T = rng.image_normal(keys, 0, image_shape)
    count = len(jax.tree.leaves(sampler.rows)[0])

    def body(x, k_and_row):
        k, row = k_and_row
        x, _ = sampler.step(model, x, row, lambda: rng.image_normal(keys, k, image_shape))
        return x, None

    rows = jax.tree.map(_to_device, sampler.rows)
    x, _ = jax.lax.scan(body, x_T, (jnp.arange(1, count + 1, dtype=jnp.int32), rows))
    return x


def _to_device(table: np.ndarray) -> Array:
    """A host table in the precision of the device loop: float32 and int32."""
    table = np.asarray(table)
    return jnp.asarray(table, jnp.float32 if np.issubdtype(table.dtype, np.floating) else jnp.int32)
