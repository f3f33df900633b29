"""The likelihood under the probability-flow ODE (Song et al. 2021), with Hutchinson's trace estimate and an adaptive solver.

In half log-SNR lambda = log(signal / noise), with signal^2 = sigmoid(2 lambda) and noise^2 = sigmoid(-2 lambda), the flow is
dx/dlambda = noise^2 x - noise eps(x, lambda). Needs the extra `ode` (diffrax).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.core import rng
from ddpm_jax.core.errors import import_extra
from ddpm_jax.diffusion.process import Process


class OdeLikelihood(NamedTuple):
    """log_density: of x as a point of R^D, in nats. x_T: the end of the flow. evaluations: of the network.

    The solver's tolerance holds in each step for x and for the log-density per dimension.
    """

    log_density: Float[Array, " B"]
    x_T: Float[Array, "B H W C"]
    evaluations: Int[Array, ""]


def ode_log_density(
    process: Process,
    model: Callable[[Array, Array], Array],
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    x: Float[Array, "B H W C"],
    *,
    tolerance: float = 1e-5,
    max_steps: int = 1000,
) -> OdeLikelihood:
    """log p(x) of the flow's distribution at t = 0, by the change of variables from N(0, I) at t = T-1.

    Pure: put it inside `jax.jit`. The Rademacher direction of the trace estimate depends on (key, index) alone.

    Args:
        process: Predicts eps, x_0 or v.
        model: (x_t, t) -> output, without channels of a learned variance. t is float (B,), and interpolates the table of lambda
            linearly between the integer steps.
        key: The key of all draws.
        indices: The images' global indices, int (B,).
        x: Images, float (B, H, W, C).
        tolerance: Relative and absolute, of each step.
        max_steps: The solver raises if this is not enough.

    Raises:
        ValueError: For x_prev, or a schedule that ends without signal.
        UsageError: If diffrax is not installed.
    """
    diffrax = import_extra("diffrax", "ode", "the ODE likelihood")
    schedule = process.schedule
    if process.prediction == "x_prev" or schedule.alphas_cumprod[-1] == 0:
        raise ValueError(
            "got prediction x_prev or a schedule that ends without signal, expected eps, x_0 or v and some signal"
        )
    # Minus lambda, since interpolation needs an increasing table.
    table = np.log(schedule.sqrt_one_minus_alphas_cumprod / schedule.sqrt_alphas_cumprod)
    dimensions = math.prod(x.shape[1:])
    keys = rng.image_keys(key, indices)
    direction = jax.vmap(lambda k: jax.random.rademacher(k, x.shape[1:], x.dtype))(keys)

    flow = _flow(process, model, table, direction)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(flow),
        diffrax.Dopri5(),
        t0=float(table[0]),
        t1=float(table[-1]),
        dt0=None,
        y0=(x, jnp.zeros(x.shape[:1], x.dtype)),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=max_steps,
    )
    x_T, trace = (a[-1] for a in solution.ys)
    at_the_end = -0.5 * jnp.sum(x_T**2, axis=(1, 2, 3)) - 0.5 * dimensions * jnp.log(2 * jnp.pi)
    return OdeLikelihood(at_the_end + trace * dimensions, x_T, evaluations=1 + 6 * solution.stats["num_steps"])


def _flow(process: Process, model: Callable[[Array, Array], Array], table: np.ndarray, direction: Array) -> Callable:
    """d(x, log-density per dimension) / d(-lambda), with the trace estimated along `direction`, which has x's shape."""
    dtype, T, dimensions = direction.dtype, process.schedule.T, math.prod(direction.shape[1:])

    def eps(x_t, minus_lambda):
        signal, noise = jnp.sqrt(jax.nn.sigmoid(-2 * minus_lambda)), jnp.sqrt(jax.nn.sigmoid(2 * minus_lambda))
        t = jnp.interp(minus_lambda, jnp.asarray(table, dtype), jnp.arange(T, dtype=dtype))
        output = model(x_t, jnp.full(x_t.shape[:1], t))
        if process.prediction == "eps":
            return output
        return (x_t - signal * output) / noise if process.prediction == "x_0" else signal * output + noise * x_t

    def flow(minus_lambda, state, _):
        x_t, _ = state
        noise = jnp.sqrt(jax.nn.sigmoid(2 * minus_lambda))
        value, pull_back = jax.vjp(lambda x_t: noise * eps(x_t, minus_lambda) - noise**2 * x_t, x_t)
        trace = jnp.sum(pull_back(direction)[0] * direction, axis=(1, 2, 3))
        return value, trace / dimensions

    return flow


def ode_bits_per_dim(likelihood: OdeLikelihood) -> Float[Array, " B"]:
    """Bits/dim of images of 256 levels from the density of their dequantised pixels: log2(127.5) - log2 p(x) / D.

    x, in [-1, 1], must include uniform noise over a bin of width 2/255. The result is an unbiased draw of an upper bound.
    """
    dimensions = math.prod(likelihood.x_T.shape[1:])
    return math.log2(127.5) - likelihood.log_density / (dimensions * math.log(2))
