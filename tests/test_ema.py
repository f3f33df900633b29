"""The moving average of the parameters: its warm-up, the share of the initial parameters, and where a poor one is told."""

import contextlib
import dataclasses
import io
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tiny import experiment, one_device, tiny

from ddpm_jax.commands import arguments, sample
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.commands.train import train
from ddpm_jax.config import TrainConfig
from ddpm_jax.data.sheets import beside, enlarge, grid
from ddpm_jax.evaluation.digits import precision
from ddpm_jax.generation.generator import make_generator, sample_key
from ddpm_jax.training import ema
from ddpm_jax.training.loop import duration
from ddpm_jax.training.metric_writer import read_metrics
from ddpm_jax.training.workdir import load_run

CONFIGS = Path(__file__).parent.parent / "configs"
LATE = {"steps": 8, "steps_per_dispatch": 2, "log_every": 4, "save_every": 8, "sample_every": 8, "num_samples": 4}
CONFIG = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)}, train=LATE | {"ema_decay": 0.9999})


def warmed(config, decay=0.9999):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, ema_decay=decay, ema_warmup=True))


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.5, 0.99, 0.9999])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_initial_share_is_the_product_of_the_decays(decay, warmup):
    options, product = TrainConfig(ema_decay=decay, ema_warmup=warmup), 1.0
    for n in range(1200):  # over the end of the warm-up of 0.99, step 890
        assert math.isclose(ema.initial_share(options, n), product, rel_tol=1e-9, abs_tol=1e-300)
        product *= min(decay, (1 + n) / (10 + n)) if warmup else decay


def test_the_share_that_the_issue_was_about():
    options = TrainConfig(ema_decay=0.9999)
    assert ema.initial_share(options, 1000) == pytest.approx(0.905, abs=1e-3)
    assert ema.initial_share(options, 10_000) == pytest.approx(0.368, abs=1e-3)
    assert ema.initial_share(TrainConfig(ema_decay=0.9999, ema_warmup=True), 10) < 1e-4


def test_a_poor_ema_is_told_with_the_remedies_until_the_share_is_5_percent():
    options = TrainConfig(ema_decay=0.99)
    assert ema.note(options, 0) == ""  # an imported run: these are its only parameters
    assert ema.note(options, 298).startswith("5% of the EMA at step 298 ")
    assert ema.note(options, 299) == ""
    for remedy in ("--weights raw", "--train.ema-warmup"):
        assert remedy in ema.note(options, 100)


def test_who_has_the_warmup():
    with_warmup = {path.stem for path in CONFIGS.glob("*.py") if load_config(str(path)).train.ema_warmup}
    small = {"cifar10_small", "upsample16", "digits", "digits_classes", "fashion_mnist_small", "folder_small"}
    assert with_warmup == small | {"folder", "mnist", "fashion_mnist"}
    assert not TrainConfig().ema_warmup


@pytest.fixture(scope="module")
def slow_and_warm(tmp_path_factory):
    """A run of 8 steps with the EMA of 0.9999, and the same with its warm-up: their workdirs, states and output."""
    folder, runs = tmp_path_factory.mktemp("runs"), {}
    for name, config in (("slow", CONFIG), ("warm", warmed(CONFIG))):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runs[name] = (
                folder / name,
                jax.device_get(train(experiment(config), folder / name, mesh=one_device())),
                said.getvalue(),
            )
    return runs


@pytest.mark.slow
def test_the_warmup_changes_the_ema_alone(slow_and_warm):
    (_, slow, _), (_, warm, _) = slow_and_warm["slow"], slow_and_warm["warm"]
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(slow, part), getattr(warm, part))
    assert any(
        not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (slow.ema_params, warm.ema_params)), strict=True)
    )


@pytest.mark.slow
def test_the_ema_of_the_warmup_is_the_average_with_its_decays(tmp_path):
    """With a checkpoint at each step, the EMA is followed in NumPy."""
    train_options = {**LATE, "steps": 4, "steps_per_dispatch": 1, "save_every": 1, "keep_every": 1, "sample_every": 0}
    config = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)}, train=train_options)
    train(
        experiment(warmed(config, decay=0.15)), tmp_path / "w"
    )  # 1/10, 2/11 over 0.15, so the decays are 0.1, 0.15, ...
    raw = [leaf(load_run(tmp_path / "w", step=step, weights="raw").params) for step in range(1, 5)]
    averages = [leaf(load_run(tmp_path / "w", step=step).params) for step in range(1, 5)]
    for n in range(1, 4):
        decay = min(0.15, (1 + n) / (10 + n))
        np.testing.assert_allclose(averages[n], decay * averages[n - 1] + (1 - decay) * raw[n], rtol=1e-5, atol=1e-7)


