"""The training loss by quarter of t, from little noise to much."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from ddpm_jax.core import rng, sharding
from ddpm_jax.evaluation.bits import draw_times
from ddpm_jax.training.experiment import Experiment

QUARTERS = 4


def make_quarter_losses(experiment: Experiment, mesh: Mesh) -> Callable[..., dict[str, Array]]:
    """Compiles (params, key, images, indices, labels) -> {"losses": of each image in each quarter of t}.

    Args:
        experiment: The experiment of the parameters.
        mesh: The devices that the batch is split over.

    Returns:
        The compiled function: rows of a source (B, H, W, C), their indices (B,) and, with classes, their labels (B,), B a
        multiple of the mesh's devices, to float (B, 4). Each image draws one t from each quarter of 0 .. T-1, and noise, by
        (key, its index) alone. There is no dropout and no flip.
    """
    T = experiment.process.schedule.T
    edges = np.arange(QUARTERS + 1) * T // QUARTERS

    def quarter_losses(params, key, images, indices, labels=None):
        images, indices = jax.lax.with_sharding_constraint((images, indices), sharding.split(mesh))
        x_0, condition = experiment.split(images)
        model, keys = experiment.model(params, labels=labels, condition=condition), rng.image_keys(key, indices)

        def body(carry, t):
            return carry, experiment.loss(model, x_0, t, rng.image_normal(keys, t, x_0.shape[1:]))

        _, losses = jax.lax.scan(body, None, draw_times(key, indices, edges, T)[:, 1:].T)
        return {"losses": losses.T}

    return sharding.jit_replicated(quarter_losses, mesh)
