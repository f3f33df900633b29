"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in JAX and Flax."""

from ddpm_jax.config import Config
from ddpm_jax.diffusion import p_mean_logvar, predict_x_0, q_posterior, q_sample
from ddpm_jax.likelihood import bits_per_dim
from ddpm_jax.losses import simple_loss
from ddpm_jax.sampling import sample
from ddpm_jax.schedules import Schedule, make_schedule
from ddpm_jax.training import TrainState, init_state, make_train_step
from ddpm_jax.unet import UNet
from ddpm_jax.workdir import Run, load_run

__all__ = [
    "Config",
    "Run",
    "Schedule",
    "TrainState",
    "UNet",
    "bits_per_dim",
    "init_state",
    "load_run",
    "make_schedule",
    "make_train_step",
    "p_mean_logvar",
    "predict_x_0",
    "q_posterior",
    "q_sample",
    "sample",
    "simple_loss",
]
