"""DPM-Solver++ (Lu et al. 2022): multistep solvers of the probability-flow ODE in x_0 and half log-SNR."""

import numpy as np

from ddpm_jax.diffusion.process import Clip, Process
from ddpm_jax.sampling.linear import levels, linear
from ddpm_jax.sampling.scan import Sampler

FEW_STEPS = 15  # with fewer steps, the last ones use lower orders, as the method's authors recommend


def dpm_solver(process: Process, steps: np.ndarray, *, order: int = 2, clip: Clip = True) -> Sampler:
    """DPM-Solver++(1S, 2M or 3M), by order: x_s = noise_s/noise_t x + signal_s (integral of e^(lambda - lambda_s) x_0(lambda)).

    steps: increasing t's; lambda = log(signal/noise). x_0(lambda) is the polynomial through the last `order` predictions, or
    fewer at the first steps. 2M uses its value at the middle of the step, as in Algorithm 2 of the paper. 3M integrates the
    parabola exactly, which gives third order; the method's own code halves the quadratic term. The last step, to the clean
    image, has order 1. With fewer than 15 steps, the step before it has order 2 at most. Order 1 is DDIM with eta = 0. Raises
    ValueError for another order.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"got order {order}, expected 1, 2 or 3")
    at = levels(process.schedule, steps)
    S = len(at.t)
    lambdas = np.log(at.signal / at.noise)
    x_0 = np.zeros((S, order))
    for k in range(S):
        of_order = min(order, k + 1, S - k if S < FEW_STEPS or k == S - 1 else order)
        if of_order == 1:
            x_0[k, 0] = at.next_signal[k] - at.signal[k] * at.next_noise[k] / at.noise[k]
            continue
        h = lambdas[k + 1] - lambdas[k]
        # Integrals over the step of 1, u, u^2 with weight e^(u - h), where u = lambda - lambda_k.
        weight = -np.expm1(-h)
        if of_order == 2:  # Algorithm 2 evaluates the line at the middle of the step
            averages = [weight, weight * h / 2]
        else:
            averages = [weight, h - weight, h**2 - 2 * (h - weight)]
        past = lambdas[k - np.arange(of_order)] - lambdas[k]
        powers = np.vander(past, of_order, increasing=True)  # the polynomial's values at these places, by coefficient
        x_0[k, :of_order] = at.next_signal[k] * np.linalg.solve(powers.T, averages)
    return linear(process, at.t, x=at.next_noise / at.noise, x_0=x_0, clip=clip, order=order)
