"""What the tests of weights in and out share: the script, runs with drawn parameters, and networks of diffusers."""

import functools
import math
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import experiment

from ddpm_jax.commands import cli
from ddpm_jax.interop.names import parameters
from ddpm_jax.training.parameters import unflatten
from ddpm_jax.training.step import state_from_params
from ddpm_jax.training.workdir import write_run

ROOT = Path(__file__).parent.parent


def run_script(name, *arguments):
    """Runs a script of the root in this process; its errors come out as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        cli.prepare(name)()


def convert(*arguments):
    """Runs convert.py."""
    run_script("convert", *arguments)


@functools.cache
def drawn(config, seed=0):
    """Parameters of order one for the config's network."""
    rng = np.random.default_rng(seed)

    def draw(p):
        values = rng.normal(size=p.shape).astype(np.float32)
        fan_in = math.prod(p.shape[:-1])
        return {"kernel": values / math.sqrt(fan_in), "bias": 0.1 * values, "scale": 1 + 0.1 * values}[
            p.path.split("/")[-1]
        ]

    return unflatten({p.path: draw(p) for p in parameters(experiment(config))})


def write_drawn_run(workdir, config):
    """A workdir whose raw parameters are `drawn` with seed 0 and whose EMA with seed 1."""
    state = state_from_params(experiment(config), jax.tree.map(jnp.asarray, drawn(config)))
    write_run(
        workdir,
        experiment(config),
        state.replace(ema_params=jax.tree.map(jnp.asarray, drawn(config, seed=1))),
    )
