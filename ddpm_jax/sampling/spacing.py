"""Spacings: the steps of 0 .. T-1 that a sampler visits, increasing and distinct."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from ddpm_jax.diffusion.schedules import Schedule

Steps = Int[np.ndarray, " S"]


def linspace(schedule: Schedule, n: int) -> Steps:
    """Equally spaced from 0 to T-1, including both."""
    return _distinct(np.linspace(schedule.T - 1, 0, n)[::-1], schedule.T)


def leading(schedule: Schedule, n: int) -> Steps:
    """0, d, 2d, ... with d = T // n: the DDIM paper's "linear". The noisiest steps are left out."""
    return np.arange(n) * (schedule.T // n)


def trailing(schedule: Schedule, n: int) -> Steps:
    """T-1, T-1-T/n, ...: the noisiest step is always visited (Lin et al. 2023)."""
    return _distinct(schedule.T - 1 - np.arange(n)[::-1] * (schedule.T / n), schedule.T)


def quadratic(schedule: Schedule, n: int) -> Steps:
    """From 0 to T-1 with equally spaced square roots: denser where there is little noise."""
    return _distinct(np.linspace(np.sqrt(schedule.T - 1), 0, n)[::-1] ** 2, schedule.T)


def logsnr(schedule: Schedule, n: int) -> Steps:
    """From 0 to T-1, equally spaced in log-SNR (Lu et al. 2022). Raises ValueError if the SNR ends at 0 (`jsd`)."""
    if schedule.alphas_cumprod[-1] == 0:
        raise ValueError("got spacing 'logsnr' with a schedule whose last alphas_cumprod is 0; use another spacing")
    falling = np.log(schedule.sqrt_one_minus_alphas_cumprod / schedule.sqrt_alphas_cumprod)  # minus half the log-SNR
    return _distinct(
        np.interp(np.linspace(falling[-1], falling[0], n)[::-1], falling, np.arange(schedule.T)), schedule.T
    )


def _distinct(places: np.ndarray, T: int) -> Steps:
    """Rounds to whole steps, and moves coinciding ones to the next free step."""
    n = np.arange(len(places))
    steps = np.maximum.accumulate(np.round(places).astype(np.int64) - n) + n
    return np.minimum(steps, T - len(places) + n)


SPACINGS: dict[str, Callable[[Schedule, int], Steps]] = {
    f.__name__: f for f in (linspace, leading, trailing, quadratic, logsnr)
}


def choose_steps(schedule: Schedule, counts: int | Sequence[int] = (), spacing: str = "linspace") -> Steps:
    """The steps to visit.

    counts: () for all; n for n steps by a spacing of `SPACINGS`; several numbers for the steps in each of equal sections of T,
    from the least noise to the most, rounded as in Nichol & Dhariwal's code.

    Raises ValueError for an unknown spacing or too many steps.
    """
    counts = (counts,) if isinstance(counts, int) else tuple(counts)
    if spacing not in SPACINGS:
        raise ValueError(f"got spacing {spacing!r}, expected one of {', '.join(SPACINGS)}")
    if not counts:
        return np.arange(schedule.T)
    if len(counts) > 1 and spacing != "linspace":
        raise ValueError(f"got sections of {counts} steps and spacing {spacing!r}, expected linspace for sections")
    size, longer = divmod(schedule.T, len(counts))
    ends = [size * i + min(i, longer) for i in range(len(counts) + 1)]
    for count, first, end in zip(counts, ends, ends[1:], strict=False):
        if not 1 <= count <= end - first:
            raise ValueError(
                f"got {count} steps of the {end - first} from t = {first} on, expected from 1 to {end - first}"
            )
    if len(counts) == 1:
        return SPACINGS[spacing](schedule, counts[0])
    return np.concatenate([_section(*each) for each in zip(counts, ends, ends[1:], strict=False)])


def _section(count: int, first: int, end: int) -> Steps:
    """`count` of the steps first .. end-1. As in Nichol & Dhariwal's code the stride is summed, and the sums are rounded."""
    stride = (end - first - 1) / (count - 1) if count > 1 else 1.0
    places = [0.0]
    while len(places) < count:
        places.append(places[-1] + stride)
    return np.array([first + round(place) for place in places])
