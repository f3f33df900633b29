"""Evaluation on several processes, as on several hosts: the same numbers as on one, written once, continued after a kill."""

import json
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from evaluated import make_workdir
from PIL import Image
from processes import finish, one_device, start
from safetensors.numpy import save_file

from ddpm_jax.evaluation import inception_weights

pytestmark = pytest.mark.slow

EVALUATE = ["--features", "pixels", "--num-images", "18", "--num-real", "30", "--batch-size", "4", "--bootstrap", "4"]


@pytest.fixture
def environment(tmp_path):
    return one_device(tmp_path)


def evaluated(workdir):
    """The numbers of each metric's one result, and the figures' pixels by name."""
    results = [json.loads(path.read_text()) for path in workdir.glob("evaluation/*.json")]
    metrics = [result.pop("metric") for result in results]
    assert len(set(metrics)) == len(metrics)
    for result in results:
        del result["definition"], result["sha256"]  # they name the devices
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
    environment = environment | {"DDPM_JAX_CACHE": str(tmp_path / "hosts")}
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
    assert (tmp_path / "hosts_0" / "features").exists()
    assert not (tmp_path / "hosts_1").exists()
    (numbers, figures), (numbers_two, figures_two) = evaluated(one), evaluated(two)
    assert set(numbers) == {"fid", "kid", "prdc", "nll", "rate-distortion", "losses", "nearest"} == set(numbers_two)
    for metric, expected in numbers.items():
        rel = 1e-5 if metric in ("nll", "rate-distortion") else 1e-3
        for value, wanted in zip(numbers_two[metric], expected, strict=True):
            assert value == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=rel)), metric
    assert len(figures) == 5
    assert set(figures) == set(figures_two)
    for name, pixels in figures.items():
        assert np.abs(figures_two[name] - pixels).max() <= 1, name


FEATURES = """
import numpy as np
from ddpm_jax.commands import cli
from ddpm_jax.core import sharding
from ddpm_jax.evaluation.features import on_devices
from ddpm_jax.evaluation.inception_weights import inception_path, load_inception

def main():
    sharding.start_processes()
    mesh = sharding.make_mesh()
    images = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    doubled = on_devices(lambda factor, images: {"features": images.reshape(-1, 12) * factor}, 2.0, mesh, 4)
    np.testing.assert_array_equal(doubled(images)["features"], 2.0 * images.reshape(5, 12))
    print(mesh.devices.size, "devices agree")
    print("weights", load_inception()[1])
    load_inception(inception_path().parent / "seconds.safetensors")

cli.run(main)
"""


def test_two_processes_compute_features_with_the_weights_that_the_first_one_has(environment, tmp_path):
    """Features of images split over both are whole on each, also of an odd number; a file that the first one lacks stops both,
    whatever the other has.
    """
    for i in range(2):
        (tmp_path / f"cache_{i}").mkdir()
    tensors = {name: np.ones(shape, np.float32) for name, shape in inception_weights._shapes().items()}
    checksum = inception_weights._checksum(tensors)
    save_file(tensors, tmp_path / "cache_0" / "inception-2015-12-05.safetensors", {"sha256": checksum})
    (tmp_path / "cache_1" / "seconds.safetensors").write_text("only the second one has it")
    outputs = finish(start(["-c", FEATURES], environment, 2), 2)
    for output in outputs:
        assert "2 devices agree" in output
        assert f"weights {checksum}" in output
        assert "the Inception weights are not there" in output
        assert "Traceback" not in output
