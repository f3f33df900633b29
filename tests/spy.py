"""What a training step gives to its loss."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny import experiment

from ddpm_jax.diffusion import losses
from ddpm_jax.models.unet import UNet
from ddpm_jax.training import step as training


def seen_by_the_loss(config, monkeypatch, *, step):
    """Stored images (16, 8, 8, 1), and the x_0 that the loss of a step of them is given."""
    seen = []

    def spy(process, model, x_0, t, eps):
        seen.append(x_0)
        return jnp.zeros(x_0.shape[0]) * jnp.sum(model(x_0, t))

    monkeypatch.setitem(losses.LOSSES, "simple", spy)
    monkeypatch.setattr(UNet, "__call__", lambda self, x_t, t, dropout_keys=None: x_t)
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 1), np.uint8)
    params = {"w": jnp.zeros(1)}
    state = training.TrainState(jnp.int32(step), params, params, experiment(config).optimizer.init(params), None)
    with jax.disable_jit():
        training.one_step(experiment(config))(state, jnp.asarray(images))
    return images, jax.device_get(seen[0])
