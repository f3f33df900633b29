"""Variance schedules: betas by name, and the tables of the forward process and its posterior.

All tables are float64 NumPy, indexed by the zero-based t of the authors' code: t = 0 is one step of noise, so `betas[t]` is
the paper's beta_{t+1} and `alphas_cumprod[t]` its alpha-bar_{t+1}. `process.at` casts them to the images' dtype.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Schedule:
    """The forward process q (Eqs. 2, 4) and its posterior (Eqs. 6, 7) as tables of length T, float64.

    Build it with `make_schedule` or `schedule_from_betas`, which check their input.

    Example:
        >>> from ddpm_jax import make_schedule
        >>> float(make_schedule("linear").alphas_cumprod[0])
        0.9999
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_logvar_clipped: np.ndarray
    fixed_large_logvar: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray

    @property
    def T(self) -> int:
        """The number of diffusion steps."""
        return self.betas.shape[0]


def linear(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """Betas equally spaced from beta_start to beta_end: the paper's schedule (section 4: 1e-4 to 0.02)."""
    return np.linspace(beta_start, beta_end, T)


def quad(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """Square roots of the betas equally spaced (the authors' code)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, T) ** 2


def const(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """All betas equal beta_end (the authors' code)."""
    return np.full(T, beta_end)


def jsd(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """Betas 1/T, 1/(T-1), ..., 1 (the authors' code); alphas_cumprod falls linearly to exactly 0."""
    return 1.0 / np.linspace(T, 1, T)


def _warmup(T: int, beta_start: float, beta_end: float, fraction: float) -> Float[np.ndarray, " T"]:
    betas = np.full(T, beta_end)
    n = int(T * fraction)
    betas[:n] = np.linspace(beta_start, beta_end, n)
    return betas


def warmup10(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """Linear over the first tenth of the steps, then beta_end (the authors' code)."""
    return _warmup(T, beta_start, beta_end, 0.1)


def warmup50(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """Linear over the first half of the steps, then beta_end (the authors' code)."""
    return _warmup(T, beta_start, beta_end, 0.5)


def cosine(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """beta_t = min(1 - f(t+1)/f(t), 0.999), f(t) = cos^2((t/T + s)/(1 + s) * pi/2), s = 0.008.

    Nichol & Dhariwal 2021, Eq. (17); beta_start and beta_end are not used.
    """
    s = 0.008
    f = np.cos((np.arange(T + 1) / T + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


def sigmoid(T: int, beta_start: float, beta_end: float) -> Float[np.ndarray, " T"]:
    """Betas along the logistic curve from -6 to 6, scaled to beta_start .. beta_end (Xu et al. 2022, GeoDiff)."""
    return beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, T)))


BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    f.__name__: f for f in (linear, quad, const, jsd, warmup10, warmup50, cosine, sigmoid)
}


def make_schedule(name: str, *, T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """The schedule of the given name with T steps; `linear` with these defaults is the paper's.

    Args:
        name: A key of `BETAS`: linear, quad, const, jsd, warmup10, warmup50, cosine, sigmoid.
        T: The number of diffusion steps, at least 2.
        beta_start: First beta, in (0, 1].
        beta_end: Last beta, in (0, 1]. Both ends are used as they are for any T, as in the authors' code.

    Returns:
        The `Schedule`, float64 tables of length T.

    Raises:
        ValueError: For an unknown name, T < 2 or a beta outside (0, 1].

    Example:
        >>> from ddpm_jax import make_schedule
        >>> make_schedule("linear").T
        1000
    """
    if name not in BETAS:
        raise ValueError(f"got schedule {name!r}, expected one of {', '.join(BETAS)}")
    if T < 2:
        raise ValueError(f"got T = {T}, expected at least 2 diffusion steps")
    for option, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 < beta <= 1:
            raise ValueError(f"got {option} = {beta:g}, expected above 0 and at most 1")
    return schedule_from_betas(BETAS[name](T, beta_start, beta_end))


def schedule_from_betas(betas: np.ndarray) -> Schedule:
    """All tables from the betas of any schedule, shape (T,), each in (0, 1]; computed in float64.

    Raises ValueError for fewer than 2 betas or a beta outside (0, 1].
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or betas.shape[0] < 2:
        raise ValueError(f"got betas of shape {betas.shape}, expected a vector of at least 2")
    if not np.all((betas > 0) & (betas <= 1)):
        raise ValueError(f"got betas from {betas.min():g} to {betas.max():g}, expected each above 0 and at most 1")
    alphas_cumprod = np.cumprod(1.0 - betas)
    # t = 0 has no predecessor: alpha-bar before it is 1, and an index of t - 1 would wrap to the last entry.
    alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
    with np.errstate(divide="ignore"):  # jsd ends at alphas_cumprod = 0, where eps does not determine x_0
        # 1 - alphas_cumprod would round, to 0 for the smallest betas.
        one_minus_alphas_cumprod = -np.expm1(np.cumsum(np.log1p(-betas)))
        sqrt_recip_alphas_cumprod = np.sqrt(1.0 / alphas_cumprod)
        sqrt_recipm1_alphas_cumprod = np.sqrt(one_minus_alphas_cumprod / alphas_cumprod)
    one_minus_alphas_cumprod_prev = np.append(0.0, one_minus_alphas_cumprod[:-1])
    posterior_variance = betas * (one_minus_alphas_cumprod_prev / one_minus_alphas_cumprod)
    return Schedule(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(one_minus_alphas_cumprod),
        log_one_minus_alphas_cumprod=np.log(one_minus_alphas_cumprod),
        sqrt_recip_alphas_cumprod=sqrt_recip_alphas_cumprod,
        sqrt_recipm1_alphas_cumprod=sqrt_recipm1_alphas_cumprod,
        posterior_variance=posterior_variance,
        # The posterior variance at t = 0 is 0, and its log is not finite: both logs use the value at t = 1.
        posterior_logvar_clipped=np.log(np.append(posterior_variance[1], posterior_variance[1:])),
        fixed_large_logvar=np.log(np.append(posterior_variance[1], betas[1:])),
        posterior_mean_coef1=np.sqrt(alphas_cumprod_prev) * betas / one_minus_alphas_cumprod,
        posterior_mean_coef2=np.sqrt(1.0 - betas) * one_minus_alphas_cumprod_prev / one_minus_alphas_cumprod,
    )


def betas_between(schedule: Schedule, steps: np.ndarray) -> Float[np.ndarray, " S"]:
    """1 - alpha-bar(steps[i]) / alpha-bar(steps[i-1]) of increasing t's, float64; before the first alpha-bar is 1."""
    starts = np.append(0, np.asarray(steps)[:-1] + 1)
    with np.errstate(divide="ignore"):  # a beta of 1
        # The product of the alphas between two steps, since the ratio of their alpha-bars would round.
        log_alphas = np.add.reduceat(np.log1p(-schedule.betas[: steps[-1] + 1]), starts)
    return -np.expm1(log_alphas)


def respace(schedule: Schedule, steps: np.ndarray) -> Schedule:
    """The process that visits only the given steps, whose betas are `betas_between` them.

    steps: increasing t's, at least 2, int (S,). Entry i of the new tables belongs to t = steps[i].
    """
    return schedule_from_betas(betas_between(schedule, steps))


def snr(schedule: Schedule) -> Float[np.ndarray, " T"]:
    """Signal-to-noise ratio alpha-bar_t / (1 - alpha-bar_t) of each t, float64."""
    return (schedule.sqrt_alphas_cumprod / schedule.sqrt_one_minus_alphas_cumprod) ** 2
