"""Ancestral sampling: Algorithm 2, over all steps or a subset."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import Clip, Process, p_mean_logvar, predict_from_x_0, predict_x_0, split_output
from ddpm_jax.diffusion.schedules import respace
from ddpm_jax.sampling.scan import Sampler


def ancestral(process: Process, steps: np.ndarray, *, clip: Clip = True) -> Sampler:
    """x_{t-1} = mean(x_t) + sigma_t z for the steps t from the last to the first, and z = 0 at the last one (Algorithm 2).

    steps: increasing t's, at least 2. All of 0 .. T-1 give the paper's chain. A subset gives the chain of the respaced process
    (Nichol & Dhariwal 2021, section 4), with its posterior and variances. clip: clip each predicted x_0 before the mean is
    computed, as the authors' code does. Raises ValueError for variance `learned` on a subset, since it was learned for single
    steps.
    """
    steps = np.asarray(steps)
    every = len(steps) == process.schedule.T
    if process.variance == "learned" and not every:
        raise ValueError(
            "got variance 'learned' with some steps left out, expected all steps: it was learned for these"
        )
    if len(steps) < 2:
        raise ValueError("got 1 step, expected at least 2 for ancestral sampling; use ddim for a single one")
    visited = process if every else dataclasses.replace(process, schedule=respace(process.schedule, steps))

    def step(model, x, row, noise, previous):
        t, i = jnp.full(x.shape[:1], row["t"]), jnp.full(x.shape[:1], row["i"])
        output = model(x, t)
        if process.prediction == "x_prev" and not every:  # convert the mean of a single step to that of a longer one
            mean, rest = split_output(process, output)
            x_0 = predict_x_0(process, mean, x, t)
            mean = predict_from_x_0(visited, x_0, x, i)
            output = mean if rest is None else jnp.concatenate([mean, rest], axis=-1)
        p = p_mean_logvar(visited, output, x, i, clip=clip)
        return p.mean + jnp.where(row["i"] > 0, jnp.exp(0.5 * p.logvar) * noise(), 0.0), p.x_0

    return Sampler({"t": steps[::-1], "i": np.arange(len(steps))[::-1]}, step)
