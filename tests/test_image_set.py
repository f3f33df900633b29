"""Sets of generated images: whole, never mixed, and the same whatever they were interrupted by."""

import dataclasses
import json
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
from etils import epath
from interop import run_script
from PIL import Image
from tiny import tiny

from ddpm_jax import sharding, training
from ddpm_jax.animation import write_animation
from ddpm_jax.checkpoint import Checkpoints
from ddpm_jax.errors import UsageError
from ddpm_jax.generate import SamplerOptions
from ddpm_jax.image_set import ImageSet, generate_set, read_images
from ddpm_jax.workdir import enter, load_run

ROOT = Path(__file__).parent.parent
FEW = SamplerOptions(sampler="ddim", steps=(3,))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the tiny network at step 0, its zero layers drawn."""
    path = epath.Path(tmp_path_factory.mktemp("run") / "w")
    config = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)})
    state = jax.jit(lambda: training.init_state(config, jax.random.key(0)))()
    leaves, structure = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    ema = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    state = dataclasses.replace(state, ema_params=jax.tree.unflatten(structure, ema))
    enter(path, config)
    checkpoints = Checkpoints(path / "checkpoints")
    checkpoints.save(state, {"data": {}, "since_log": {}})
    checkpoints.close()
    return path


@pytest.fixture(scope="module")
def run(workdir):
    return load_run(workdir, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def generate(run, out, indices=range(10), **options):
    given = {"seed": 3, "options": FEW, "weights": "ema", "batch_size": 4, "format": "both"} | options
    generate_set(run, epath.Path(out), indices, **given)


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    generate(run, folder)
    return folder


def test_single_pngs_one_npz_and_a_grid_are_written(whole):
    names = {p.name for p in whole.iterdir()}
    assert names == {f"{i:06d}.png" for i in range(10)} | {"images.npz", "grid.png", "set.json"}
    images = read_images(epath.Path(whole / "images.npz"))
    assert (images.dtype, images.shape) == (np.uint8, (10, 8, 8, 1))
    assert len(np.unique(images.reshape(10, -1), axis=0)) == 10
    for i in range(10):
        np.testing.assert_array_equal(np.asarray(Image.open(whole / f"{i:06d}.png")), images[i, ..., 0])


@pytest.mark.parametrize(
    ("format", "names"),
    [
        ("png", {f"{i:06d}.png" for i in range(10)}),
        ("npz", {"images.npz"}),
        ("shards", {"parts"}),
    ],
)
def test_each_format_holds_the_same_images(format, names, run, whole, tmp_path):
    generate(run, tmp_path / "out", format=format)
    assert {p.name for p in (tmp_path / "out").iterdir()} == names | {"grid.png", "set.json"}
    images = read_images(epath.Path(whole / "images.npz"))
    if format == "png":
        assert all((tmp_path / "out" / n).read_bytes() == (whole / n).read_bytes() for n in names)
    elif format == "npz":
        np.testing.assert_array_equal(read_images(epath.Path(tmp_path / "out" / "images.npz")), images)
    else:
        parts = sorted((tmp_path / "out" / "parts").iterdir())
        assert [p.name for p in parts] == ["000000.npz", "000004.npz", "000008.npz"]
        np.testing.assert_array_equal(np.concatenate([read_images(epath.Path(p)) for p in parts]), images)


def test_a_piece_of_a_set_holds_the_same_images(run, whole, tmp_path):
    """--first-image: noise and so images belong to the index."""
    generate(run, tmp_path / "out", range(4, 10))
    piece = read_images(epath.Path(tmp_path / "out" / "images.npz")).astype(int)
    assert np.abs(piece - read_images(epath.Path(whole / "images.npz"))[4:]).max() <= 1
    assert (tmp_path / "out" / "000009.png").exists()
    assert not (tmp_path / "out" / "000003.png").exists()


@pytest.mark.parametrize("batches", [0, 1, 2, 3])
def test_a_set_broken_off_after_any_batch_continues(batches, run, whole, tmp_path, monkeypatch):
    add, count = ImageSet.add, iter(range(10))

    def break_off(self, part, images):
        if next(count) == batches:
            self.wait()
            (self.folder / f"{part.start:06d}.png").write_bytes(b"\x89PNG, cut short")
            raise KeyboardInterrupt
        add(self, part, images)

    monkeypatch.setattr(ImageSet, "add", break_off)
    if batches < 3:
        with pytest.raises(KeyboardInterrupt):
            generate(run, tmp_path / "out")
    else:  # after the last one, before the parts are joined
        monkeypatch.setattr(ImageSet, "finish", ImageSet.wait)
        generate(run, tmp_path / "out")
    monkeypatch.undo()
    written = []
    monkeypatch.setattr(ImageSet, "add", lambda self, part, images: (written.append(part), add(self, part, images)))
    generate(run, tmp_path / "out")
    assert len(written) == 3 - batches  # nothing is made twice
    assert content(tmp_path / "out") == content(whole)


def test_a_set_killed_before_its_first_batch_continues(tmp_path, monkeypatch):
    """At any of the steps that its folder is begun in."""

    def begin():
        images = ImageSet(epath.Path(tmp_path / "out"), range(1), {}, format="npz")
        images.add(range(1), np.zeros((1, 8, 8, 1), np.uint8))
        images.finish()

    def kill(*_, **__):
        raise KeyboardInterrupt

    for name in ("write_text", "whole"):
        monkeypatch.setattr(f"ddpm_jax.image_set.{name}", kill)
        with pytest.raises(KeyboardInterrupt):
            begin()
        monkeypatch.undo()
    shutil.rmtree(tmp_path / "out" / "parts")
    begin()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"images.npz", "grid.png", "set.json"}


def test_a_complete_set_is_left_alone(run, whole):
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir()}
    generate(run, whole)
    assert {p: p.stat().st_mtime_ns for p in whole.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, r"seed \(there 3, here 4\)"),
        ({"options": SamplerOptions(sampler="ddim", steps=(4,))}, r"steps \(there \[3\], here \(4,\)\)"),
        ({"batch_size": 5}, "batch_size"),
        ({"weights": "raw"}, "weights"),
        ({"format": "png"}, "format"),
        ({"indices": range(11)}, r"images \(there \[0, 10\], here \[0, 11\]\)"),
    ],
)
def test_another_set_in_the_folder_is_refused(change, field, run, whole):
    before = content(whole)
    with pytest.raises(UsageError, match=f"holds another set of images, which differs in {field}"):
        generate(run, whole, **change)
    assert content(whole) == before


def test_a_set_is_not_continued_on_devices_that_make_other_parts(run, tmp_path, monkeypatch):
    """Eight devices round batches of 4 up to 8; what one device would add to them overlaps."""

    def first_alone(generator, params, key, ranges, **_):
        yield ranges[0], np.zeros((len(ranges[0]), 8, 8, 1), np.uint8)

    monkeypatch.setattr("ddpm_jax.image_set.generate_batches", first_alone)
    monkeypatch.setattr(ImageSet, "finish", ImageSet.wait)
    generate(dataclasses.replace(run, mesh=sharding.make_mesh()), tmp_path / "out")
    before = content(tmp_path / "out")
    assert "parts/000000.npz" in before
    with pytest.raises(UsageError, match=r"differs in batch_size \(there 8, here 4\)"):
        generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_set_without_all_of_its_images_is_not_complete(tmp_path):
    images = ImageSet(epath.Path(tmp_path / "out"), range(10), {}, format="npz")
    images.add(range(8), np.zeros((8, 8, 8, 1), np.uint8))
    with pytest.raises(UsageError, match="has 8 images of 10; give another --out"):
        images.finish()
    assert not json.loads((tmp_path / "out" / "set.json").read_text())["complete"]
    assert not (tmp_path / "out" / "images.npz").exists()


def test_a_folder_with_other_files_is_refused(run, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match=r"has files but no set\.json"):
        generate(run, tmp_path)
    assert content(tmp_path) == {"mine.txt": b"keep"}


@pytest.mark.parametrize("there", [b"", b'{"set": {"seed"', b"\xff", b"[]", b"{}", b'{"set": [1], "complete": true}'])
def test_a_folder_with_a_damaged_or_foreign_set_json_is_refused(there, tmp_path):
    (tmp_path / "set.json").write_bytes(there)
    with pytest.raises(UsageError, match=r"set\.json is damaged or no set of images \(.*\); give another --out$"):
        ImageSet(epath.Path(tmp_path), range(1), {}, format="npz")
    assert content(tmp_path) == {"set.json": there}


def test_options_that_do_not_go_together_are_told(run, tmp_path):
    with pytest.raises(UsageError, match="which has none; leave it out or use ddim"):
        generate(run, tmp_path / "out", options=SamplerOptions(eta=0.5))
    assert not (tmp_path / "out").exists()


def test_steps_without_a_value_are_refused(workdir, tmp_path):
    """They are not all T steps, which leaving the option out asks for."""
    with pytest.raises(UsageError, match="--steps has no value; give one, or leave it out for all steps"):
        run_script("sample", workdir, "--steps", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_is_told(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddpm_jax.image_set.png_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        generate(run, tmp_path / "out")


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_the_animation_ends_with_the_images(ending, run, whole, tmp_path):
    path = epath.Path(tmp_path / f"process.{ending}")
    write_animation(run, path, range(10), seed=3, options=FEW, batch_size=64)
    with Image.open(path) as film:
        assert film.n_frames == 3
        film.seek(2)
        last = np.asarray(film.convert("L"), int)
    with Image.open(whole / "grid.png") as picture:
        assert np.abs(last - np.asarray(picture, int)).max() <= 1


def test_the_animation_takes_no_more_images_than_a_batch_and_is_made_once(run, tmp_path, monkeypatch):
    """Whole or not at all: a write that fails leaves nothing, and the file that is there stays."""
    made, path = [], epath.Path(tmp_path / "process.gif")

    def generator(params, key, places):
        made.append(places.tolist())
        return None, np.zeros((3, len(places), 8, 8, 1), np.uint8)

    def fail(self, content):
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddpm_jax.animation.make_generator", lambda *_, **__: generator)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_bytes", fail)
        with pytest.raises(OSError, match="No space left"):
            write_animation(run, path, range(5, 15), seed=3, options=FEW, batch_size=4)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):
        write_animation(run, path, range(5, 15), seed=3, options=FEW, batch_size=4)
    assert made == [[5, 6, 7, 8]] * 2
    with Image.open(path) as film:
        assert film.n_frames >= 1


def test_sample_writes_a_set_and_its_animation(workdir, tmp_path):
    options = ("--num-images", 2, "--sampler", "ddim", "--steps", 3, "--animation", "gif", "--out", tmp_path / "out")
    run_script("sample", workdir, *options)
    names = {"000000.png", "000001.png", "images.npz", "grid.png", "set.json", "process.gif"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    with Image.open(tmp_path / "out" / "process.gif") as film:
        assert film.n_frames == 3


@pytest.mark.slow
def test_two_thousand_digits_killed_three_times_equal_an_uninterrupted_set(workdir, tmp_path):
    """SIGKILL at random moments; exactly N images, bit for bit those of a run that nobody stopped."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    moments = random.Random(seed)

    def start(out):
        options = ("--num-images", "2000", "--batch-size", "96", "--sampler", "ddim", "--steps", "5")
        command = [sys.executable, "sample.py", str(workdir), *options, "--out", str(out)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(whole)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    for after in (1, 5, 12):
        process, reached = start(killed), after + moments.randrange(4)
        while len(list(killed.glob("parts/*.npz"))) < reached and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not json.loads((killed / "set.json").read_text())["complete"]
    process = start(killed)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert content(killed) == content(whole)
    assert len(list(killed.glob("*.png"))) == 2001  # and the grid
    assert len(read_images(epath.Path(killed / "images.npz"))) == 2000
