"""Ancestral sampling: Algorithm 2."""

import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion import Prediction, Variance, p_mean_logvar
from ddpm_jax.sampling.loop import Sampler
from ddpm_jax.schedules import Schedule


def ancestral(
    schedule: Schedule,
    *,
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip: bool = True,
) -> Sampler:
    """x_{t-1} = mean(x_t) + sigma_t z for t = T-1, ..., 0, and z = 0 at the last step (Algorithm 2, zero-based).

    clip: clip each predicted x_0 to [-1, 1] before the mean is formed, as the authors' code does.
    """

    def step(model, x, row, noise):
        t = jnp.full(x.shape[:1], row)
        p = p_mean_logvar(schedule, model(x, t), x, t, prediction=prediction, variance=variance, clip=clip)
        return p.mean + jnp.where(row > 0, jnp.exp(0.5 * p.logvar) * noise(), 0.0), p.x_0

    return Sampler(rows=np.arange(schedule.T)[::-1], step=step)
