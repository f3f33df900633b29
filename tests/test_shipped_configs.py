"""The configs shipped can be run, and those of the paper are the paper's. A new file is tested by being there."""

import ast
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tiny import experiment

from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import Config, DataConfig, DiffusionConfig, TrainConfig, check, differences, from_json, to_json
from ddpm_jax.training.footprint import count_params
from ddpm_jax.training.step import init_state

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.py"))

shipped = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@shipped
def test_shipped_config_passes_and_survives_json(path):
    config = load_config(str(path))
    for num_devices in (1, 2, 4, 8):
        assert check(config, num_devices=num_devices) == []
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python train.py configs/{path.name}" in docstring


@functools.cache
def abstract_run(config):
    """The shapes of a config's state, and of its network's output for two images: nothing is computed or held."""
    state = jax.eval_shape(lambda: init_state(experiment(config), jax.random.key(0)))
    size, channels = config.data.image_size, config.data.channels
    x_t, t = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    conditioning = experiment(config).conditioning
    condition = conditioning and jnp.zeros((1, size, size, conditioning.shape[-1]))
    output = jax.eval_shape(
        lambda p, x_t, t: experiment(config).model(p, condition=condition)(x_t, t), state.params, x_t, t
    )
    return state, output


@shipped
def test_shipped_config_builds(path):
    config = load_config(str(path))
    data = DataConfig(image_size=config.data.image_size, channels=config.data.channels, condition=config.data.condition)
    d = config.diffusion
    deciding = Config(
        data=data,
        model=config.model,
        diffusion=DiffusionConfig(variance=d.variance, loss=d.loss, t_sampler=d.t_sampler),
        train=TrainConfig(label_dropout=config.train.label_dropout),
    )
    state, output = abstract_run(deciding)  # the shapes of several configs are the same
    learned = d.variance in ("learned", "learned_range")
    assert output.shape == (2, data.image_size, data.image_size, data.channels * (2 if learned else 1))
    assert output.dtype == jnp.float32
    assert (state.loss_history is not None) == (d.t_sampler == "loss_history")
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(state.params))
    assert count_params(config) == count
    written = re.search(r"([\d,]+) parameters", path.read_text())
    if written:  # the paper's
        assert f"{count:,}" == written[1]


def test_the_ablations_differ_from_cifar10_in_what_table_2_says():
    paper = load_config(str(CONFIGS / "cifar10.py"))
    changed = {
        "eps_l": {"loss"},
        "eps_l_learned": {"loss", "variance"},
        "mean_l": {"prediction", "loss"},
        "mean_l_learned": {"prediction", "loss", "variance"},
        "mean_mse": {"prediction"},
    }
    ablations = {path.stem for path in FILES if path.stem.startswith("cifar10_")} - {"cifar10_small"}
    assert ablations == {f"cifar10_{name}" for name in changed}
    for name, fields in changed.items():
        config = load_config(str(CONFIGS / f"cifar10_{name}.py"))
        assert set(differences(paper, config)) == {f"diffusion.{field}" for field in fields}
        assert config.diffusion.loss == ("simple" if name == "mean_mse" else "vb")
        assert config.diffusion.prediction == ("x_prev" if name.startswith("mean") else "eps")
        assert config.diffusion.variance == ("learned" if "learned" in name else "fixed_large")


@pytest.mark.parametrize(
    ("name", "ch", "steps", "flip"),
    [
        ("celebahq256", 128, 500_000, True),
        ("lsun_bedroom256", 128, 2_400_000, False),
        ("lsun_bedroom256_large", 192, 1_150_000, False),
        ("lsun_church256", 128, 1_200_000, True),
        ("lsun_cat256", 128, 1_800_000, False),
    ],
)
def test_the_256_configs_are_the_papers(name, ch, steps, flip):
    config = load_config(str(CONFIGS / f"{name}.py"))
    model, train, d = config.model, config.train, config.diffusion
    assert (model.ch, model.ch_mult, model.num_res_blocks) == (ch, (1, 1, 2, 2, 4, 4), 2)
    assert (model.attn_resolutions, model.dropout, config.data.image_size) == ((16,), 0.0, 256)
    assert (train.steps, train.batch_size, train.lr, train.warmup_steps, train.flip) == (steps, 64, 2e-5, 5000, flip)
    assert (train.grad_clip, train.ema_decay) == (1.0, 0.9999)
    assert (d.T, d.schedule, d.beta_start, d.beta_end) == (1000, "linear", 1e-4, 0.02)
    assert (d.loss, d.prediction, d.variance) == ("simple", "eps", "fixed_small")
