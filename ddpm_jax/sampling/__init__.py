"""Samplers, one file each; the loop of `scan.py` runs them all."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Array, Float, Int, Key

from ddpm_jax.diffusion.process import Clip, Process
from ddpm_jax.sampling.ancestral import ancestral
from ddpm_jax.sampling.ddim import ddim, ddim_encode
from ddpm_jax.sampling.dpm_solver import dpm_solver
from ddpm_jax.sampling.heun import heun
from ddpm_jax.sampling.scan import Model, Sampler, Watched, draw_x_T, reverse, sample_loop
from ddpm_jax.sampling.spacing import SPACINGS, choose_steps

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm++1s": functools.partial(dpm_solver, order=1),
    "dpm++2m": functools.partial(dpm_solver, order=2),
    "dpm++3m": functools.partial(dpm_solver, order=3),
    "heun": heun,
}

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "Model",
    "Sampler",
    "Watched",
    "choose_steps",
    "ddim_encode",
    "draw_x_T",
    "make_sampler",
    "reverse",
    "sample",
    "sample_loop",
]


def make_sampler(
    process: Process,
    name: str = "ancestral",
    *,
    steps: int | Sequence[int] = (),
    spacing: str = "linspace",
    eta: float | None = None,
    clip: Clip = True,
    highest: int | None = None,
) -> Sampler:
    """Makes a sampler by its name in `SAMPLERS`. The defaults are the paper's Algorithm 2.

    Args:
        process: The schedule, and what the network's output means.
        name: A key of `SAMPLERS`: ancestral, ddim, dpm++1s, dpm++2m, dpm++3m, heun.
        steps: The number of steps to visit, or their numbers in equal sections of T (`choose_steps`); () for all T.
        spacing: Which steps, a key of `SPACINGS`: linspace, leading, trailing, quadratic, logsnr.
        eta: DDIM's noise, from 0 (none) to 1 (ancestral).
        clip: Treatment of each predicted x_0 (`clip_x_0`).
        highest: Leave out steps above this t, for a chain that starts from x_t; default none.

    Returns:
        A `Sampler`, whose length is the number of network evaluations.

    Raises:
        ValueError: For an unknown name or spacing, more steps than there are, or an eta that the sampler does not have.

    Example:
        >>> from ddpm_jax import Process, make_sampler, make_schedule
        >>> len(make_sampler(Process(make_schedule("linear")), "heun", steps=10))
        19
    """
    if name not in SAMPLERS:
        raise ValueError(f"got sampler {name!r}, expected one of {', '.join(SAMPLERS)}")
    options = {} if eta is None else {"eta": eta}
    if options and "eta" not in inspect.signature(SAMPLERS[name]).parameters:
        raise ValueError(f"got eta = {eta:g} for sampler {name!r}, which has none; leave it out or use ddim")
    visited = choose_steps(process.schedule, steps, spacing)
    visited = visited if highest is None else visited[visited <= highest]
    return SAMPLERS[name](process, visited, clip=clip, **options)


def sample(
    process: Process,
    model: Model,
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    *,
    image_shape: tuple[int, int, int],
    sampler: str = "ancestral",
    **options: Any,
) -> Float[Array, "B H W C"]:
    """Samples images, by default by Algorithm 2. Pure: put it inside `jax.jit`.

    Args:
        process: The schedule, and what the network's output means.
        model: Any function (x_t, t) -> output.
        key: The key of all draws; image i's noise depends on (key, i) alone, so image i is the same in any batch.
        indices: The images' global indices, int (B,).
        image_shape: (H, W, C).
        sampler: The name of the sampler.
        **options: steps, spacing, eta and clip of `make_sampler`, e.g. `sample(..., sampler="ddim", steps=50)`.

    Returns:
        Images, float32 (B, H, W, C), in about [-1, 1]: the last mean may exceed it slightly.

    Raises:
        ValueError: As `make_sampler`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ddpm_jax import Process, make_schedule, sample
        >>> process = Process(make_schedule("linear", T=10, beta_end=0.9))
        >>> sample(process, lambda x_t, t: x_t, jax.random.key(0), jnp.arange(3), image_shape=(8, 8, 1)).shape
        (3, 8, 8, 1)
    """
    return sample_loop(make_sampler(process, sampler, **options), model, key, indices, image_shape=image_shape)
