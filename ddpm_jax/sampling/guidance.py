"""Guidance of one model by another: classifier-free guidance (Ho & Salimans 2021), autoguidance (Karras et al. 2024)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpm_jax.sampling.scan import Model

Pair = Callable[[Float[Array, "B H W C"], Int[Array, " B"]], tuple[Array, Array]]


def guide(
    model: Model,
    null_model: Model,
    scale: float,
    *,
    interval: tuple[int, int] | None = None,
    rescale: float = 0.0,
    both: Pair | None = None,
) -> Model:
    """The model null + scale (model - null): guidance for any sampler and any prediction.

    eps, x_0, v and x_prev are affine functions of each other at a given x_t, so guiding one of them guides all. Of a learned
    variance the model's own channels are taken.

    Args:
        model: (x_t, t) -> output, of the wanted class.
        null_model: (x_t, t) -> output, of no class, or of a worse network.
        scale: 1 is the model alone and 0 the null model alone; above 1 strengthens the class. Ho & Salimans' w is scale - 1.
        interval: The first and last t at which guidance acts (Kynkäänniemi et al. 2024), elsewhere the model alone; default all.
        rescale: Share, 0 to 1, by which an image's standard deviation is brought to that of the model's output (Lin et al. 2023).
        both: (x_t, t) -> the outputs of the model and the null model in one evaluation; default two.

    Returns:
        The guided model.

    Raises:
        ValueError: If rescale is outside of 0 to 1, or the interval's end is before its start.

    Example:
        >>> import jax.numpy as jnp
        >>> from ddpm_jax import guide
        >>> guided = guide(lambda x, t: 3.0 + x, lambda x, t: 1.0 + x, 2.0)
        >>> float(guided(jnp.zeros((1, 1, 1, 1)), jnp.zeros(1, int))[0, 0, 0, 0])
        5.0
    """
    _check(interval, rescale)
    if scale == 1:
        return model
    if scale == 0 and interval is None and not rescale:
        return null_model

    def guided(x_t, t):
        output, null = both(x_t, t) if both else (model(x_t, t), null_model(x_t, t))
        C = x_t.shape[-1]
        mean, null = output[..., :C], null[..., :C]
        result = null + scale * (mean - null)
        if rescale:
            result *= 1 + rescale * (_deviation(mean) / _deviation(result) - 1)
        if interval is not None:
            result = jnp.where(_acts(interval, t)[:, None, None, None], result, mean)
        return jnp.concatenate([result, output[..., C:]], axis=-1)

    if interval is None:
        return guided
    # In a sampler t is the same for all images: elsewhere the null model is not evaluated.
    return lambda x_t, t: jax.lax.cond(_acts(interval, t).any(), guided, model, x_t, t)


def _check(interval: tuple[int, int] | None, rescale: float) -> None:
    if not 0 <= rescale <= 1:
        raise ValueError(f"got rescale {rescale}, expected 0 to 1")
    if interval is not None and interval[0] > interval[1]:
        raise ValueError(
            f"got the interval {interval[0]} to {interval[1]}, expected a first t that is not after the last"
        )


def _acts(interval: tuple[int, int], t: Int[Array, " B"]) -> Bool[Array, " B"]:
    return (interval[0] <= t) & (t <= interval[1])


def _deviation(output: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 1"]:
    return output.std(axis=(1, 2, 3), keepdims=True)
