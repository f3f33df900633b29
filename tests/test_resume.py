"""A run killed at any moment and started again ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import experiment

from ddpm_jax import config as configs
from ddpm_jax.core import sharding
from ddpm_jax.training import step as training
from ddpm_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
# Real, if small, runs of the script: its own process, its own compilation (with kernels optimised, unlike in other tests).
# With classes, so that labels have to come back as well.
OPTIONS = [
    *("--model.ch", "8", "--model.groups", "4", "--model.ch-mult", "1", "--model.attn-resolutions", "8"),
    *("--model.dropout", "0.1", "--train.flip", "--diffusion.T", "10", "--train.batch-size", "16"),
    *("--train.steps", "120", "--train.steps-per-dispatch", "2", "--train.log-every", "6"),
    *("--train.save-every", "20", "--train.sample-every", "0"),
    *("--model.num-classes", "10", "--train.label-dropout", "0.2"),
    *("--train.ema-decays", "0.5", "--train.ema-widths", "0.05", "0.1"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    cache = tmp_path_factory.mktemp("compiled")
    keep = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return keep | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"}


def start(workdir, environment, *options):
    command = [sys.executable, "train.py", "configs/digits.py", "--workdir", str(workdir), *OPTIONS, *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def last_state(workdir):
    """The state at the last step, on the host."""
    config = configs.from_json(json.loads((workdir / "config.json").read_text()))
    checkpoints = Checkpoints(workdir / "checkpoints")
    shapes = jax.eval_shape(lambda: training.init_state(experiment(config), jax.random.key(0)))
    everywhere = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:1]))
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes)
    step = checkpoints.choose()
    state = checkpoints.restore_state(step, like)
    checkpoints.close()
    return step, jax.device_get(state)


def logged(workdir):
    """The logged losses and norms by step, and the steps in the order of the file."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines if "loss" in line]


def snapshots(workdir):
    """The snapshots' names, and what they hold."""
    return {path.name: load_file(path) for path in sorted((workdir / "snapshots").iterdir())}


def last_logged(workdir):
    """The last step that has a whole line in metrics.jsonl, 0 if none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    code, output = finish(start(workdir, environment))
    assert code == 0, output
    return workdir


def assert_same_end(workdir, uninterrupted):
    (step_a, a), (step_b, b) = last_state(uninterrupted), last_state(workdir)
    assert step_a == step_b == 120
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
    assert logged(workdir) == logged(uninterrupted)
    a, b = snapshots(uninterrupted), snapshots(workdir)
    assert list(a) == list(b) == [f"{step:08d}.safetensors" for step in range(20, 121, 20)]
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_five_kills_at_random_moments_change_no_bit(tmp_path, uninterrupted, environment):
    """SIGKILL while it trains and saves; the moments differ from run to run of this test and are printed if it fails."""
    seed = random.SystemRandom().randrange(2**32)
    moments = random.Random(seed)
    print("seed", seed)
    for first in (0, 20, 40, 60, 75):
        process, reached = start(tmp_path, environment), first + moments.randrange(25)
        while last_logged(tmp_path) <= reached and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.5 if first < 75 else 0.02))  # the last time there is not much left to do
        assert process.poll() is None, process.communicate()[0]
        process.send_signal(signal.SIGKILL)
        process.communicate()
    code, output = finish(start(tmp_path, environment))
    assert code == 0, output
    assert "Continuing from step" in output
    assert_same_end(tmp_path, uninterrupted)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_continue(tmp_path, uninterrupted, environment, signum):
    process = start(tmp_path, environment)
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    code, output = finish(process)
    assert code == 128 + signum
    assert f"{signal.Signals(signum).name}: stopped at step" in output
    assert "the same command continues from there" in output
    assert "Traceback" not in output
    code, output = finish(start(tmp_path, environment))
    assert code == 0, output
    assert_same_end(tmp_path, uninterrupted)


def test_the_finished_run_says_so_and_longer_training_is_allowed(uninterrupted, environment, tmp_path):
    code, output = finish(start(uninterrupted, environment))
    assert code == 0
    assert "The run stands at step 120 and train.steps=120, so nothing is left to train" in output
    assert f"tensorboard --logdir {uninterrupted} " in output
    longer = tmp_path / "longer"
    shutil.copytree(uninterrupted, longer)
    code, output = finish(start(longer, environment, "--train.steps", "140"))
    assert code == 0, output
    assert [step for step, *_ in logged(longer)] == list(range(6, 139, 6))
    assert last_state(longer)[0] == 140
    code, output = finish(start(uninterrupted, environment, "--train.lr", "0.1"))
    assert code == 2
    assert "differs in train.lr" in output
    assert "Traceback" not in output
