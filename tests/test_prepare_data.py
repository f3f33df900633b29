"""prepare_data.py: it prepares what needs it, and finds every picture that cannot be decoded."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_folders import CONTENT, CUT, NAMES, make_folder, make_zip, to_decode
from test_pictures import encoded, pages

from ddpm_jax.commands import cli
from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.data import cache, open_source

ROOT = Path(__file__).parent.parent
BAD = CONTENT | {"a.jpg": CUT, "b/10.png": b"hello"}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prepare_data(monkeypatch, capsys):
    """Runs the script's main function with these arguments: (exit code, standard output)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
        code = 0
        try:
            cli.prepare("prepare_data")()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return run


@pytest.mark.parametrize("make", [make_folder, make_zip])
def test_check_names_every_bad_picture_and_writes_their_list(make, prepare_data, tmp_path):
    path = make(tmp_path / "pictures.zip", content=BAD) if make is make_zip else make(tmp_path / "p", content=BAD)
    code, out = prepare_data(path, "--check")
    assert code == 1
    truncated, unknown, summary = out.splitlines()
    assert truncated.startswith("a.jpg: ")
    assert "truncated" in truncated
    assert unknown.startswith("b/10.png: cannot identify image file")
    file = cache.bad_list(to_decode(path))
    assert summary == f"2 of 7 pictures cannot be decoded; their list: {file}"
    assert sorted(json.loads(file.read_text())) == ["a.jpg", "b/10.png"]
    source = open_source(DataConfig(source=str(path), image_size=8, on_bad_image="skip"))
    assert len(source) == 5
    assert source.identity["skipped"] == 2


def test_check_of_good_pictures_ends_with_0(prepare_data, tmp_path):
    path = make_folder(tmp_path / "pictures")
    code, out = prepare_data(path, "--check", "--workers", 2)
    assert code == 0
    assert out.startswith("0 of 7 pictures cannot be decoded")


@pytest.mark.parametrize(
    ("options", "changes", "bad"),
    [
        ("", {}, ["float.tif", "pages.tif"]),
        ("--channels 1 --value-range 0 65535", {"channels": 1, "value_range": (0, 65535)}, ["pages.tif"]),
        ("--channels 1 --value-range 0 4095", {"channels": 1, "value_range": (0, 4095)}, ["a.png", "pages.tif"]),
    ],
)
def test_check_is_by_the_channels_and_values_of_the_run_and_so_is_its_list(
    options, changes, bad, prepare_data, tmp_path
):
    grey, ones = np.full((8, 8), 200, np.uint8), np.ones((8, 8), np.float32)
    content = {"a.png": encoded(grey), "float.tif": encoded(ones, "TIFF"), "pages.tif": pages(ones, ones)}
    path = make_folder(tmp_path / "p", list(content), content)
    data = DataConfig(source=str(path), image_size=8, on_bad_image="skip", **changes)
    prepare_data(path, "--check", "--channels", 3 if options else 1)  # a list for other options
    with pytest.raises(UsageError, match=f"have none for this .*; write it with .* --check {options}".rstrip() + "$"):
        open_source(data)
    code, out = prepare_data(path, "--check", *options.split())
    assert code == 1
    assert [line.split(":")[0] for line in out.splitlines()[:-1]] == bad
    assert len(open_source(data)) == 3 - len(bad)


def test_a_list_that_cannot_be_written_is_told_after_the_names(prepare_data, tmp_path, monkeypatch, capsys):
    def read_only(path, text):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(cache.files, "write_text", read_only)
    with pytest.raises(RunError, match=r"Read-only file system\); make room there, or name another folder"):
        prepare_data(make_folder(tmp_path / "p", content=BAD), "--check")
    assert "a.jpg: " in capsys.readouterr().out
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    for folder in ("/proc", str(tmp_path / "file" / "below")):
        monkeypatch.setenv("DDPM_JAX_CACHE", folder)
        with pytest.raises(RunError, match=f"cannot be written to {folder}"):
            prepare_data(tmp_path / "p", "--check")


def test_a_name_without_its_prefix_is_helped(prepare_data):
    for options in ((), ("--check",)):
        with pytest.raises(UsageError, match="'cifar10' does not exist; perhaps you meant tfds:cifar10"):
            prepare_data("cifar10", *options)


def test_what_needs_no_preparation_and_what_cannot_be_checked_is_said(prepare_data, tmp_path):
    path = make_folder(tmp_path / "pictures")
    with pytest.raises(
        UsageError, match="needs no preparation; add --check to look for pictures that cannot be decoded"
    ):
        prepare_data(path)
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4), np.uint8))
    for source in ("digits", tmp_path / "x.npy"):
        with pytest.raises(
            UsageError, match="holds arrays, not encoded pictures; there is nothing to prepare or check"
        ):
            prepare_data(source, "--check")


def test_arguments_are_checked(prepare_data, tmp_path):
    with pytest.raises(UsageError, match=r"value_range=\(2\.0, 1\.0\) is no range of float32"):
        prepare_data(make_folder(tmp_path), "--check", "--value-range", 2, 1)
    code, _ = prepare_data("--check")
    assert code == 2
    with pytest.raises(UsageError, match="--workers -1 is too small; use 0 or more"):
        prepare_data(tmp_path, "--check", "--workers", -1)
    code, out = prepare_data("--help")
    assert code == 0
    assert "--check" in out


def test_a_mistake_ends_with_code_2_and_one_sentence(tmp_path):
    command = [sys.executable, "prepare_data.py", str(tmp_path / "nowhere"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"prepare_data.py: data.source='{tmp_path}/nowhere' does not exist; use one of digits, tfds:NAME"
    )
    assert done.stderr.count("\n") == 1


def test_names_that_the_terminal_cannot_show_are_shown_all_the_same(tmp_path):
    (tmp_path / "p").mkdir()
    for name in (b"\xc3\xa9.png", b"\xff.png"):
        (tmp_path / "p" / os.fsdecode(name)).write_bytes(b"hello")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "DDPM_JAX_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "prepare_data.py", str(tmp_path / "p"), "--check"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    shown = [line.split(":")[0] for line in done.stdout.splitlines()]
    assert shown[:2] == [r"\xe9.png", r"\udcff.png"]
    assert "Traceback" not in done.stderr


def test_only_the_names_of_pictures_are_in_the_list(prepare_data, tmp_path):
    prepare_data(make_folder(tmp_path / "p", content=BAD), "--check")
    (file,) = (tmp_path / "cache" / "bad").iterdir()
    assert set(json.loads(file.read_text())) < set(NAMES)
