"""Heun's method on the probability-flow ODE (Karras et al. 2022, Algorithm 1)."""

import numpy as np

from ddpm_jax.diffusion.process import Clip, Process
from ddpm_jax.sampling.linear import levels, linear
from ddpm_jax.sampling.scan import Sampler


def heun(process: Process, steps: np.ndarray, *, clip: Clip = True) -> Sampler:
    """dy/ds = eps with y = x / signal and s = noise / signal: an Euler step, corrected with the mean of both ends' eps.

    steps: S increasing t's. They take 2 S - 1 network evaluations, each a row: the last step, to the clean image, has no eps at
    its end and stays an Euler step. The second row of a step starts from the x after the first row. There both ends' eps are
    (y - x_0) / s, so the correction of y is h/2 times their difference.
    """
    at = levels(process.schedule, steps)
    S = len(at.t)
    ahead, back = np.arange(S) * 2, np.arange(S - 1) * 2 + 1
    t, x, x_0 = np.empty(2 * S - 1, np.int64), np.ones(2 * S - 1), np.zeros((2 * S - 1, 2))
    t[ahead], t[back] = at.t, at.t[1:]
    x[ahead] = at.next_noise / at.noise
    x_0[ahead, 0] = at.next_signal - x[ahead] * at.signal
    s, next_s = at.noise[:-1] / at.signal[:-1], at.noise[1:] / at.signal[1:]
    half = (next_s - s) / (2 * next_s) * at.signal[1:]
    x_0[back] = np.stack([-half, half], axis=-1)
    return linear(process, t, x=x, x_0=x_0, clip=clip, order=2)
