"""What the paper does with the chain's intermediate x_t: its Figures 6, 7 and 8, and starting from a noised image.

Each takes a `Chain` and starts at one of its sampler's steps: the noisiest that is at most t.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax import rng
from ddpm_jax.diffusion.process import q_sample
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.sampling.scan import Model, Sampler, advance, draw_x_T


class Chain(NamedTuple):
    """A sampler at work for a model and a key.

    steps: (indices, x, first, last) -> (x after the rows first .. last - 1, the x_0 predicted in the last of them). Compile it
    with `jax.jit` where x_t are looked at from outside of a compiled function: first and last may be traced.
    """

    sampler: Sampler
    key: Key[Array, ""]
    image_shape: tuple[int, int, int]
    steps: Callable[..., tuple[Array, Array]]


def make_chain(sampler: Sampler, model: Model, key: Key[Array, ""], *, image_shape: tuple[int, int, int]) -> Chain:
    """The chain of a sampler, a model and a key.

    Args:
        sampler: One that does not look back: ancestral, ddim or heun's steps.
        model: Any function (x_t, t) -> output.
        key: Of every draw; image i's noise depends on (key, i) alone.
        image_shape: (H, W, C).

    Returns:
        The `Chain`, not compiled.
    """

    def steps(indices, x, first, last):
        return advance(sampler, model, key, indices, x, first, last)

    return Chain(sampler, key, image_shape, steps)


class Progressive(NamedTuple):
    """The x_0 that are predicted on the way, (n, B, H, W, C), the t they are predicted at, and the images at the end."""

    t: Int[np.ndarray, " n"]
    x_0: Float[Array, "n B H W C"]
    images: Float[Array, "B H W C"]


def progressive_generation(chain: Chain, indices: Int[Array, " B"], *, count: int = 10) -> Progressive:
    """The predictions of x_0, Eq. (15), at `count` equally spaced rows of a chain from noise to images (Figure 6).

    At all rows, n of them, of a chain that has fewer.
    """
    rows = np.unique(np.linspace(0, len(chain.sampler) - 1, count).round().astype(int))
    x, predicted, done = draw_x_T(chain.key, indices, chain.image_shape), [], 0
    for row in rows.tolist():
        x, x_0 = chain.steps(indices, x, done, row + 1)
        predicted.append(x_0)
        done = row + 1
    return Progressive(np.asarray(chain.sampler.rows["t"])[rows], jnp.stack(predicted), x)


def shared_latents(chain: Chain, index: Int[Array, ""] | int, *, t: int, count: int) -> Float[Array, "n H W C"]:
    """`count` images that share one x_t and differ in the noise after it (Figure 7): float (count, H, W, C).

    x_t is that of the image `index`, which is the first of the result; the others take the noise of the indices after it.
    """
    first, indices = start_row(chain.sampler, t), index + jnp.arange(count)
    x_t, _ = chain.steps(indices[:1], draw_x_T(chain.key, indices[:1], chain.image_shape), 0, first)
    x_t = jnp.broadcast_to(x_t, (count, *chain.image_shape))
    return chain.steps(indices, x_t, first, len(chain.sampler))[0]


def from_noised(
    chain: Chain, schedule: Schedule, indices: Int[Array, " B"], x_0: Float[Array, "B H W C"], *, t: int
) -> Float[Array, "B H W C"]:
    """Images x_0 taken to q(x_t | x_0) and back by the sampler: the more like x_0 the smaller t is (Meng et al. 2022, SDEdit).

    The noise of q is draw k = 0 of each image, which makes x_T in a chain from the beginning.
    """
    return interpolate(chain, schedule, indices, x_0, x_0, t=t, fractions=(0.0,))[0]


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

    Both have noise of their own, draw k = 0 of the image b and of the image b + B after it, and the way back takes the same
    noise for every f, so that only f changes along the first axis.
    """
    start = start_row(chain.sampler, t)
    level = jnp.full(x_0.shape[:1], int(np.asarray(chain.sampler.rows["t"])[start]))
    noises = (
        rng.image_normal(rng.image_keys(chain.key, i), 0, x_0.shape[1:], x_0.dtype)
        for i in (indices, indices + len(x_0))
    )
    x_t, x_t_other = (q_sample(schedule, x, level, eps) for x, eps in zip((x_0, x_0_other), noises, strict=True))
    f = jnp.asarray(fractions, x_0.dtype)[:, None, None, None, None]
    mixed = ((1 - f) * x_t[None] + f * x_t_other[None]).reshape(-1, *x_0.shape[1:])
    images, _ = chain.steps(jnp.tile(indices, len(fractions)), mixed, start, len(chain.sampler))
    return images.reshape(len(fractions), *x_0.shape)


def start_row(sampler: Sampler, t: int) -> int:
    """The first row that is evaluated at most at t: where a chain starts from an x_t.

    Raises ValueError if there is none.
    """
    rows = np.flatnonzero(np.asarray(sampler.rows["t"]) <= t)
    if len(rows) == 0:
        raise ValueError(f"got t = {t}, expected at least {np.min(sampler.rows['t'])}, the sampler's last step")
    return int(rows[0])
