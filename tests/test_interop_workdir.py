"""What an import makes is an ordinary workdir: it is sampled from and trained like any other."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop import convert, drawn, run_script, write_drawn_run
from tiny import TINY, experiment, tiny

from ddpm_jax.commands.train import train
from ddpm_jax.core.errors import UsageError
from ddpm_jax.training.checkpoint import MANIFEST
from ddpm_jax.training.parameters import flatten
from ddpm_jax.training.step import state_from_params
from ddpm_jax.training.workdir import load_run, write_run

pytestmark = pytest.mark.slow

SMALLER = {"ch_mult": (1,), "attn_resolutions": (8,)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of diffusers, drawn(TINY, seed=1)."""
    folder = tmp_path_factory.mktemp("models")
    write_drawn_run(folder / "run", TINY)
    convert("to-diffusers", folder / "run", folder / "model")
    return folder / "model"


def test_imported_model_is_sampled_without_data(model, tmp_path):
    workdir = tmp_path / "run"
    convert("from-diffusers", model, workdir)
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"]["source"] == "none"
    assert (workdir / "checkpoints/0" / MANIFEST).exists()
    run_script("sample", workdir, "--num-images", "8", "--out", tmp_path / "samples")
    with np.load(tmp_path / "samples/images.npz") as file:
        assert file["images"].shape == (8, 8, 8, 1)
    with pytest.raises(UsageError, match=r"data\.source='none'"):
        train(experiment(load_run(workdir).config), workdir)


def test_imported_model_is_trained_from_step_0(tmp_path):
    config = tiny(train={"steps": 2}, model=SMALLER)
    write_drawn_run(tmp_path / "original", config)
    convert("to-diffusers", tmp_path / "original", tmp_path / "model")
    (tmp_path / "config.py").write_text(f"from ddpm_jax.config import *\nconfig = {config!r}\n")
    convert("from-diffusers", tmp_path / "model", tmp_path / "run", "--config", tmp_path / "config.py")
    state = train(experiment(config), tmp_path / "run")
    assert int(state.step) == 2
    for name, array in flatten(drawn(config, seed=1)).items():
        # Adam's steps are about the learning rate long, and that of step 0 has length 0.
        difference = np.abs(np.asarray(flatten(state.params)[name]) - array)
        assert 0 < difference.max() < TINY.train.lr, name


def test_imported_checkpoint_is_trained_on_from_its_step_on_any_data(tmp_path):
    config = tiny(train={"steps": 32}, model=SMALLER)
    params = jax.tree.map(jnp.asarray, drawn(config))
    imported = dataclasses.replace(state_from_params(experiment(config), params), step=jnp.asarray(30, jnp.int32))
    write_run(tmp_path / "run", experiment(config), imported)
    state = train(experiment(config), tmp_path / "run")
    assert int(state.step) == 32
    for name, array in flatten(drawn(config)).items():
        difference = np.abs(np.asarray(flatten(state.params)[name]) - array)
        assert 0 < difference.max() < 2.1 * config.train.lr, name
