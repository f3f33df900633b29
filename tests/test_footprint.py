"""What a training needs at least: parameters counted exactly, bytes never more than the compiled programs take."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import experiment, tiny

from ddpm_jax.benchmark.programs import image_shapes
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.commands.train import train
from ddpm_jax.config import check
from ddpm_jax.core import room, sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.generation.generator import make_generator
from ddpm_jax.training import footprint
from ddpm_jax.training.footprint import check_training, count_params, needs
from ddpm_jax.training.step import init_state, make_train_step

ROOT = Path(__file__).parent.parent


def real_params(config):
    shapes = jax.eval_shape(lambda: init_state(experiment(config), jax.random.key(0)).params)
    return sum(math.prod(a.shape) for a in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"ch_mult": (2,), "attn_resolutions": (8,)}},
        {"model": {"ch_mult": (3, 1, 2), "num_res_blocks": 2, "attn_resolutions": (8, 2)}, "data": {"channels": 3}},
        {"diffusion": {"variance": "learned", "loss": "hybrid"}},
        {"model": {"num_classes": 7}, "train": {"label_dropout": 0.1}},
        {"data": {"image_size": (8, 12), "channels": 5}, "model": {"ch_mult": (1, 2, 2), "attn_resolutions": (2,)}},
    ],
)
def test_parameters_of_any_network_are_counted_exactly(sections):
    assert count_params(tiny(**sections)) == real_params(tiny(**sections))


def bytes_of(compiled):
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes


def cifar10():
    config = load_config(str(ROOT / "configs" / "cifar10.py"))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=8, num_samples=8))


CONFIGS = {
    "tiny": lambda: tiny(train={"batch_size": 64, "num_samples": 64}),  # programs of test_fusion.py too
    "remat": lambda: tiny(model={"remat": True}, train={"batch_size": 64}),
    "accumulated": lambda: tiny(train={"batch_size": 64, "accumulation": 2}),
    "bfloat16": lambda: tiny(train={"batch_size": 64}, model={"dtype": "bfloat16"}),
    "averages": lambda: tiny(train={"batch_size": 64, "ema_decays": (0.5,), "ema_widths": (0.05, 0.1)}),
    "digits": lambda: load_config(str(ROOT / "configs" / "digits.py")),
    "cifar10": cifar10,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_the_compiled_programs_take_no_less_than_the_estimate(name):
    config = CONFIGS[name]()
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, sample_every=10, steps=40))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    state = jax.eval_shape(lambda: init_state(experiment(config), jax.random.key(0)))
    step, grid = needs(config, 1)
    images = image_shapes(experiment(config), config.train.steps_per_dispatch)
    trained = bytes_of(make_train_step(experiment(config), mesh=mesh).lower(state, images, None).compile())
    assert trained / 30 < step.total <= trained  # a bound, yet not an idle one
    indices = jax.ShapeDtypeStruct((config.train.num_samples,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    drawn = bytes_of(make_generator(experiment(config), mesh).lower(state.params, key, indices).compile())
    held = 3 + len(config.train.ema_decays) + len(config.train.ema_widths)
    others = held * footprint.FLOAT32 * count_params(config)  # that the generator does not take, but the state holds
    assert drawn / 10 < grid.total - others <= drawn


def test_the_estimate_is_for_one_device_and_falls_with_their_number():
    whole, eighth = (needs(tiny(train={"batch_size": 1024}), n)[0] for n in (1, 8))
    assert eighth.parts[footprint.SMALLER_BATCH] == whole.parts[footprint.SMALLER_BATCH] // 8
    assert eighth.parts[footprint.SMALLER_NETWORK] == whole.parts[footprint.SMALLER_NETWORK]
    split = needs(tiny(train={"batch_size": 1024, "fsdp": 8}), 8)[0]
    assert split.parts[footprint.SMALLER_NETWORK] == whole.parts[footprint.SMALLER_NETWORK] // 8


def test_further_averages_count_like_parameters():
    plain, more = (
        needs(tiny(train={"sample_every": 10, "fsdp": 2, **averages}), 2)
        for averages in ({}, {"ema_decays": (0.5,), "ema_widths": (0.05, 0.1)})
    )
    for a, b in zip(plain, more, strict=True):
        added = b.parts[footprint.SMALLER_NETWORK] - a.parts[footprint.SMALLER_NETWORK]
        assert abs(added - 3 * footprint.FLOAT32 * count_params(tiny()) // 2) <= 1


# ---- What cannot fit is refused at once, with the bytes and what to lower

TOO_MUCH = {
    "train.batch_size": {"train": {"batch_size": 1_000_000_000}},
    "train.num_samples": {"train": {"num_samples": 1_000_000_000, "sample_every": 10}},
    "train.eval_samples": {
        "train": {"eval_every": 10, "eval_source": "digits", "eval_samples": 1_000_000_000, "num_samples": 8}
    },
    "model.ch": {"model": {"ch": 1_000_000}},
    "model.ch_mult": {"model": {"ch_mult": (1, 1_000_000_000)}},
    "data.image_size": {"data": {"image_size": 1_000_000}, "model": {"attn_resolutions": (500_000,)}},
}


@pytest.mark.parametrize("field", TOO_MUCH)
def test_a_training_beyond_any_memory_is_refused_before_anything_is_read_or_compiled(field, tmp_path, monkeypatch):
    config = tiny(**TOO_MUCH[field])
    monkeypatch.setattr("ddpm_jax.commands.train.open_source", lambda *_: pytest.fail("read"))
    with pytest.raises(UsageError, match=r"needs at least [\d,.]+ GiB of memory.* free; lower .*") as refusal:
        train(experiment(config), tmp_path / "run")
    assert field in str(refusal.value).rpartition(";")[2]
    assert not (tmp_path / "run").exists()


def test_a_training_that_fits_is_not_refused(monkeypatch):
    config = tiny(train={"batch_size": 1024, "sample_every": 10})
    check(config, num_devices=jax.device_count())
    needed = max(need.total for need in needs(config, jax.device_count())) * jax.local_device_count()
    monkeypatch.setattr(room, "free_memory", lambda: needed)
    check_training(config, sharding.make_mesh())
    monkeypatch.setattr(room, "free_memory", lambda: needed - 1)
    with pytest.raises(UsageError, match="free; lower"):
        check_training(config, sharding.make_mesh())


class Accelerator:
    platform = "gpu"

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit}


def of_devices(device):
    """What `check_training` asks a mesh of 8 such devices."""
    return SimpleNamespace(devices=np.empty(jax.device_count()), local_devices=[device])


def test_an_accelerator_is_asked_for_its_own_limit():
    config = tiny()
    needed = max(need.total for need in needs(config, jax.device_count()))
    for limit in (None, needed):
        check_training(config, of_devices(Accelerator(limit)))
    with pytest.raises(UsageError, match=r"of memory on each device, and .* are free on .*; lower"):
        check_training(config, of_devices(Accelerator(needed - 1)))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--train.batch-size", "--model.ch"])
def test_the_refusal_itself_takes_little_memory(option, tmp_path):
    """A process between asks: before it has called exec, a child counts the pages of the process it was forked from."""
    command = ["train.py", "configs/digits.py", "--workdir", str(tmp_path / "run"), option, "1000000000"]
    between = "import resource, subprocess, sys\n"
    between += "code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode\n"
    between += "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    process = subprocess.run([sys.executable, "-c", between, *command], cwd=ROOT, capture_output=True, text=True)
    code, kib = map(int, process.stdout.split())
    assert code == 2
    assert "GiB of memory" in process.stderr
    assert kib < 2 * 2**20
