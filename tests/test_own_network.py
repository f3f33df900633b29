"""A network of one's own trains, is killed and continued, samples, is measured and exported like the U-Net."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from interop import convert
from mixer import Mixer, train_mixer
from tiny import read_images

from ddpm_jax import load_run
from ddpm_jax.core.errors import UsageError
from ddpm_jax.evaluation.evaluation import Evaluation, Options
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.metrics import evaluate
from ddpm_jax.generation.generator import SamplerOptions
from ddpm_jax.generation.image_set import generate_set
from ddpm_jax.interop.export import export_run

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("own") / "run"
    return workdir, jax.device_get(train_mixer(workdir))


@pytest.fixture(scope="module")
def run(trained):
    return load_run(trained[0], network=Mixer())


def assert_same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_it_is_trained_and_continued_bit_for_bit(trained, tmp_path):
    workdir, state = trained
    losses = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert (workdir / "samples" / "step_00000024.png").exists()
    train_mixer(tmp_path / "run", steps=12)
    again = train_mixer(tmp_path / "run")
    assert_same(jax.device_get(again), state)
    assert {device.id for leaf in jax.tree.leaves(again) for device in leaf.devices()} == {
        0
    }  # the mesh that it was given


@pytest.mark.slow
def test_it_is_killed_and_continued_bit_for_bit(trained, tmp_path):
    """SIGKILL once the first checkpoint is there, in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    process = subprocess.Popen([sys.executable, TESTS / "mixer.py", tmp_path / "run"], env=environment)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (tmp_path / "run" / "checkpoints" / "4").exists():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    assert_same(jax.device_get(train_mixer(tmp_path / "run")), trained[1])


def test_it_samples_and_its_bits_per_dim_are_measured(run, trained, tmp_path):
    options = SamplerOptions(sampler="ddim", steps=(5,))
    generate_set(run, epath.Path(tmp_path / "out"), range(4), seed=0, options=options, batch_size=8, format="npz")
    assert read_images(tmp_path / "out" / "images.npz").shape == (4, 8, 8, 1)
    evaluation = Evaluation.of_run(run, trained[0], PIXELS, Options(num_real=8, batch_size=8))
    result = evaluate(evaluation, ("nll", "losses"))
    assert 0 < result["nll"]["value"] < 20
    assert result["losses"]["value"] > 0


def test_it_is_exported_as_a_program_that_draws_the_same_images(run, tmp_path):
    export_run(run, tmp_path / "mixer.jax_export")
    program = jax.export.deserialize(bytearray((tmp_path / "mixer.jax_export").read_bytes()))
    images = np.asarray(program.call(np.uint32(0), np.arange(4, dtype=np.int32))).astype(int)
    options = SamplerOptions()
    generate_set(run, epath.Path(tmp_path / "out"), range(4), seed=0, options=options, batch_size=8, format="npz")
    assert np.abs(read_images(tmp_path / "out" / "images.npz").astype(int) - images).max() <= 1


def test_without_the_network_the_run_is_refused_by_its_name(trained):
    with pytest.raises(UsageError, match="is of the network Mixer, got UNet; give the network that was trained"):
        load_run(trained[0])


def test_what_only_the_u_net_can_do_is_refused(trained, run, tmp_path):
    from ddpm_jax.interop.names import parameters

    with pytest.raises(UsageError, match=r"have no Mixer, only the U-Net; export the run to a \.safetensors"):
        parameters(run.experiment)
    with pytest.raises(UsageError, match="is of the network Mixer"):
        convert("to-diffusers", trained[0], tmp_path / "model")
