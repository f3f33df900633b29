"""The variational bound: KL terms, the discretised decoder, bits/dim, and the rate-distortion split (section 4.3).

All terms are in bits/dim: nats / (D ln 2) with D = H W C. The bound is L_T + sum over t >= 1 of L_t + L_0 (Eq. 5), where
zero-based t = 0 is the decoder.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.core import rng
from ddpm_jax.diffusion.process import (
    Images,
    Output,
    Process,
    Steps,
    p_mean_logvar,
    q_mean_logvar,
    q_posterior,
    q_sample,
)
from ddpm_jax.diffusion.schedules import Schedule


def normal_kl(mean1: Array, logvar1: Array, mean2: Array, logvar2: Array) -> Array:
    """KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)), elementwise, in nats."""
    # expm1: for nearly equal variances exp(x) - 1 - x would lose its digits in float32.
    variances = jnp.expm1(logvar1 - logvar2) - (logvar1 - logvar2)
    return 0.5 * (variances + (mean1 - mean2) ** 2 * jnp.exp(-logvar2))


def discretized_gaussian_log_likelihood(x_0: Array, mean: Array, logvar: Array) -> Array:
    """log of the Gaussian's probability of x_0's bin, Eq. (13), elementwise, in nats.

    x_0 are pixels x / 127.5 - 1. Bins have width 2/255, and the first and last extend to infinity. Probabilities are at least
    1e-12, as in the authors' code. The normal CDF is exact; the authors use a tanh approximation, which is off by up to 0.56
    bits four bins from the mean at the smallest sigma. Differences are taken in the tail of x_0, where float32 keeps its
    relative precision.
    """
    inverse_sigma = jnp.exp(-0.5 * logvar)
    centred = x_0 - mean
    sign = jnp.where(centred > 0, -1.0, 1.0)  # reflect, so that both CDFs are those of a lower tail
    plus = inverse_sigma * (centred + 1.0 / 255.0)
    minus = inverse_sigma * (centred - 1.0 / 255.0)
    inner = sign * (ndtr(sign * plus) - ndtr(sign * minus))
    probability = jnp.where(x_0 < -0.999, ndtr(plus), jnp.where(x_0 > 0.999, ndtr(-minus), inner))
    return jnp.log(jnp.maximum(probability, 1e-12))


def mean_bits(nats: Float[Array, "B H W C"]) -> Float[Array, " B"]:
    """Nats per dimension, averaged over each image and converted to bits/dim."""
    return jnp.mean(nats, axis=(1, 2, 3)) / math.log(2.0)


def prior_bits(schedule: Schedule, x_0: Images) -> Float[Array, " B"]:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image, in bits/dim, Eq. (5)."""
    q = q_mean_logvar(schedule, x_0, jnp.full(x_0.shape[:1], schedule.T - 1, jnp.int32))
    zero = jnp.zeros((), x_0.dtype)
    return mean_bits(normal_kl(q.mean, q.logvar, zero, zero))


class BoundTerm(NamedTuple):
    """One term of the bound for each image, and the predicted x_0 (B, H, W, C)."""

    bits: Float[Array, " B"]
    x_0: Float[Array, "B H W C"]


def bound_term(process: Process, output: Output, x_0: Images, x_t: Images, t: Steps, *, clip: bool) -> BoundTerm:
    """L_t in bits/dim: the KL of Eq. (5) where t >= 1, the decoder's negative log-likelihood (Eq. 13) where t = 0.

    output: the network's at (x_t, t). clip: clip x_0 to [-1, 1]; the authors do so for evaluation, not for training.
    """
    q = q_posterior(process.schedule, x_0, x_t, t)
    p = p_mean_logvar(process, output, x_t, t, clip=clip)
    kl = mean_bits(normal_kl(q.mean, q.logvar, p.mean, p.logvar))
    decoder = mean_bits(-discretized_gaussian_log_likelihood(x_0, p.mean, p.logvar))
    return BoundTerm(jnp.where(t == 0, decoder, kl), p.x_0)


class Terms(NamedTuple):
    """Some terms of the bound of each image, at t = ts[:, s].

    bits[:, s] is L_t in bits/dim, and mse[:, s] the mean squared error of the predicted x_0 (pixels in [-1, 1]).
    """

    bits: Float[Array, "B S"]
    mse: Float[Array, "B S"]


def bound_terms(
    process: Process, model, key: Key[Array, ""], x_0: Images, indices, ts: Int[Array, "B S"], *, clip: bool = True
) -> Terms:
    """L_t of each image at its own times (zero-based), with one draw of x_t for each, as in `bits_per_dim`."""
    keys = rng.image_keys(key, indices)

    def body(carry, t):
        x_t = q_sample(process.schedule, x_0, t, rng.image_normal(keys, t, x_0.shape[1:], x_0.dtype))
        term = bound_term(process, model(x_t, t), x_0, x_t, t, clip=clip)
        return carry, (term.bits, jnp.mean((term.x_0 - x_0) ** 2, axis=(1, 2, 3)))

    _, (bits, mse) = jax.lax.scan(body, None, ts.T)
    return Terms(bits.T, mse.T)


class Bits(NamedTuple):
    """The variational bound of each image, in bits/dim, and its parts.

    total = L_T + L_t.sum(axis=1); L_t[:, 0] is the decoder's L_0 (the paper's distortion term), the others its rate.
    mse[:, t] is the mean squared error of the predicted x_0 (pixels in [-1, 1]).
    """

    total: Float[Array, " B"]
    L_T: Float[Array, " B"]
    L_t: Float[Array, "B T"]
    mse: Float[Array, "B T"]


def bits_per_dim(process: Process, model, key: Key[Array, ""], x_0: Images, indices, *, clip: bool = True) -> Bits:
    """The variational bound on -log2 p(x_0) / D of each image, all T terms, Eq. (5); one draw of x_t for each t.

    Args:
        process: The schedule, and what the network's output means.
        model: Any function (x_t, t) -> output.
        key: The key of all draws; the draw of image i at t depends on (key, i, t) alone.
        x_0: Pixels x / 127.5 - 1 of 8-bit images, float (B, H, W, C).
        indices: The images' global places, int (B,).
        clip: Clip each predicted x_0 to [-1, 1], as the authors do for evaluation.

    Returns:
        The total and its terms, in bits/dim: `Bits`. One `lax.scan` over t computes them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from ddpm_jax import Process, bits_per_dim, make_schedule
        >>> process, x_0 = Process(make_schedule("cosine", T=20)), jnp.zeros((2, 4, 4, 1))
        >>> bits = bits_per_dim(process, lambda x_t, t: x_t, jax.random.key(0), x_0, jnp.arange(2))
        >>> bits.L_t.shape
        (2, 20)
    """
    ts = jnp.broadcast_to(jnp.arange(process.schedule.T, dtype=jnp.int32), (len(x_0), process.schedule.T))
    terms = bound_terms(process, model, key, x_0, indices, ts, clip=clip)
    L_T = prior_bits(process.schedule, x_0)
    return Bits(L_T + terms.bits.sum(axis=1), L_T, terms.bits, terms.mse)
