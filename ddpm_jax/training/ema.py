"""The moving average of the parameters (EMA): its decay at each step, and how much of the initial parameters is left in it."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddpm_jax.config import TrainConfig

MOST_INITIAL = 0.05  # of the initial parameters in an EMA that may be looked at alone


def decay_at(options: TrainConfig, step: Int[Array, ""]) -> float | Float[Array, ""]:
    """The EMA's decay at a step, counted from 0: train.ema_decay, or with train.ema_warmup at most (1 + n) / (10 + n)."""
    if not options.ema_warmup:
        return options.ema_decay
    n = step.astype(jnp.float32)
    return jnp.minimum(options.ema_decay, (1 + n) / (10 + n))


def initial_share(options: TrainConfig, step: int) -> float:
    """The share of the initial parameters in the EMA after `step` steps: the product of their decays, in closed form."""
    warm = 0
    if options.ema_warmup:  # steps n with (1 + n) / (10 + n) below the decay
        warm = min(step, max(0, math.ceil((10 * options.ema_decay - 1) / (1 - options.ema_decay))))
    # (1 + n) / (10 + n) over n < warm is 1 ... 9 over (warm + 1) ... (warm + 9).
    return math.prod(k / (warm + k) for k in range(1, 10)) * options.ema_decay ** (step - warm)


def note(options: TrainConfig, step: int) -> str:
    """One sentence where the EMA is of little use at a step, with the remedy; "" where it is of use.

    At step 0 the EMA is what the run began with, imported parameters say, and there is no other choice.
    """
    share = initial_share(options, step)
    if not step or share <= MOST_INITIAL:
        return ""
    return (
        f"{share:.0%} of the EMA at step {step:,} is still the initial parameters, which draw noise unless they were trained: "
        "use --weights raw, train longer, or train anew with --train.ema-warmup"
    )
