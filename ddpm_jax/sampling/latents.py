"""Sampling with intermediate x_t: the paper's Figures 6, 7 and 8.

Each function takes a `Chain` and starts at its sampler's largest step that is at most t.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.sampling.scan import Model, Sampler, advance, draw_x_T


class Chain(NamedTuple):
    """A sampler with its model and key.

    steps: (indices, x, first, last) -> (x after the rows first .. last - 1, the x_0 predicted in the last of them). It can be
    compiled with `jax.jit`: first and last may be traced.
    """

    sampler: Sampler
    key: Key[Array, ""]
    image_shape: tuple[int, int, int]
    steps: Callable[..., tuple[Array, Array]]


def make_chain(sampler: Sampler, model: Model, key: Key[Array, ""], *, image_shape: tuple[int, int, int]) -> Chain:
    """Makes the chain of a sampler, a model and a key.

    Args:
        sampler: A sampler without memory, such as ancestral or ddim.
        model: Any function (x_t, t) -> output.
        key: The key of all draws; image i's noise depends on (key, i) alone.
        image_shape: (H, W, C).

    Returns:
        The `Chain`, not compiled.
    """

    def steps(indices, x, first, last):
        return advance(sampler, model, key, indices, x, first, last)

    return Chain(sampler, key, image_shape, steps)


class Progressive(NamedTuple):
    """The predictions x_0 (n, B, H, W, C) along the chain, their t, and the final images."""

    t: Int[np.ndarray, " n"]
    x_0: Float[Array, "n B H W C"]
    images: Float[Array, "B H W C"]


def progressive_generation(chain: Chain, indices: Int[Array, " B"], *, count: int = 10) -> Progressive:
    """The predictions of x_0, Eq. (15), at `count` equally spaced rows of a chain (Figure 6), or at all rows if it has fewer."""
    rows = np.unique(np.linspace(0, len(chain.sampler) - 1, count).round().astype(int))
    x, predicted, done = draw_x_T(chain.key, indices, chain.image_shape), [], 0
    for row in rows.tolist():
        x, x_0 = chain.steps(indices, x, done, row + 1)
        predicted.append(x_0)
        done = row + 1
    return Progressive(np.asarray(chain.sampler.rows["t"])[rows], jnp.stack(predicted), x)


def shared_latents(chain: Chain, index: Int[Array, ""] | int, *, t: int, count: int) -> Float[Array, "n H W C"]:
    """`count` images that share one x_t and differ in the later noise (Figure 7): float (count, H, W, C).

    x_t is that of image `index`, which comes first; the others use the noise of the following indices.
    """
    first, indices = start_row(chain.sampler, t), index + jnp.arange(count)
    x_t, _ = chain.steps(indices[:1], draw_x_T(chain.key, indices[:1], chain.image_shape), 0, first)
    x_t = jnp.broadcast_to(x_t, (count, *chain.image_shape))
    return chain.steps(indices, x_t, first, len(chain.sampler))[0]


def interpolate(
    chain: Chain,
    schedule: Schedule,
    indices: Int[Array, " B"],
    x_0: Float[Array, "B H W C"],
    x_0_other: Float[Array, "B H W C"],
    *,
    t: int,
    fractions: Sequence[float],
) -> Float[Array, "n B H W C"]:
    """Decodes (1 - f) x_t + f x_t' for each fraction f, with x_t and x_t' from q(. | x_0) and q(. | x_0') (Figure 8).

    The noise of x_t is draw k = 0 of image b, and that of x_t' is draw k = 0 of image b + B; both are float32. Decoding uses the
    same noise for every f.
    """
    start = start_row(chain.sampler, t)
    level = jnp.full(x_0.shape[:1], int(np.asarray(chain.sampler.rows["t"])[start]))
    noises = (draw_x_T(chain.key, i, chain.image_shape) for i in (indices, indices + len(x_0)))
    x_t, x_t_other = (q_sample(schedule, x, level, eps) for x, eps in zip((x_0, x_0_other), noises, strict=True))
    f = jnp.asarray(fractions, x_0.dtype)[:, None, None, None, None]
    mixed = ((1 - f) * x_t[None] + f * x_t_other[None]).reshape(-1, *x_0.shape[1:])
    images, _ = chain.steps(jnp.tile(indices, len(fractions)), mixed, start, len(chain.sampler))
    return images.reshape(len(fractions), *x_0.shape)


def start_row(sampler: Sampler, t: int) -> int:
    """The first row whose step is at most t, where a chain starts from x_t. Raises ValueError if there is none."""
    rows = np.flatnonzero(np.asarray(sampler.rows["t"]) <= t)
    if len(rows) == 0:
        raise ValueError(f"got t = {t}, expected at least {np.min(sampler.rows['t'])}, the sampler's last step")
    return int(rows[0])
