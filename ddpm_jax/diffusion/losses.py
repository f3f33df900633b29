"""Training losses of one image batch, and the choice of t.

Every loss has the signature (process, model, x_0, t, eps) -> float (B,), one number for each image, where `model` is any
function (x_t, t) -> output. To add a loss, write a function and add it to `LOSSES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.diffusion.bound import bound_term
from ddpm_jax.diffusion.process import Images, Output, Process, Steps, q_sample, split_output, target
from ddpm_jax.diffusion.schedules import snr

Model = Callable[[Images, Steps], Output]


def _mse(process, output, x_0, x_t, t, eps):
    mean_part, _ = split_output(process, output)
    error = mean_part - target(process, x_0, x_t, t, eps)
    return jnp.mean(error**2, axis=(1, 2, 3))


def _vb(process, output, x_0, x_t, t):
    # Not clipped: a clipped x_0 has no gradient, and the authors clip for evaluation only.
    return bound_term(process, output, x_0, x_t, t, clip=False).bits


def simple_loss(process: Process, model: Model, x_0: Images, t: Steps, eps: Images) -> Float[Array, " B"]:
    """L_simple = |target - output(x_t, t)|^2, averaged over each image's dimensions, Eq. (14); target = eps by default.

    Args:
        process: The schedule, and what the network predicts.
        model: Any function (x_t, t) -> output.
        x_0: Images in [-1, 1], float (B, H, W, C).
        t: Zero-based steps, int32 (B,).
        eps: Standard normal draws of x_0's shape.

    Returns:
        The loss of each image, float (B,).

    Example:
        >>> import jax.numpy as jnp
        >>> from ddpm_jax import Process, make_schedule, simple_loss
        >>> x_0 = eps = jnp.ones((2, 4, 4, 1))
        >>> simple_loss(Process(make_schedule("linear")), lambda x_t, t: 0 * x_t, x_0, jnp.array([3, 500]), eps)
        Array([1., 1.], dtype=float32)
    """
    x_t = q_sample(process.schedule, x_0, t, eps)
    return _mse(process, model(x_t, t), x_0, x_t, t, eps)


def vb_loss(process: Process, model: Model, x_0: Images, t: Steps, eps: Images) -> Float[Array, " B"]:
    """L_t, one term of the bound in bits/dim (Eqs. 5, 12), not multiplied by T, as in the authors' code."""
    x_t = q_sample(process.schedule, x_0, t, eps)
    return _vb(process, model(x_t, t), x_0, x_t, t)


def rescaled_vb_loss(process: Process, model: Model, x_0: Images, t: Steps, eps: Images) -> Float[Array, " B"]:
    """T L_t: for uniform t its mean is the bound without L_T, in bits/dim."""
    return process.schedule.T * vb_loss(process, model, x_0, t, eps)


def _hybrid(process, model, x_0, t, eps, weight):
    x_t = q_sample(process.schedule, x_0, t, eps)
    output = model(x_t, t)
    mean_part, var_part = split_output(process, output)
    if var_part is None:
        raise ValueError(f"got variance {process.variance!r} with a hybrid loss, expected learned or learned_range")
    # The bound trains the variance only; the mean learns from the simple loss (Nichol & Dhariwal 2021, section 3.1).
    frozen_mean = jnp.concatenate([jax.lax.stop_gradient(mean_part), var_part], axis=-1)
    vb = _vb(process, frozen_mean, x_0, x_t, t)
    return _mse(process, output, x_0, x_t, t, eps) + weight * vb


def hybrid_loss(process: Process, model: Model, x_0: Images, t: Steps, eps: Images) -> Float[Array, " B"]:
    """L_simple + L_t, where L_t gives the mean no gradient: Nichol & Dhariwal's code without rescaling."""
    return _hybrid(process, model, x_0, t, eps, 1.0)


def rescaled_hybrid_loss(process: Process, model: Model, x_0: Images, t: Steps, eps: Images) -> Float[Array, " B"]:
    """L_simple + 0.001 T L_t: L_hybrid of Nichol & Dhariwal 2021, Eq. (16), lambda = 0.001."""
    return _hybrid(process, model, x_0, t, eps, 0.001 * process.schedule.T)


