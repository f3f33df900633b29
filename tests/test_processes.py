"""Several processes, as on several hosts: two of them on this machine, each with one device, through the real scripts."""

import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from processes import ROOT, finish, one_device, start
from safetensors.numpy import load_file
from tiny import read_images

from ddpm_jax.training.metric_writer import read_metrics

pytestmark = pytest.mark.slow

TRAIN = [
    *(
        "train.py",
        "configs/digits.py",
        "--model.ch",
        "8",
        "--model.groups",
        "4",
        "--model.ch-mult",
        "1",
        "--model.attn-resolutions",
        "8",
    ),
    *("--model.dropout", "0.1", "--diffusion.T", "10", "--train.batch-size", "16", "--train.steps-per-dispatch", "2"),
    *("--train.steps", "24", "--train.log-every", "4", "--train.save-every", "8", "--train.sample-every", "8"),
    *("--train.num-samples", "4", "--train.eval-every", "8", "--train.eval-source", "digits"),
    *("--train.eval-images", "20", "--train.eval-samples", "6", "--train.eval-features", "pixels"),
    *("--train.ema-widths", "0.05", "0.1"),
]
SAMPLE = ["--num-images", "10", "--batch-size", "4", "--steps", "5"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return one_device(tmp_path_factory.mktemp("processes"))


def logged(workdir, *names):
    """The steps at which scalars were logged, and these."""
    lines = [line for line in read_metrics(epath.Path(workdir)) if names[0] in line]
    return [line["step"] for line in lines], np.array([[line[name] for name in names] for line in lines])


@pytest.fixture(scope="module")
def alone(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("alone")
    finish(start([*TRAIN, "--workdir", str(workdir)], environment, 1))
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory, environment):
    """A run on two processes: one of them is asked to stop, both do, and both continue to the end."""
    workdir = tmp_path_factory.mktemp("together")
    command = [*TRAIN, "--workdir", str(workdir)]
    running = start(command, environment, 2)
    metrics = workdir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()) and all(p.poll() is None for p in running):
        time.sleep(0.01)
    running[1].send_signal(signal.SIGTERM)
    stopped = finish(running, 128 + signal.SIGTERM)
    assert all("SIGTERM: stopped at step" in output for output in stopped), stopped
    continued = finish(start(command, environment, 2))
    assert all("Continuing from step" in output for output in continued)
    return workdir


def test_two_processes_train_the_same_run_and_stop_together(alone, together):
    """Draws and data do not depend on the processes, so the losses agree; every step and grid is there once."""
    steps, values = logged(alone, "loss", "grad_norm")
    steps_together, values_together = logged(together, "loss", "grad_norm")
    assert steps_together == steps == [4, 8, 12, 16, 20, 24]
    np.testing.assert_allclose(values_together, values, rtol=1e-5)
    grids = [sorted(p.name for p in (w / "samples").iterdir()) for w in (alone, together)]
    assert grids[0] == grids[1] == [f"step_{step:08d}.png" for step in (8, 16, 24)]


def test_two_processes_measure_the_same_on_held_out_images(alone, together):
    for names, tolerance in ((("eval_loss", "eval_loss_quarter_1", "eval_bits_per_dim"), 1e-5), (("eval_fid",), 1e-3)):
        steps, values = logged(alone, *names)
        steps_together, values_together = logged(together, *names)
        assert steps_together == steps == [8, 16, 24]
        np.testing.assert_allclose(values_together, values, rtol=tolerance)


def test_two_processes_write_the_same_snapshots_of_averages(alone, together):
    names = [sorted(p.name for p in (w / "snapshots").iterdir()) for w in (alone, together)]
    assert names[0] == names[1] == [f"{step:08d}.safetensors" for step in (8, 16, 24)]
    a, b = (load_file(w / "snapshots" / names[0][-1]) for w in (alone, together))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-5), a, b)


@pytest.mark.parametrize("weights", ["ema", "width:0.08"])
def test_two_processes_sample_the_same_images(weights, alone, environment, tmp_path):
    one, two, command = tmp_path / "one", tmp_path / "two", ["sample.py", str(alone), *SAMPLE, "--weights", weights]
    finish(start([*command, "--out", str(one)], environment, 1))
    finish(start([*command, "--out", str(two)], environment, 2))
    names = [sorted(p.name for p in folder.iterdir()) for folder in (one, two)]
    assert names[0] == names[1]
    images = [read_images(folder / "images.npz").astype(int) for folder in (one, two)]
    assert images[0].shape == (10, 8, 8, 1)
    assert np.abs(images[0] - images[1]).max() <= 1


def test_what_the_first_process_refuses_stops_all(alone, environment, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    running = start(["sample.py", str(alone), *SAMPLE, "--out", str(tmp_path)], environment, 2)
    outputs = finish(running, 2)
    assert "has files but no set.json" in outputs[0]
    assert "the first process has stopped; its message says why" in outputs[1]


@pytest.mark.parametrize("other", ["lr", "images", "eval-images"])
def test_another_config_or_other_images_on_one_process_stop_all(other, environment, tmp_path):
    np.savez(tmp_path / "other.npz", images=np.zeros((20, 8, 8), np.uint8))
    option = {"lr": "--train.lr=0.1", "images": "--data.source=", "eval-images": "--train.eval-source="}[other]
    option += f"{tmp_path}/other.npz" if option.endswith("=") else ""
    running = start([*TRAIN, "--workdir", str(tmp_path / "w")], environment, 2, last=[option])
    outputs = finish(running, 2)
    assert "another process differs from the first one" in outputs[0]
    told = {"lr": "train.lr (there 0.003, here 0.1)", "images": "data.source.images (there 1797, here 20)"}
    assert (
        f"differs from process 0 in {told.get(other, 'train.eval_source.images (there 1797, here 20)')}" in outputs[1]
    )
    assert not (tmp_path / "w" / "config.json").exists()


def test_processes_that_are_not_named_are_told_so(environment, tmp_path):
    command = [sys.executable, *TRAIN, "--workdir", str(tmp_path / "w"), "--distributed"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        assert name in process.stderr
    assert "Traceback" not in process.stderr
