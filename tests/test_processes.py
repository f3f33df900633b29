"""Several processes, as on several hosts: two of them on this machine, each with one device, through the real scripts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from evaluated import make_workdir
from PIL import Image

from ddpm_jax.image_set import read_images

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
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
    *("--train.num-samples", "4"),
]
EVALUATE = ["--features", "pixels", "--num-images", "18", "--num-real", "30", "--batch-size", "4", "--bootstrap", "4"]
SAMPLE = ["--num-images", "10", "--batch-size", "4", "--steps", "5"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    # One device each, and quick to compile.
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    caches = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "DDPM_JAX_CACHE": str(folder / "cache")}
    return os.environ | flags | caches | {"JAX_PLATFORMS": "cpu"}


def start(command, environment, processes):
    """One process of the command, or several joined ones, each with a cache of its own, as on machines of their own."""
    if processes > 1:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            address = f"localhost:{s.getsockname()[1]}"
        command = [*command, "--distributed"]
        environment = environment | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(i), "DDPM_JAX_CACHE": f"{environment['DDPM_JAX_CACHE']}_{i}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def finish(running, code=0):
    outputs = [p.communicate(timeout=200)[0] for p in running]
    assert [p.returncode for p in running] == [code] * len(running), "\n".join(outputs)
    return outputs


def logged(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines], np.array([[line["loss"], line["grad_norm"]] for line in lines])


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
    steps, values = logged(alone)
    steps_together, values_together = logged(together)
    assert steps_together == steps == [4, 8, 12, 16, 20, 24]
    np.testing.assert_allclose(values_together, values, rtol=1e-5)
    grids = [sorted(p.name for p in (w / "samples").iterdir()) for w in (alone, together)]
    assert grids[0] == grids[1] == [f"step_{step:08d}.png" for step in (8, 16, 24)]


def test_two_processes_sample_the_same_images(alone, environment, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(["sample.py", str(alone), *SAMPLE, "--out", str(one)], environment, 1))
    finish(start(["sample.py", str(alone), *SAMPLE, "--out", str(two)], environment, 2))
    names = [sorted(p.name for p in folder.iterdir()) for folder in (one, two)]
    assert names[0] == names[1]
    images = [read_images(epath.Path(folder / "images.npz")).astype(int) for folder in (one, two)]
    assert images[0].shape == (10, 8, 8, 1)
    assert np.abs(images[0] - images[1]).max() <= 1


def test_what_the_first_process_refuses_stops_all(alone, environment, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    running = start(["sample.py", str(alone), *SAMPLE, "--out", str(tmp_path)], environment, 2)
    outputs = finish(running, 2)
    assert "has files but no set.json" in outputs[0]
    assert "the first process has stopped; its message says why" in outputs[1]


def test_processes_that_are_not_named_are_told_so(environment, tmp_path):
    command = [sys.executable, *TRAIN, "--workdir", str(tmp_path / "w"), "--distributed"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in process.stderr
    assert "Traceback" not in process.stderr


# ---- Evaluation


def evaluated(workdir):
    """The numbers of each metric's one result, and the figures' pixels by name."""
    results = [json.loads(path.read_text()) for path in workdir.glob("evaluation/*.json")]
    metrics = [result.pop("metric") for result in results]
    assert len(set(metrics)) == len(metrics)
    made_of = [result.pop("definition") for result in results]
    assert all(definition["software"]["device"].endswith("cpu") for definition in made_of)
    figures = {}
    for path in workdir.glob("evaluation/figures/*.png"):
        with Image.open(str(path)) as picture:
            figures[path.name] = np.asarray(picture).astype(int)
    return dict(zip(metrics, map(jax.tree.leaves, results), strict=True)), figures


def kept(workdir):
    return {path: path.stat().st_mtime_ns for path in Path(workdir).glob("evaluation/parts/*/*.npz")}


def test_two_processes_evaluate_the_same_numbers_and_continue_after_a_kill(environment, tmp_path):
    """Bounds agree to float32 rounding, 1e-5; numbers of samples, which may differ by 1/255, to 1e-3.

    The first process writes and reads for both, also into its machine's cache: the other one has none.
    """
    one, two = make_workdir(tmp_path / "one"), make_workdir(tmp_path / "two")
    finish(start(["evaluate.py", str(one), *EVALUATE], environment, 1))
    environment = environment | {"DDPM_JAX_CACHE": str(tmp_path / "cache")}
    running = start(["evaluate.py", str(two), *EVALUATE], environment, 2)
    while len(kept(two)) < 4 and all(p.poll() is None for p in running):
        time.sleep(0.005)
    for process in running:
        process.kill()
    finish(running, -signal.SIGKILL)
    before = kept(two)
    outputs = finish(start(["evaluate.py", str(two), *EVALUATE], environment, 2))
    after = kept(two)
    assert 4 <= len(before) < len(after)
    assert before == {path: after[path] for path in before}
    assert "The report: " in outputs[0]
    assert "bits/dim: 100%" in outputs[0]
    assert [line for line in outputs[1].splitlines() if not line.startswith("[Gloo]")] == []
    assert (tmp_path / "cache_0" / "features").exists()
    assert not (tmp_path / "cache_1").exists()
    (numbers, figures), (numbers_two, figures_two) = evaluated(one), evaluated(two)
    assert set(numbers) == {"fid", "kid", "prdc", "nll", "rate-distortion", "nearest"} == set(numbers_two)
    for metric, expected in numbers.items():
        rel = 1e-5 if metric in ("nll", "rate-distortion") else 1e-3
        for value, wanted in zip(numbers_two[metric], expected, strict=True):
            assert value == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=rel)), metric
    assert len(figures) == 5
    assert set(figures) == set(figures_two)
    for name, pixels in figures.items():
        assert np.abs(figures_two[name] - pixels).max() <= 1, name


FEATURES_AND_A_REFUSAL = """
import numpy as np
from ddpm_jax import cli, sharding
from ddpm_jax.evaluation.features import on_devices
from ddpm_jax.evaluation.inception_weights import inception_features

def main():
    sharding.start_processes()
    mesh = sharding.make_mesh()
    images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    doubled = on_devices(lambda factor, images: {"features": images.reshape(-1, 12) * factor}, 2.0, mesh, 4)
    np.testing.assert_array_equal(doubled(images)["features"], 2.0 * images.reshape(5, 12))
    print(mesh.devices.size, "devices agree")
    inception_features(mesh)

cli.run(main)
"""


def test_two_processes_compute_features_and_are_refused_without_inception_weights_together(environment, tmp_path):
    """Features of images split over both are whole on each, also of an odd number; a file that the first one lacks stops both,
    whatever the other has.
    """
    (tmp_path / "cache_1").mkdir()
    (tmp_path / "cache_1" / "inception-2015-12-05.safetensors").write_text("the second one's")
    environment = environment | {"DDPM_JAX_CACHE": str(tmp_path / "cache")}
    outputs = finish(start(["-c", FEATURES_AND_A_REFUSAL], environment, 2), 2)
    for output in outputs:
        assert "2 devices agree" in output
        assert "the Inception weights are not there" in output
        assert "Traceback" not in output
