"""Power-function averages, and any of them rebuilt from snapshots of others (Karras et al. 2024, arXiv 2312.02696, section 3).

The average over the steps 1 .. t weighs the parameters of step k by the integral over (k-1, k] of the profile

    p(tau) = (gamma + 1) / t^(gamma + 1) * tau^gamma,    0 <= tau <= t.

Its relative width is the profile's standard deviation divided by t. All numbers here are float64, on the host.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Profile(NamedTuple):
    """A profile: its exponent, and its last step."""

    gamma: float
    t: float


def gamma_of(width: float) -> float:
    """The exponent of a relative width below 1/sqrt(12), from width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def inner(a: Sequence[Profile], b: Sequence[Profile]) -> Float[np.ndarray, "a b"]:
    """The inner products of profiles: the integrals of p_a p_b, in closed form."""
    gamma, t = (np.asarray([getattr(p, name) for p in a], np.float64)[:, None] for name in Profile._fields)
    other_gamma, other_t = (np.asarray([getattr(p, name) for p in b], np.float64)[None] for name in Profile._fields)
    first, last = np.minimum(t, other_t), np.maximum(t, other_t)
    exponent = np.where(t < other_t, other_gamma, gamma)  # of the profile that lasts longer
    return (gamma + 1) * (other_gamma + 1) / (gamma + other_gamma + 1) * (first / last) ** exponent / last


class Fit(NamedTuple):
    """A profile as a sum of others: their coefficients, and the norm of what is left, relative to the profile's."""

    coefficients: Float[np.ndarray, " n"]
    error: float


def fit(profiles: Sequence[Profile], target: Profile) -> Fit:
    """The least-squares fit of a profile by others.

    Unlike the paper's, the coefficients sum to 1, so that an average of parameters that stand still is these parameters: with
    few snapshots the rebuilt parameters are then tens of times closer.
    """
    gram, to_target = inner(profiles, profiles), inner(profiles, [target])
    norms = np.sqrt(np.diag(gram))  # profiles of norm 1 make the system well-conditioned
    sums = 1 / norms[:, None]
    system = np.block([[gram / np.outer(norms, norms), sums], [sums.T, np.zeros((1, 1))]])  # with Lagrange's multiplier
    solved = np.linalg.solve(system, np.concatenate([to_target[:, 0] / norms, [1.0]]))
    x, norm = solved[:-1] / norms, inner([target], [target])[0, 0]
    left = norm - 2 * to_target[:, 0] @ x + x @ gram @ x
    return Fit(x, float(np.sqrt(max(left, 0.0) / norm)))
