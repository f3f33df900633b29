"""A workdir for the tests of evaluation: the tiny network with parameters that matter, saved as if it had been trained."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tiny import experiment, tiny

from ddpm_jax.training import step as training
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.workdir import CHECKPOINTS, enter

CONFIG = tiny(
    model={"ch_mult": (1,), "attn_resolutions": (8,), "dropout": 0.0}, diffusion={"T": 10, "variance": "fixed_small"}
)


def random_params(config, seed=0):
    """EMA parameters with no zero layers, drawn on the host: nothing is compiled."""
    generator = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: training.init_state(experiment(config), jax.random.key(0)))
    return jax.tree.map(lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes.ema_params)


def make_workdir(path, *, step=40, config=CONFIG):
    """Writes a config, a checkpoint and a training curve of three lines."""
    workdir = epath.Path(path)
    enter(workdir, config)
    shapes = jax.eval_shape(lambda: training.init_state(experiment(config), jax.random.key(0)))
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    state = dataclasses.replace(state, step=jnp.asarray(step), ema_params=random_params(config, step))
    checkpoints = Checkpoints(workdir / CHECKPOINTS)
    checkpoints.save(state, {"data": {}, "since_log": {}})
    checkpoints.close()
    lines = [json.dumps({"step": s, "loss": 1 / s}) for s in (10, 20, 40)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return workdir
