"""Samplers, one file each, all run by the one loop of `scan.py`."""

import functools
import inspect
from collections.abc import Callable, Sequence

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
) -> Sampler:
    """The sampler of a name of `SAMPLERS` over the steps that `choose_steps` finds; the defaults are the paper's Algorithm 2.

    eta: DDIM's alone. Raises ValueError for an unknown name, or an eta that the sampler does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"got sampler {name!r}, expected one of {', '.join(SAMPLERS)}")
    options = {} if eta is None else {"eta": eta}
    if options and "eta" not in inspect.signature(SAMPLERS[name]).parameters:
        raise ValueError(f"got eta = {eta:g} for sampler {name!r}, which has none; leave it out or use ddim")
    visited = choose_steps(process.schedule, steps, spacing)
    return SAMPLERS[name](process, visited, clip=clip, **options)


def sample(
    process: Process,
    model: Model,
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    *,
    image_shape: tuple[int, int, int],
    sampler: str = "ancestral",
    steps: int | Sequence[int] = (),
    spacing: str = "linspace",
    eta: float | None = None,
    clip: Clip = True,
) -> Float[Array, "B H W C"]:
    """Samples images, by default by Algorithm 2: float32 (B, H, W, C), in [-1, 1] but for what the last mean may leave it.

    model: any function (x_t, t) -> output. indices: int (B,); image i's noise depends on (key, i) alone, so that it is the
    same image in any batch. image_shape: (H, W, C). The rest as `make_sampler` takes it: sample(..., sampler="ddim",
    steps=50). Pure: put it inside `jax.jit`.
    """
    chosen = make_sampler(process, sampler, steps=steps, spacing=spacing, eta=eta, clip=clip)
    return sample_loop(chosen, model, key, indices, image_shape=image_shape)
