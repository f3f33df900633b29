"""The diffusion process: q(x_t | x_0), its posterior, predictions of a network, and p(x_{t-1} | x_t).

All functions are pure. They take a `Schedule`, or a `Process` if they interpret a network's output. Images x are float
(B, H, W, C) in [-1, 1]; t is int32 (B,), zero-based (t = 0 is one step of noise, the paper's t = 1). `prediction` names what a
network's output is:

    eps     the noise in x_t                          (the paper's choice, section 3.2)
    x_0     the clean image
    x_prev  the mean of q(x_{t-1} | x_t, x_0), Eq. (7)  (the paper's "mu-tilde prediction")
    v       sqrt(alpha-bar) eps - sqrt(1 - alpha-bar) x_0   (Salimans & Ho 2022)

and its `variance` one of fixed_small, fixed_large, learned, learned_range; the last two take the second half of the output's
channels.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddpm_jax.diffusion.schedules import Schedule
from ddpm_jax.diffusion.words import Prediction, Variance

# Treatment of a predicted x_0: clip to [-1, 1] (True), leave (False), or threshold at this quantile (a float).
Clip = bool | float

Images = Float[Array, "B H W C"]
Output = Float[Array, "B H W D"]  # D = C, or 2 C where the variance is learned
Steps = Int[Array, " B"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["schedule"], meta_fields=["prediction", "variance"])
@dataclass(frozen=True, eq=False)
class Process:
    """A schedule, and the meaning of a network's output.

    Args:
        schedule: The forward process.
        prediction: What the output stands for: eps, x_0, x_prev or v.
        variance: The variance of p(x_{t-1} | x_t): fixed_small, fixed_large, learned or learned_range.

    Both words are checked where they are used.

    Example:
        >>> from ddpm_jax import Process, make_schedule
        >>> Process(make_schedule("cosine", T=50), prediction="v").learns_variance
        False
    """

    schedule: Schedule
    prediction: Prediction = "eps"
    variance: Variance = "fixed_large"

    @property
    def learns_variance(self) -> bool:
        """Whether the network has a second half of output channels, for the variance."""
        return self.variance in ("learned", "learned_range")


class Gaussian(NamedTuple):
    """A diagonal Gaussian: its mean (B, H, W, C) and log-variance (broadcastable to it)."""

    mean: Float[Array, "B H W C"]
    logvar: Float[Array, " B #H #W #C"]


class Reverse(NamedTuple):
    """p(x_{t-1} | x_t): its mean and log-variance (broadcastable to it), and the x_0 that the output stands for."""

    mean: Float[Array, "B H W C"]
    logvar: Float[Array, " B #H #W #C"]
    x_0: Float[Array, "B H W C"]


def at(table: np.ndarray | Array, t: Steps, x: Images) -> Float[Array, "B 1 1 1"]:
    """Entry t of a schedule's table for each image, cast to x's dtype."""
    return jnp.asarray(table, x.dtype)[t][:, None, None, None]


def q_mean_logvar(schedule: Schedule, x_0: Images, t: Steps) -> Gaussian:
    """q(x_t | x_0) = N(sqrt(alpha-bar_t) x_0, (1 - alpha-bar_t) I), Eq. (4)."""
    return Gaussian(at(schedule.sqrt_alphas_cumprod, t, x_0) * x_0, at(schedule.log_one_minus_alphas_cumprod, t, x_0))


def q_sample(schedule: Schedule, x_0: Images, t: Steps, eps: Images) -> Images:
    """Samples q(x_t | x_0): x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps, Eq. (4).

    Args:
        schedule: The forward process.
        x_0: Images in [-1, 1], float (B, H, W, C).
        t: Zero-based steps, int32 (B,), in 0 .. T-1.
        eps: Standard normal draws of x_0's shape.

    Returns:
        x_t, of x_0's shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from ddpm_jax import make_schedule, q_sample
        >>> x_0 = jnp.ones((2, 8, 8, 1))
        >>> q_sample(make_schedule("linear"), x_0, jnp.array([0, 999]), jnp.zeros_like(x_0))[:, 0, 0, 0].round(3)
        Array([1.   , 0.006], dtype=float32)
    """
    signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    return at(signal, t, x_0) * x_0 + at(noise, t, x_0) * eps


def q_posterior(schedule: Schedule, x_0: Images, x_t: Images, t: Steps) -> Gaussian:
    """q(x_{t-1} | x_t, x_0), Eqs. (6) and (7).

    Args:
        schedule: The forward process.
        x_0: Images in [-1, 1], float (B, H, W, C).
        x_t: Noised images of the same shape.
        t: Zero-based steps, int32 (B,).

    Returns:
        The mean (B, H, W, C) and the log-variance (B, 1, 1, 1). At t = 0, where the variance is 0, the log-variance is that of
        t = 1: the authors' clipping, so that it stays finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from ddpm_jax import make_schedule, q_posterior
        >>> x_0, x_t = jnp.ones((1, 2, 2, 1)), jnp.zeros((1, 2, 2, 1))
        >>> bool(jnp.allclose(q_posterior(make_schedule("linear"), x_0, x_t, jnp.array([0])).mean, x_0))
        True
    """
    return Gaussian(
        at(schedule.posterior_mean_coef1, t, x_t) * x_0 + at(schedule.posterior_mean_coef2, t, x_t) * x_t,
        at(schedule.posterior_logvar_clipped, t, x_t),
    )


def predict_x_0(process: Process, output: Images, x_t: Images, t: Steps) -> Images:
    """The x_0 that a network's output stands for; for eps it is Eq. (15). Not clipped.

    Args:
        process: What the output means.
        output: The network's at (x_t, t), (B, H, W, C), without variance channels (see `split_output`).
        x_t: Noised images of the same shape.
        t: Zero-based steps, int32 (B,). With eps, alphas_cumprod[t] must not be 0 (`jsd` ends so).

    Returns:
        x_0, (B, H, W, C).

    Raises:
        ValueError: For an unknown prediction.

    Example:
        >>> import jax.numpy as jnp
        >>> from ddpm_jax import Process, make_schedule, predict_x_0
        >>> output = x_t = jnp.ones((1, 2, 2, 1))
        >>> bool((predict_x_0(Process(make_schedule("linear"), "x_0"), output, x_t, jnp.array([5])) == output).all())
        True
    """
    schedule, prediction = process.schedule, process.prediction
    if prediction == "eps":
        return at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t - (
            at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * output
        )
    if prediction == "x_0":
        return output
    if prediction == "x_prev":
        coef1, coef2 = schedule.posterior_mean_coef1, schedule.posterior_mean_coef2
        return (output - at(coef2, t, x_t) * x_t) / at(coef1, t, x_t)
    if prediction == "v":
        signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        return at(signal, t, x_t) * x_t - at(noise, t, x_t) * output
    raise ValueError(f"got prediction {prediction!r}, expected one of {', '.join(get_args(Prediction))}")


def clip_x_0(x_0: Images, clip: Clip) -> Images:
    """x_0 clipped to [-1, 1], as it is, or, for a float in (0, 1), by dynamic thresholding (Saharia et al. 2022).

    Dynamic thresholding clips each image to [-s, s] and divides it by s, where s is that quantile of its |x_0|, or 1 if that
    is larger. Raises ValueError for a number that is no quantile.
    """
    if isinstance(clip, bool):
        return jnp.clip(x_0, -1.0, 1.0) if clip else x_0
    if not 0.0 < clip < 1.0:
        raise ValueError(f"got clip = {clip:g}, expected True, False or a quantile between 0 and 1")
    s = jnp.maximum(1.0, jnp.quantile(jnp.abs(x_0), clip, axis=(1, 2, 3), keepdims=True))
    return jnp.clip(x_0, -s, s) / s


def predict_from_x_0(process: Process, x_0: Images, x_t: Images, t: Steps) -> Images:
    """The eps, x_0, x_prev or v that belongs to x_0 and x_t: the inverse of `predict_x_0`."""
    schedule, prediction = process.schedule, process.prediction
    if prediction == "eps":
        signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        return (x_t - at(signal, t, x_t) * x_0) / at(noise, t, x_t)
    if prediction == "x_0":
        return x_0
    if prediction == "x_prev":
        return q_posterior(schedule, x_0, x_t, t).mean
    if prediction == "v":
        signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        return (at(signal, t, x_t) * x_t - x_0) / at(noise, t, x_t)
    raise ValueError(f"got prediction {prediction!r}, expected one of {', '.join(get_args(Prediction))}")


def target(process: Process, x_0: Images, x_t: Images, t: Steps, eps: Images) -> Images:
    """The target of a network at x_t = q_sample(x_0, t, eps)."""
    if process.prediction == "eps":
        return eps  # exact; computing it from x_0 would round
    if process.prediction == "v":
        schedule = process.schedule
        signal, noise = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        return at(signal, t, x_t) * eps - at(noise, t, x_t) * x_0
    return predict_from_x_0(process, x_0, x_t, t)


def split_output(process: Process, output: Output) -> tuple[Images, Images | None]:
    """Splits a network's output into (mean part, variance part); the latter is None for a fixed variance.

    Raises ValueError for a learned variance and an odd number of channels.
    """
    variance = process.variance
    if variance in ("fixed_small", "fixed_large"):
        return output, None
    if variance not in ("learned", "learned_range"):
        raise ValueError(f"got variance {variance!r}, expected one of {', '.join(get_args(Variance))}")
    if output.shape[-1] % 2:
        raise ValueError(f"got {output.shape[-1]} output channels, expected an even number for variance {variance!r}")
    mean, var = jnp.split(output, 2, axis=-1)
    return mean, var


def p_mean_logvar(process: Process, output: Output, x_t: Images, t: Steps, *, clip: Clip = True) -> Reverse:
    """p(x_{t-1} | x_t) from a network's output: the mean (Eq. 11 for eps), the log-variance, and x_0.

    Variances: fixed_large sigma^2 = beta_t and fixed_small the posterior's (section 3.2), both with t = 1's posterior variance
    at t = 0; learned the output's second half as log-variance; learned_range that half, v in [-1, 1], interpolating between
    the posterior's log-variance and log beta_t (Nichol & Dhariwal 2021, Eq. 15).

    Args:
        process: What the output means.
        output: The network's at (x_t, t): (B, H, W, C), or (B, H, W, 2 C) for a learned variance.
        x_t: Noised images, float (B, H, W, C).
        t: Zero-based steps, int32 (B,).
        clip: Clip the predicted x_0 to [-1, 1], leave it, or threshold it at a quantile (`clip_x_0`). As in the authors' code
            this comes before the mean is computed from x_0. With `x_prev` the mean is the output itself, so only the returned
            x_0 is clipped.

    Returns:
        The mean and x_0, (B, H, W, C), and the log-variance, broadcastable to them.

    Raises:
        ValueError: For an unknown word, or a learned variance in an odd number of channels.

    Example:
        >>> import jax.numpy as jnp
        >>> from ddpm_jax import Process, make_schedule, p_mean_logvar
        >>> x_t = jnp.zeros((1, 2, 2, 1))
        >>> p = p_mean_logvar(Process(make_schedule("linear"), "x_0"), x_t + 3, x_t, jnp.array([0]))
        >>> float(p.mean.max()), float(p.x_0.max())
        (1.0, 1.0)
    """
    schedule, variance = process.schedule, process.variance
    mean_part, var_part = split_output(process, output)
    x_0 = clip_x_0(predict_x_0(process, mean_part, x_t, t), clip)
    mean = mean_part if process.prediction == "x_prev" else q_posterior(schedule, x_0, x_t, t).mean
    if var_part is None:
        small = variance == "fixed_small"
        logvar = at(schedule.posterior_logvar_clipped if small else schedule.fixed_large_logvar, t, x_t)
    elif variance == "learned":
        logvar = var_part
    else:
        low, high = at(schedule.posterior_logvar_clipped, t, x_t), jnp.log(at(schedule.betas, t, x_t))
        fraction = (var_part + 1.0) / 2.0
        logvar = fraction * high + (1.0 - fraction) * low
    return Reverse(mean, logvar, x_0)
