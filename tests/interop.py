"""What the tests of weights in and out share: the script, runs with drawn parameters, and networks of diffusers."""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_unet import by_path, drawn_params
from tiny import tiny

from ddpm_jax.training import build_unet, state_from_params
from ddpm_jax.workdir import write_run

ROOT = Path(__file__).parent.parent


def convert(*arguments):
    """Runs convert.py in this process; its errors come out as they are."""
    spec = importlib.util.spec_from_file_location("script_convert", ROOT / "convert.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # tyro reads the help in its source
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
        module.main()


def drawn(config, seed=0):
    """Parameters of order one for the config's network."""
    size, channels = config.data.image_size, config.data.channels
    x_t = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return drawn_params(build_unet(config), x_t, jax.ShapeDtypeStruct((1,), jnp.int32), seed=seed)


def write_drawn_run(workdir, config=None, **sections):
    """A workdir whose raw parameters are `drawn` with seed 0 and whose EMA with seed 1; returns its config."""
    config = config or tiny(**sections)
    state = state_from_params(config, jax.tree.map(jnp.asarray, drawn(config)))
    write_run(workdir, config, state.replace(ema_params=jax.tree.map(jnp.asarray, drawn(config, seed=1))))
    return config
