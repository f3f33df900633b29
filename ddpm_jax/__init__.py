"""Denoising diffusion probabilistic models (Ho, Jain & Abbeel 2020) in JAX and Flax.

Names are imported when they are first asked for, so that importing the package is quick and has no effect on JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ddpm_jax.core.version import __version__ as __version__

if TYPE_CHECKING:
    from ddpm_jax.commands.train import train
    from ddpm_jax.config import Config
    from ddpm_jax.diffusion.bound import bits_per_dim
    from ddpm_jax.diffusion.losses import simple_loss
    from ddpm_jax.diffusion.process import Process, p_mean_logvar, predict_x_0, q_posterior, q_sample
    from ddpm_jax.diffusion.schedules import Schedule, make_schedule
    from ddpm_jax.models.unet import UNet
    from ddpm_jax.sampling import make_sampler, sample
    from ddpm_jax.sampling.guidance import guide
    from ddpm_jax.training.experiment import Experiment
    from ddpm_jax.training.step import TrainState, init_state, make_train_step
    from ddpm_jax.training.workdir import Run, load_run

_MODULES = {
    "commands.train": ["train"],
    "config": ["Config"],
    "diffusion.process": ["Process", "p_mean_logvar", "predict_x_0", "q_posterior", "q_sample"],
    "diffusion.bound": ["bits_per_dim"],
    "diffusion.losses": ["simple_loss"],
    "sampling": ["make_sampler", "sample"],
    "sampling.guidance": ["guide"],
    "diffusion.schedules": ["Schedule", "make_schedule"],
    "training.experiment": ["Experiment"],
    "training.step": ["TrainState", "init_state", "make_train_step"],
    "models.unet": ["UNet"],
    "training.workdir": ["Run", "load_run"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Config",
    "Experiment",
    "Process",
    "Run",
    "Schedule",
    "TrainState",
    "UNet",
    "bits_per_dim",
    "guide",
    "init_state",
    "load_run",
    "make_sampler",
    "make_schedule",
    "make_train_step",
    "p_mean_logvar",
    "predict_x_0",
    "q_posterior",
    "q_sample",
    "sample",
    "simple_loss",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'ddpm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"ddpm_jax.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
