"""Samplers, one file each, all run by the one loop of `loop.py`."""

from jaxtyping import Array, Float, Int, Key

from ddpm_jax.diffusion import Prediction, Variance
from ddpm_jax.sampling.ancestral import ancestral
from ddpm_jax.sampling.loop import Model, Sampler, sample_loop
from ddpm_jax.schedules import Schedule

SAMPLERS = {"ancestral": ancestral}

__all__ = ["SAMPLERS", "Model", "Sampler", "ancestral", "sample", "sample_loop"]


def sample(
    schedule: Schedule,
    model: Model,
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    *,
    image_shape: tuple[int, int, int],
    prediction: Prediction = "eps",
    variance: Variance = "fixed_large",
    clip: bool = True,
) -> Float[Array, "B H W C"]:
    """Samples images by Algorithm 2: float32 (B, H, W, C), in [-1, 1] but for the little that the last mean may leave it.

    model: any function (x_t, t) -> output. indices: int (B,); image i's noise depends on (key, i) alone, so that it is the
    same image in any batch. image_shape: (H, W, C). Pure: put it inside `jax.jit`.
    """
    sampler = ancestral(schedule, prediction=prediction, variance=variance, clip=clip)
    return sample_loop(sampler, model, key, indices, image_shape=image_shape)
