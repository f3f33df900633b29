"""The smallest config that has every part of a real one: blocks, a down-sampling, attention, dropout, flips, EMA."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from ddpm_jax.config import Config, DataConfig, DiffusionConfig, ModelConfig, TrainConfig
from ddpm_jax.core import sharding
from ddpm_jax.training.experiment import Experiment

experiment = Experiment.from_config

TINY = Config(
    data=DataConfig(source="digits", image_size=8, channels=1),
    model=ModelConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.1, groups=4),
    diffusion=DiffusionConfig(T=20, beta_start=5e-3, beta_end=0.5),
    train=TrainConfig(
        steps=40,
        batch_size=16,
        lr=1e-3,
        warmup_steps=10,
        ema_decay=0.9,
        steps_per_dispatch=2,
        log_every=4,
        sample_every=0,
        num_samples=4,
        save_every=10,
    ),
)


def tiny(**sections: dict[str, Any]) -> Config:
    """TINY with some fields changed: tiny(train={"steps": 8}, model={"dropout": 0.0}, seed=1)."""
    changed = {
        name: dataclasses.replace(getattr(TINY, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return dataclasses.replace(TINY, **changed)


def one_device() -> Mesh:
    """A mesh of one device, for what is not about devices: its programs compile in two thirds of the time."""
    return sharding.make_mesh(devices=jax.devices()[:1])


def read_images(path):
    """The images of an images.npz or a part of a set."""
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["images"]
