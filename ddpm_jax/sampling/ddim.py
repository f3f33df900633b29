"""DDIM: denoising diffusion implicit models (Song, Meng & Ermon 2021), and the encoding of images to x_T."""

import numpy as np

from ddpm_jax.diffusion.process import Clip, Process
from ddpm_jax.diffusion.schedules import betas_between
from ddpm_jax.sampling.linear import levels, linear
from ddpm_jax.sampling.scan import Sampler


def ddim(process: Process, steps: np.ndarray, *, eta: float = 0.0, clip: Clip = True) -> Sampler:
    """x_s = sqrt(alpha-bar_s) x_0 + sqrt(1 - alpha-bar_s - sigma^2) eps + sigma z, Eq. (12) of the DDIM paper.

    steps: increasing t's. eta in [0, 1] scales sigma (their Eq. 16): 0 draws no noise, and 1 with all steps is ancestral sampling
    with fixed_small. x_0 is the clipped prediction, and eps the noise that it implies. Raises ValueError for eta outside [0, 1].
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"got eta = {eta:g}, expected from 0 (no noise) to 1 (ancestral)")
    at = levels(process.schedule, steps)
    sigma = eta * at.next_noise / at.noise * np.sqrt(betas_between(process.schedule, steps)[::-1])
    x = np.sqrt(np.maximum(0.0, at.next_noise**2 - sigma**2)) / at.noise  # rounding may leave less than 0
    return linear(
        process,
        at.t,
        x=x,
        x_0=(at.next_signal - x * at.signal)[:, None],
        noise=sigma if eta else None,
        clip=clip,
        order=1,
    )


def ddim_encode(process: Process, steps: np.ndarray) -> Sampler:
    """DDIM inversion (eta = 0): encodes images x_0 as the x_T from which `ddim` over the same steps recovers them.

    It is exact in the limit of many steps: like Euler's method, each step uses eps at the level it starts from. The clean image
    is evaluated at the first step. Nothing is clipped.
    """
    steps = np.asarray(steps)
    t = np.append(steps[0], steps[:-1])
    signal, noise = process.schedule.sqrt_alphas_cumprod, process.schedule.sqrt_one_minus_alphas_cumprod
    level = np.append(1.0, signal[steps[:-1]])
    # x' = signal' x / level + (noise'/signal' - noise/level) signal' eps, and eps = (x - signal_t x_0) / noise_t.
    change = noise[steps] - signal[steps] * np.append(0.0, noise[steps[:-1]]) / level
    return linear(
        process,
        t,
        x=signal[steps] / level + change / noise[t],
        x_0=(-change * signal[t] / noise[t])[:, None],
        clip=False,
        order=1,
    )
