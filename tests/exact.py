"""Models that are exactly right: data whose best prediction is known in closed form."""

import jax.numpy as jnp
import numpy as np

from ddpm_jax.diffusion.process import Process, predict_from_x_0

SHAPE = (2, 2, 1)
MEAN, STD = 0.3, 0.2  # Gaussian data
MEANS, WEIGHTS, SPREAD = np.array([-0.6, 0.1, 0.7]), np.array([0.5, 0.2, 0.3]), 0.1  # a mixture of three


def _at(table, t, x):
    return jnp.asarray(table, x.dtype)[t][:, None, None, None]


def gaussian_x_0(schedule, x_t, t):
    """E[x_0 | x_t] for data N(MEAN, STD^2)."""
    signal, noise = (_at(a, t, x_t) for a in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod))
    return MEAN + signal * STD**2 / (signal**2 * STD**2 + noise**2) * (x_t - signal * MEAN)


def mixture_x_0(schedule, x_t, t):
    """E[x_0 | x_t] for data of the mixture, each pixel by itself."""
    signal, noise = (
        _at(a, t, x_t)[..., None] for a in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    means = jnp.asarray(MEANS, x_t.dtype).reshape(1, 1, 1, 1, -1)
    away = x_t[..., None] - signal * means
    variance = signal**2 * SPREAD**2 + noise**2
    logits = jnp.log(jnp.asarray(WEIGHTS, x_t.dtype)).reshape(1, 1, 1, 1, -1) - away**2 / (2 * variance)
    posterior = jnp.exp(logits - logits.max(-1, keepdims=True))
    posterior = posterior / posterior.sum(-1, keepdims=True)
    return (posterior * (means + signal * SPREAD**2 / variance * away)).sum(-1)


def model_of(x_0, schedule, prediction="eps", spread=None):
    """The network that predicts this x_0, as any kind of prediction; spread fills the channels of a learned variance."""

    def model(x_t, t):
        output = predict_from_x_0(Process(schedule, prediction=prediction), x_0(schedule, x_t, t), x_t, t)
        if spread is None:
            return output
        return jnp.concatenate([output, jnp.full_like(output, spread)], axis=-1)

    return model
