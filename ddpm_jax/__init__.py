"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in JAX and Flax."""

from ddpm_jax.diffusion import p_mean_logvar, predict_x_0, q_posterior, q_sample
from ddpm_jax.likelihood import bits_per_dim
from ddpm_jax.losses import simple_loss
from ddpm_jax.schedules import Schedule, make_schedule
from ddpm_jax.unet import UNet

__all__ = [
    "Schedule",
    "UNet",
    "bits_per_dim",
    "make_schedule",
    "p_mean_logvar",
    "predict_x_0",
    "q_posterior",
    "q_sample",
    "simple_loss",
]
