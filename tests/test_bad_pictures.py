"""A picture that cannot be decoded, through whole runs of train.py: where it is named, what is kept, and how the run goes on."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_pictures import encoded

from ddpm_jax.data import batch_indices

ROOT = Path(__file__).parent.parent
OPTIONS = """--data.image-size 8 --model.ch 4 --model.ch-mult 1 --model.groups 2 --model.num-res-blocks 1
--model.attn-resolutions 8 --diffusion.T 4 --train.batch-size 4 --train.warmup-steps 2 --train.steps 8
--train.log-every 2 --train.save-every 2 --train.sample-every 0"""
NAMES = [f"{i:02}.jpg" for i in range(32)]
CONTENT = {
    name: encoded(np.random.default_rng(i).integers(0, 256, (8, 8, 3), np.uint8), "JPEG")
    for i, name in enumerate(NAMES)
}
BAD = NAMES[batch_indices(0, 5, 1, 4, 32)[0, 2]]  # what the sixth step takes, after the save of the fourth
ADVICE = (
    "list all such pictures with ddpm-jax prepare-data SOURCE --check and leave them out with --data.on-bad-image skip"
)


@pytest.fixture
def run(tmp_path):
    """Runs a script as a process: (exit code, standard error without the bars)."""
    environment = os.environ | {"DDPM_JAX_CACHE": str(tmp_path / "cache")}
    environment.pop("XLA_FLAGS", None)  # one device

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stderr.rpartition("\r")[2].strip()

    return run


def cut(name):
    return CONTENT[name][: len(CONTENT[name]) // 2]


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_bad_picture_of_a_set_that_is_decoded_once_ends_train_before_it_begins(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name in NAMES:
            archive.writestr(name, cut(name) if name == BAD else CONTENT[name])
    source = ("--data.source", tmp_path / "pictures.zip")
    code, told = run("train.py", "configs/folder.py", "--workdir", tmp_path / "run", *source, *OPTIONS.split())
    assert code == 2
    assert told.splitlines()[-1].startswith(f"train.py: the picture {BAD} cannot be decoded (")
    assert told.endswith(f"; mend or remove it, or {ADVICE}")
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob("*.npy"))


@pytest.mark.slow
def test_a_bad_picture_met_in_training_stops_the_run_which_goes_on_once_it_is_mended_or_left_out(run, tmp_path):
    """The run that goes on with the mended picture ends as one that had it whole from the start."""
    folder, workdir = tmp_path / "pictures", tmp_path / "run"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_bytes(cut(name) if name == BAD else CONTENT[name])

    def train(workdir, *more):
        source = ("--data.source", folder, "--data.cache", "none")
        return run("train.py", "configs/folder.py", "--workdir", workdir, *source, *OPTIONS.split(), *more)

    code, told = train(workdir)
    assert code == 2
    assert told.splitlines()[-1].startswith(f"train.py: the picture {BAD} cannot be decoded (")
    assert "Traceback" not in told
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    shutil.copytree(workdir, tmp_path / "skipping")

    assert run("prepare_data.py", folder, "--check")[0] == 1
    code, told = train(tmp_path / "skipping", "--data.on-bad-image", "skip", "--changed-data")
    assert code == 0, told
    assert len(losses(tmp_path / "skipping")) == 4
    (meta,) = (tmp_path / "skipping" / "checkpoints" / "8").rglob("meta*/**/metadata")
    assert json.loads(meta.read_text())["data"]["skipped"] == 1

    (folder / BAD).write_bytes(CONTENT[BAD])
    before = files(workdir / "checkpoints")
    code, told = train(workdir)
    assert code == 2
    assert "the data set has changed since the checkpoint of step 4: it was {'images': 32, " in told
    assert told.endswith("--changed-data")
    assert files(workdir / "checkpoints") == before
    assert train(workdir, "--changed-data")[0] == 0
    assert train(tmp_path / "whole")[0] == 0
    assert losses(workdir) == losses(tmp_path / "whole")
