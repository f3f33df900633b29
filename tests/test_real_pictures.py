"""Real pictures: CIFAR-10's, as JPEG in two zip files, in the folder that the environment variable DDPM_JAX_PICTURES names."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import open_source
from ddpm_jax.data.pictures import decode

ROOT = Path(__file__).parent.parent
FOLDER = Path(os.environ.get("DDPM_JAX_PICTURES") or "/nowhere")
TRAIN, TEST = FOLDER / "cifar10_jpeg_train.zip", FOLDER / "cifar10_jpeg_test.zip"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (TRAIN.is_file() and TEST.is_file()),
        reason="DDPM_JAX_PICTURES does not name a folder with the two zip files",
    ),
]


@pytest.fixture(autouse=True, scope="module")
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_JAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_50000_jpegs_are_decoded_once_and_then_read_from_the_cache(capsys):
    config = DataConfig(source=str(TRAIN))
    seconds = []
    for _ in range(2):
        start = time.process_time()  # this machine may have other work
        source = open_source(config)
        seconds.append(time.process_time() - start)
    assert source.images.shape == (50_000, 32, 32, 3)
    assert np.bincount(source.labels).tolist() == [5000] * 10
    with capsys.disabled():
        print(f"\n50,000 JPEGs: decoded in {seconds[0]:.1f} s of CPU, then mapped in {seconds[1]:.2f} s")
    assert seconds[1] < 0.5 * seconds[0]  # the second time nothing is decoded
    with zipfile.ZipFile(TRAIN) as archive:
        names = sorted(archive.namelist())
        for i in (0, 25_000, 49_999):
            np.testing.assert_array_equal(source.images[i], decode(archive.read(names[i]), (32, 32), 3))


def test_cifar10_config_trains_on_real_pictures_and_the_loss_falls(tmp_path):
    options = """--data.image-size 16 --model.ch 8 --model.groups 4 --model.ch-mult 1 --model.num-res-blocks 1
    --diffusion.T 10 --diffusion.beta-end 0.5 --train.batch-size 8 --train.lr 4e-3 --train.warmup-steps 5
    --train.ema-decay 0.9 --train.steps 40 --train.log-every 10 --train.save-every 20 --train.sample-every 40
    --train.num-samples 8"""
    command = [sys.executable, "train.py", "configs/cifar10.py", "--workdir", tmp_path / "run", "--data.source", TEST]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, fast kernels
    done = subprocess.run(
        [*command, *options.split()], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    assert (tmp_path / "run" / "samples" / "step_00000040.png").stat().st_size > 1000


def test_one_truncated_jpeg_among_10000_is_named_before_training(tmp_path):
    path = tmp_path / "broken.zip"
    with zipfile.ZipFile(TEST) as good, zipfile.ZipFile(path, "w") as broken:
        for entry in good.infolist():
            content = good.read(entry)
            broken.writestr(
                entry.filename, content[: len(content) // 2] if entry.filename == "dog/0500.jpg" else content
            )
    with pytest.raises(UsageError, match=r"^the picture dog/0500.jpg cannot be decoded \(.*[Tt]runcated"):
        open_source(DataConfig(source=str(path)))
    assert len(open_source(DataConfig(source=str(path), cache="none"))) == 10_000