LOSSES: dict[str, Callable[..., Array]] = {
    "simple": simple_loss,
    "vb": vb_loss,
    "rescaled_vb": rescaled_vb_loss,
    "hybrid": hybrid_loss,
    "rescaled_hybrid": rescaled_hybrid_loss,
}


def min_snr_weights(process: Process, gamma: float) -> Float[np.ndarray, " T"]:
    """Weights of the simple loss at each t, float64: min(SNR, gamma) in units of x_0's error (Hang et al. 2023).

    The weight is min(SNR, gamma) / SNR for eps, min(SNR, gamma) for x_0 and min(SNR, gamma) / (SNR + 1) for v. Raises ValueError
    for x_prev, for which the method is not defined.
    """
    ratio, prediction = snr(process.schedule), process.prediction
    clipped = np.minimum(ratio, gamma)
    if prediction == "eps":
        return np.minimum(1.0, gamma / np.maximum(ratio, 1e-300))
    if prediction == "x_0":
        return clipped
    if prediction == "v":
        return clipped / (ratio + 1.0)
    raise ValueError(f"got min-SNR weights for prediction {prediction!r}, expected eps, x_0 or v")


def sample_t(key: Key[Array, ""], batch_size: int, T: int) -> Int[Array, " B"]:
    """t uniform on 0 .. T-1, int32 (B,) (Algorithm 1, line 3, zero-based)."""
    return jax.random.randint(key, (batch_size,), 0, T, jnp.int32)


class LossHistory(NamedTuple):
    """The last losses seen at each t, for choosing t by importance (Nichol & Dhariwal 2021, section 3.3).

    losses: float32 (T, n), a ring buffer for each t. count: int32 (T,), the number of losses written so far.
    """

    losses: Float[Array, "T n"]
    count: Int[Array, " T"]  # type: ignore[assignment]  # hides tuple.count, which nobody asks of it


def init_loss_history(T: int, n: int = 10) -> LossHistory:
    """An empty history of the last n losses at each of T steps."""
    return LossHistory(jnp.zeros((T, n), jnp.float32), jnp.zeros((T,), jnp.int32))


def t_probabilities(history: LossHistory, *, uniform: float = 0.001) -> Float[Array, " T"]:
    """p_t proportional to sqrt(E[L_t^2]) over the history, mixed with a uniform distribution; uniform until every t is full.

    uniform: the share of the uniform distribution, as in Nichol & Dhariwal's code.
    """
    T, n = history.losses.shape
    p = jnp.sqrt(jnp.mean(history.losses**2, axis=1)) + jnp.finfo(jnp.float32).tiny  # uniform if all losses are 0
    p = p / p.sum() * (1.0 - uniform) + uniform / T
    return jnp.where(jnp.all(history.count >= n), p, 1.0 / T)


def importance_sample_t(
    key: Key[Array, ""], batch_size: int, history: LossHistory
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws t (B,) by `t_probabilities`, and gives the weights 1 / (T p_t) that keep the expected loss unbiased."""
    p = t_probabilities(history)
    cumulative = jnp.cumsum(p)
    u = jax.random.uniform(key, (batch_size,)) * cumulative[-1]
    t = jnp.clip(jnp.searchsorted(cumulative, u, side="right"), 0, p.shape[0] - 1).astype(jnp.int32)
    return t, 1.0 / (p.shape[0] * p[t])


def update_loss_history(history: LossHistory, t: Int[Array, " B"], losses: Float[Array, " B"]) -> LossHistory:
    """The history with this batch's losses written in batch order; if a t has more than n, the last n stay."""
    T, n = history.losses.shape
    same = t[:, None] == t[None, :]
    before = jnp.sum(same & (jnp.arange(len(t))[None, :] < jnp.arange(len(t))[:, None]), axis=1)
    total = same.sum(axis=1)
    slot = (history.count[t] + before) % n
    row = jnp.where(total - before <= n, t, T)  # T is out of range: such a write is dropped
    losses = losses.astype(history.losses.dtype)
    return LossHistory(history.losses.at[row, slot].set(losses, mode="drop"), history.count.at[t].add(1))