def leaf(params):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(params)])


@pytest.mark.slow
def test_the_share_is_logged(slow_and_warm):
    for name, config in (("slow", CONFIG), ("warm", warmed(CONFIG))):
        lines = read_metrics(slow_and_warm[name][0])
        for line in (line for line in lines if "loss" in line):
            assert line["ema_initial_share"] == ema.initial_share(config.train, line["step"])


def sheet_of(workdir):
    return np.asarray(Image.open(workdir / "samples" / "step_00000008.png"), int)


@pytest.mark.slow
def test_the_grid_shows_the_raw_parameters_beside_an_ema_of_little_use(slow_and_warm):
    workdir = slow_and_warm["slow"][0]
    runs = [load_run(workdir, weights=weights) for weights in ("ema", "raw")]
    generate = make_generator(runs[0].experiment, runs[0].mesh)
    left, right = (np.asarray(generate(run.params, sample_key(0), np.arange(8)))[:4] for run in runs)
    expected = enlarge(beside(grid(left), grid(right)))[..., 0].astype(int)
    assert np.abs(sheet_of(workdir) - expected).max() <= 1
    assert sheet_of(slow_and_warm["warm"][0]).shape[1] < expected.shape[1] / 2  # one set alone


@pytest.mark.slow
def test_sample_tells_of_an_ema_of_little_use(slow_and_warm, capsys, tmp_path):
    def said(name, *options):
        out = tmp_path / f"{name}{options}"
        sample.main(arguments.sample([f"{slow_and_warm[name][0]}", "--num-images", "2", "--out", f"{out}", *options]))
        return capsys.readouterr().out

    assert "100% of the EMA at step 8 " in said("slow")
    assert "of the EMA" not in said("slow", "--weights", "raw")
    assert "of the EMA" not in said("warm")


@pytest.mark.slow
def test_train_says_how_long_the_run_is_and_when_the_first_grid_comes(tmp_path, capsys):
    config = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)}, train=LATE | {"steps": 120, "log_every": 60})
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=120, sample_every=120))
    train(experiment(config), tmp_path / "w", mesh=one_device())
    said = capsys.readouterr()
    for told in (
        " parameters, 1,797 images",
        f"120 steps are {120 * 16 / 1797:.1f} epochs",
        "first grid of samples comes at step 120",
    ):
        assert told in said.out
    assert "The other 68 steps will take about" in said.out
    assert "of the EMA" not in said.out
    train(
        experiment(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=240))),
        tmp_path / "w",
        mesh=one_device(),
    )
    assert "next grid of samples comes at step 240" in capsys.readouterr().out


@pytest.mark.slow
def test_train_tells_at_the_start_that_the_ema_will_be_of_little_use(slow_and_warm):
    said = slow_and_warm["slow"][2]
    assert "first grid of samples comes at step 8" in said
    assert "100% of the EMA will still be the initial parameters at the last step" in said
    assert "the grid shows EMA (left) and raw parameters (right)" in said
    assert "of the EMA" not in slow_and_warm["warm"][2]


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "a minute"), (1260, "21 minutes"), (9000, "2.5 hours"), (216000, "2.5 days")]
)
def test_durations(seconds, words):
    assert duration(seconds) == words


def script(name, *options):
    """What a script prints, run with kernels optimised, unlike the tests."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, f"{name}.py", *map(str, options)]
    done = subprocess.run(command, cwd=CONFIGS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_200_steps_of_digits_show_noise_without_the_warmup_and_digits_with_it(tmp_path):
    """Precision of pixels. Noise has 0, a Gaussian fitted to the pixels 0.22, 200 steps 0.30, and the demo's 1,000 steps 0.60."""
    reached = {}
    short = ["--train.steps", 200, "--train.sample-every", 200, "--train.save-every", 200, "--train.ema-decay", 0.9999]
    for name, option in (("slow", "--train.no-ema-warmup"), ("warm", "--train.ema-warmup")):
        said = script("train", "configs/digits.py", "--workdir", tmp_path / name, *short, option)
        assert ("98% of the EMA at step 200" in said) == (name == "slow")
        sampled = ["--num-images", 512, "--batch-size", 256, "--format", "npz", "--out", tmp_path / f"{name}_images"]
        script("sample", tmp_path / name, *sampled)
        with np.load(tmp_path / f"{name}_images" / "images.npz") as file:
            reached[name] = precision(file["images"])
    assert reached["slow"] < 0.01
    assert reached["warm"] > 0.25
