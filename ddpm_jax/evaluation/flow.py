"""Bits/dim by the probability-flow ODE (Song et al. 2021): of images whose 8 bits are dequantised by uniform noise."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from ddpm_jax.core import rng, sharding
from ddpm_jax.core.errors import UsageError, import_extra
from ddpm_jax.core.rng import Purpose
from ddpm_jax.diffusion.ode import ode_bits_per_dim, ode_log_density
from ddpm_jax.diffusion.process import split_output
from ddpm_jax.training.experiment import Experiment

TOLERANCE = 1e-5  # of each step of the solver
MOST_STEPS = 1000


def flow_keys(seed: int) -> tuple[Key[Array, ""], Key[Array, ""]]:
    """The keys of a seed's directions of the trace estimate, and of its dequantisation."""
    root = rng.root_key(seed)
    return rng.stream(root, Purpose.FLOW), rng.stream(root, Purpose.DEQUANTISE)


def check_flow(experiment: Experiment) -> None:
    """Raises UsageError if the ODE's likelihood is not defined, or diffrax is not installed."""
    import_extra("diffrax", "ode", "the metric ode-nll")
    process = experiment.process
    if process.prediction == "x_prev" or process.schedule.alphas_cumprod[-1] == 0:
        raise UsageError(
            f"ode-nll needs a prediction of eps, x_0 or v and a schedule that ends with some signal, got "
            f"{process.prediction} and {experiment.config.diffusion.schedule}; leave it out"
        )


def make_flow_bits(experiment: Experiment, mesh: Mesh) -> Callable[..., dict[str, Array]]:
    """Compiles (params, keys, rows, indices, labels) -> {"bits": (B,), "evaluations": (B,)} of each image.

    Args:
        experiment: The experiment of the parameters.
        mesh: The devices that the batch is split over.

    Returns:
        The compiled function: uint8 rows of a source (B, H, W, C), their indices (B,) and, with classes, their labels (B,), B a
        multiple of the mesh's devices. Each image has steps of its own, so that its bits depend on it, (keys, its index) alone.
    """
    process = experiment.process

    def one(params, keys, x_0, index, labels, condition):
        def model(x_t, t):
            of = experiment.model(params, labels=labels, condition=None if condition is None else condition[None])
            return split_output(process, of(x_t, t))[0]

        direction, dequantise = keys
        half = 1 / 255  # of the width of a value
        noise = jax.random.uniform(jax.random.fold_in(dequantise, index), x_0.shape, x_0.dtype, -half, half)
        likelihood = ode_log_density(
            process, model, direction, index[None], (x_0 + noise)[None], tolerance=TOLERANCE, max_steps=MOST_STEPS
        )
        return {"bits": ode_bits_per_dim(likelihood)[0], "evaluations": likelihood.evaluations}

    def bits(params, keys, rows, indices, labels=None):
        rows, indices = jax.lax.with_sharding_constraint((rows, indices), sharding.split(mesh))
        x_0, condition = experiment.split(rows)
        in_axes = (0, 0, None if labels is None else 0, None if condition is None else 0)
        return jax.vmap(functools.partial(one, params, keys), in_axes)(x_0, indices, labels, condition)

    return sharding.jit_replicated(bits, mesh)
