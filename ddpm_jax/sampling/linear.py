"""Linear samplers, given by a table: x' = a x + b x_0 + (c_1, c_2, ...) earlier x_0's + s z, with x_0 predicted from x at t.

DDIM, DPM-Solver++ and Heun's method are linear. Their modules compute the table in float64, and this one applies it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ddpm_jax.diffusion.process import Clip, Process, clip_x_0, predict_x_0, split_output
from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.sampling.scan import Sampler


class Levels(NamedTuple):
    """For each step of a chain, in order: t, signal sqrt(alpha-bar) and noise sqrt(1 - alpha-bar) there and at the next step.

    After the last step comes the clean image, with signal 1 and noise 0.
    """

    t: Int[np.ndarray, " S"]
    signal: Float[np.ndarray, " S"]
    noise: Float[np.ndarray, " S"]
    next_signal: Float[np.ndarray, " S"]
    next_noise: Float[np.ndarray, " S"]


def levels(schedule: Schedule, steps: Sequence[int] | np.ndarray) -> Levels:
    """The levels of the chain over `steps` (increasing t's), from the last one to the clean image; float64.

    Raises ValueError if the last step has no signal (`jsd`), since these samplers divide by it.
    """
    t = np.asarray(steps)[::-1]
    if schedule.alphas_cumprod[t[0]] == 0:
        raise ValueError(
            f"got a schedule whose alphas_cumprod[{t[0]}] is 0, expected some signal; use ancestral sampling"
        )
    signal, noise = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
    return Levels(t, signal, noise, np.append(signal[1:], 1.0), np.append(noise[1:], 0.0))


def linear(
    process: Process,
    t: Int[np.ndarray, " S"],
    *,
    x: Float[np.ndarray, " S"],
    x_0: Float[np.ndarray, "S m"],
    noise: Float[np.ndarray, " S"] | None = None,
    clip: Clip,
    order: int | None = None,
) -> Sampler:
    """The sampler x' = x[k] x + sum_j x_0[k, j] (the x_0 predicted j rows ago) + noise[k] z, for rows k = 0, 1, ....

    t: where the network is evaluated, int (S,). Coefficients are float64; the loop casts them. A learned variance is ignored,
    since these samplers have their own. order: of convergence, for a sampler that draws no noise.
    """

    def step(model, x, row, draw, previous):
        t = jnp.full(x.shape[:1], row["t"])
        output, _ = split_output(process, model(x, t))
        predicted = clip_x_0(predict_x_0(process, output, x, t), clip)
        x = row["x"] * x
        for j, earlier in enumerate((predicted, *previous)):
            x = x + row["x_0"][j] * earlier
        if noise is not None:
            x = x + row["noise"] * draw()
        return x, predicted

    rows = {"t": t, "x": x, "x_0": x_0} | ({} if noise is None else {"noise": noise})
    return Sampler(rows, step, memory=x_0.shape[1] - 1, order=order if noise is None else None)
