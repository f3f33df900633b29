"""Inpainting with an unconditional model: RePaint (Lugmayr et al. 2022), on top of ancestral sampling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddpm_jax.diffusion.process import Clip, Process
from ddpm_jax.diffusion.schedules import respace
from ddpm_jax.sampling.ancestral import ancestral
from ddpm_jax.sampling.scan import Sampler


def inpaint(
    process: Process,
    steps: np.ndarray,
    known: Float[Array, "B H W C"],
    mask: Float[Array, "B H W 1"],
    *,
    jump: int = 10,
    times: int = 10,
    clip: Clip = True,
) -> Sampler:
    """A sampler of images that equal `known` where the mask is above 0, without blending (Algorithm 1 of the paper).

    After each step x is q(x_s | known) inside the mask and the ancestral x_s outside. To harmonise both parts, every `jump`
    steps the chain is noised back by `jump` steps and run again, `times` times in all. More repeats approximate the conditional
    distribution better. steps: increasing t's, at least 2. Raises ValueError for a jump or times below 1, or a jump as long as
    the chain.
    """
    if jump < 1 or times < 1:
        raise ValueError(f"got jump = {jump} and times = {times}, expected at least 1 of each")
    if times > 1 and jump >= len(steps):
        raise ValueError(f"got jump = {jump} with {len(steps)} steps, expected less, or times = 1")
    base = ancestral(process, steps, clip=clip)
    alphas_cumprod = np.append(
        respace(process.schedule, steps).alphas_cumprod, 1.0
    )  # the last, [-1], is the clean image's
    i, back = _walk(len(steps), jump, times)
    kept = alphas_cumprod[i - 1 + back] / alphas_cumprod[i - 1]  # share of the signal after noising back
    rows = {
        "t": np.asarray(steps)[i],
        "i": i,
        "signal": np.sqrt(alphas_cumprod[i - 1]),
        "noise": np.sqrt(1.0 - alphas_cumprod[i - 1]),
        "back_signal": np.sqrt(kept),
        "back_noise": np.sqrt(1.0 - kept),
    }

    def step(model, x, row, draw, previous):
        x, x_0 = base.step(model, x, row, draw, previous)
        x = jnp.where(mask > 0, row["signal"] * known + row["noise"] * draw(1), x)
        return row["back_signal"] * x + row["back_noise"] * draw(2), x_0

    return Sampler(rows, step)


def _walk(S: int, jump: int, times: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row, the entry of the chain that it starts from, and the number of steps that it is noised back afterwards."""
    left = dict.fromkeys(range(0, S - jump, jump), times - 1)
    walk, i = [], S - 1
    while i >= 0:
        reached = i - 1
        back = jump if left.get(reached, 0) else 0
        if back:
            left[reached] -= 1
        walk.append((i, back))
        i = reached + back
    i_and_back = np.array(walk)
    return i_and_back[:, 0], i_and_back[:, 1]
