"""Moving averages of the parameters (EMA): their updates, and how much of the initial parameters is left in them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from ddpm_jax.config import TrainConfig
from ddpm_jax.training.posthoc import gamma_of
from ddpm_jax.training.weights import EMA, decay_of, tracked

MOST_INITIAL = 0.05  # of the initial parameters in an EMA that may be looked at alone


def decay_at(options: TrainConfig, step: Int[Array, ""]) -> float | Float[Array, ""]:
    """The EMA's decay at a step, counted from 0: train.ema_decay, or with train.ema_warmup at most (1 + n) / (10 + n)."""
    if not options.ema_warmup:
        return options.ema_decay
    n = step.astype(jnp.float32)
    return jnp.minimum(options.ema_decay, (1 + n) / (10 + n))


def update_ema(options: TrainConfig, ema: Any, params: Any, step: Int[Array, ""]) -> Any:
    """The EMA of train.ema_decay after a step, counted from 0, that ended at these parameters."""
    return optax.incremental_update(params, ema, 1.0 - decay_at(options, step))


def update_averages(
    options: TrainConfig, averages: dict[str, Any] | None, params: Any, step: Int[Array, ""]
) -> dict[str, Any] | None:
    """The further averages after a step: those of train.ema_decays like the EMA, and those of train.ema_widths."""
    if averages is None:
        return None
    updated = {}
    for name, value in tracked(options).items():
        if name.startswith(EMA):
            updated[name] = update_ema(dataclasses.replace(options, ema_decay=value), averages[name], params, step)
        else:
            share = power_share(value, step)
            updated[name] = jax.tree.map(lambda a, p, share=share: a + share * (p - a), averages[name], params)
    return updated


def power_share(width: float, step: Int[Array, ""]) -> Float[Array, ""]:
    """The share of a step's parameters in the power-function average: 1 - (1 - 1/t)^(gamma + 1) at the step t = step + 1.

    In float32 that form would lose all digits at a late t.
    """
    return -jnp.expm1((gamma_of(width) + 1) * jnp.log1p(-1 / (step.astype(jnp.float32) + 1)))


def initial_share(options: TrainConfig, step: int) -> float:
    """The share of the initial parameters in the EMA after `step` steps: the product of their decays, in closed form."""
    warm = 0
    if options.ema_warmup:  # steps n with (1 + n) / (10 + n) below the decay
        warm = min(step, max(0, math.ceil((10 * options.ema_decay - 1) / (1 - options.ema_decay))))
    # (1 + n) / (10 + n) over n < warm is 1 ... 9 over (warm + 1) ... (warm + 9).
    return math.prod(k / (warm + k) for k in range(1, 10)) * options.ema_decay ** (step - warm)


def note(options: TrainConfig, step: int, weights: str = "ema") -> str:
    """One sentence where an EMA is of little use at a step, with the remedy; "" where it is of use, and for other weights.

    At step 0 the EMA is what the run began with, imported parameters say, and there is no other choice.
    """
    decay = decay_of(weights, options)
    if decay is None or not step:
        return ""
    share = initial_share(dataclasses.replace(options, ema_decay=decay), step)
    if share <= MOST_INITIAL:
        return ""
    return (
        f"{share:.0%} of the EMA at step {step:,} is still the initial parameters, which draw noise unless they were trained: "
        "use --weights raw, train longer, or train anew with --train.ema-warmup"
    )
