"""Sets of generated images: whole, never mixed, and the same whatever they were interrupted by."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from etils import epath
from interop import run_script
from PIL import Image
from tiny import experiment, read_images, tiny

from ddpm_jax.commands import arguments, sample
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import sole_writer
from ddpm_jax.generation.animation import write_animation
from ddpm_jax.generation.generator import Batches, SamplerOptions, generate_batches
from ddpm_jax.generation.image_set import ImageSet, generate_set
from ddpm_jax.training import step as training
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.workdir import enter, load_run

ROOT = Path(__file__).parent.parent
FEW = SamplerOptions(sampler="ddim", steps=(3,))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of the tiny network at step 0, its zero layers drawn."""
    path = epath.Path(tmp_path_factory.mktemp("run") / "w")
    config = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)})
    state = jax.jit(lambda: training.init_state(experiment(config), jax.random.key(0)))()
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
    given = {"seed": 3, "options": FEW, "batch_size": 4, "format": "both"} | options
    run = dataclasses.replace(run, weights=given.pop("weights", run.weights))
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
    images = read_images(whole / "images.npz")
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
    images = read_images(whole / "images.npz")
    if format == "png":
        assert all((tmp_path / "out" / n).read_bytes() == (whole / n).read_bytes() for n in names)
    elif format == "npz":
        np.testing.assert_array_equal(read_images(tmp_path / "out" / "images.npz"), images)
    else:
        parts = sorted((tmp_path / "out" / "parts").iterdir())
        assert [p.name for p in parts] == ["000000.npz", "000004.npz", "000008.npz"]
        np.testing.assert_array_equal(np.concatenate([read_images(p) for p in parts]), images)


def test_a_piece_of_a_set_holds_the_same_images(run, whole, tmp_path):
    """--first-image: noise and so images belong to the index."""
    generate(run, tmp_path / "out", range(4, 10))
    piece = read_images(tmp_path / "out" / "images.npz").astype(int)
    assert np.abs(piece - read_images(whole / "images.npz")[4:]).max() <= 1
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


def open_set(folder, count=1, size=1, **definition):
    """A set of npz of so many images of zeros, in batches of a size."""
    return ImageSet(epath.Path(folder), Batches(range(count), size), (8, 8, 1), definition, format="npz")


def test_a_set_killed_before_its_first_batch_continues(tmp_path, monkeypatch):
    """At any of the steps that its folder is begun in."""

    def begin():
        with contextlib.closing(open_set(tmp_path / "out")) as images:
            images.add(range(1), np.zeros((1, 8, 8, 1), np.uint8))
            images.finish()

    def kill(*_, **__):
        raise KeyboardInterrupt

    for name in ("generation.set_mark.write_text", "data.arrays.whole", "generation.image_set.whole"):
        monkeypatch.setattr(f"ddpm_jax.{name}", kill)
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
        ({"options": SamplerOptions(sampler="ddim", steps=(4,))}, r"steps \(there \[3\], here \[4\]\)"),
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
        first = next(iter(ranges))
        yield first, np.zeros((len(first), 8, 8, 1), np.uint8)

    monkeypatch.setattr("ddpm_jax.generation.image_set.generate_batches", first_alone)
    monkeypatch.setattr(ImageSet, "finish", ImageSet.wait)
    generate(dataclasses.replace(run, mesh=sharding.make_mesh()), tmp_path / "out")
    before = content(tmp_path / "out")
    assert "parts/000000.npz" in before
    with pytest.raises(UsageError, match=r"differs in batch_size \(there 8, here 4\)"):
        generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == before


def test_a_set_without_all_of_its_images_is_not_complete(tmp_path):
    with contextlib.closing(open_set(tmp_path / "out", 10, 8)) as images:
        images.add(range(8), np.zeros((8, 8, 8, 1), np.uint8))
        with pytest.raises(UsageError, match=r"000008\.npz is damaged \(it is missing\); run the same command again"):
            images.finish()
    assert not json.loads((tmp_path / "out" / "set.json").read_text())["complete"]
    assert not (tmp_path / "out" / "images.npz").exists()


def test_a_folder_with_other_files_is_refused(run, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match=r"has files but no set\.json"):
        generate(run, tmp_path)
    assert content(tmp_path) == {"mine.txt": b"keep"}


@pytest.mark.parametrize(
    "there",
    [
        b"",
        b'{"set": {"seed"',
        b"\xff",
        b"[]",
        b"{}",
        b'{"set": [1], "complete": true}',
        b'{"set": {}, "complete": 1}',
        b'{"set": {}, "complete": true, "files": [1]}',
        b'{"set": {}, "complete": true, "files": {}, "batches": 3}',
        b"[" * 100_000,
        bytes(4096),
    ],
    ids=lambda there: repr(there[:60]),
)
def test_a_folder_with_a_damaged_or_foreign_set_json_is_refused(there, tmp_path):
    (tmp_path / "set.json").write_bytes(there)
    with pytest.raises(UsageError, match=r"set\.json is damaged \(.*\); give another --out$"):
        open_set(tmp_path)
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

    monkeypatch.setattr("ddpm_jax.generation.image_set.png_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        generate(run, tmp_path / "out")


@pytest.mark.parametrize("ending", ["gif", "webp"])
def test_the_animation_ends_with_the_images(ending, run, whole, tmp_path):
    shutil.copy(whole / "set.json", tmp_path)
    path = epath.Path(tmp_path / f"process.{ending}")
    write_animation(run, path, range(10), seed=3, options=FEW, batch_size=64)
    with Image.open(path) as film:
        assert film.n_frames == 3
        film.seek(2)
        last = np.asarray(film.convert("L"), int)
    with Image.open(whole / "grid.png") as picture:
        assert np.abs(last - np.asarray(picture, int)).max() <= 1


def test_the_animation_takes_no_more_images_than_a_batch_and_is_made_once(run, tmp_path, monkeypatch, capsys):
    """Whole or not at all: a write that fails leaves nothing, and the file that is there stays."""
    made, path = [], epath.Path(tmp_path / "process.gif")
    open_set(tmp_path).close()
    there = content(tmp_path)

    def generator(params, key, places):
        made.append(places.tolist())
        return None, np.zeros((3, len(places), 8, 8, 1), np.uint8)

    def fail(self, content):
        self.open("wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddpm_jax.generation.animation.make_generator", lambda *_, **__: generator)
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_bytes", fail)
        with pytest.raises(OSError, match="No space left"):
            write_animation(run, path, range(5, 15), seed=3, options=FEW, batch_size=4)
    assert content(tmp_path) == there
    for _ in range(2):
        write_animation(run, path, range(5, 15), seed=3, options=FEW, batch_size=4)
    assert made == [[5, 6, 7, 8]] * 2
    path.write_bytes(path.read_bytes()[:-100])
    write_animation(run, path, range(5, 15), seed=3, options=FEW, batch_size=4)
    assert made == [[5, 6, 7, 8]] * 3
    assert f"{path} is damaged" in capsys.readouterr().out
    with Image.open(path) as film:
        assert film.n_frames >= 1


def test_sample_writes_a_set_and_its_animation(workdir, tmp_path):
    options = ("--num-images", 2, "--sampler", "ddim", "--steps", 3, "--animation", "gif", "--out", tmp_path / "out")
    run_script("sample", workdir, *options)
    names = {"000000.png", "000001.png", "images.npz", "grid.png", "set.json", "process.gif"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    with Image.open(tmp_path / "out" / "process.gif") as film:
        assert film.n_frames == 3


# ---- Damage


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 4]) + content[-8:]


DAMAGES = {
    "flipped": flipped,
    "its middle flipped": lambda b: b[: len(b) // 2] + bytes([b[len(b) // 2] ^ 1]) + b[len(b) // 2 + 1 :],
    "its start flipped": lambda b: bytes([b[0] ^ 1]) + b[1:],
    "cut": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "zeros": lambda b: bytes(len(b)),
    "deleted": None,
}


def damage(path, how):
    if how is None:
        path.unlink()
    else:
        path.write_bytes(how(path.read_bytes()))


@pytest.fixture
def sampled(monkeypatch):
    """The batches that are sampled."""
    batches = []

    def counted(generator, params, key, ranges, **options):
        ranges = list(ranges)
        batches.extend(ranges)
        return generate_batches(generator, params, key, ranges, **options)

    monkeypatch.setattr("ddpm_jax.generation.image_set.generate_batches", counted)
    return batches


@pytest.mark.parametrize("name", ["000005.png", "images.npz", "grid.png"])
@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_of_a_complete_set_is_named_and_made_again(name, how, run, whole, tmp_path, sampled, capsys):
    """From the same images elsewhere in the set: nothing is sampled."""
    shutil.copytree(whole, tmp_path / "out")
    damage(tmp_path / "out" / name, how)
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)
    assert sampled == []
    said = capsys.readouterr().out
    assert said.count("is damaged") == 1
    assert f"{tmp_path}/out/{name} is damaged (" in said


@pytest.mark.parametrize(
    ("format", "name", "batches"),
    [
        ("png", "000005.png", [range(4, 8)]),
        ("shards", "parts/000004.npz", [range(4, 8)]),
        ("npz", "images.npz", [range(4, 8)]),
    ],
)
@pytest.mark.parametrize("how", ["its middle flipped", "cut", "deleted"])
def test_what_a_damage_concerns_alone_is_sampled_again(how, format, name, batches, run, tmp_path, sampled):
    generate(run, tmp_path / "out", format=format)
    before = content(tmp_path / "out")
    sampled.clear()
    damage(tmp_path / "out" / name, DAMAGES[how])
    generate(run, tmp_path / "out", format=format)
    assert content(tmp_path / "out") == before
    if format == "npz" and how != "its middle flipped":
        batches = {"cut": [range(4, 8), range(8, 10)], "deleted": [range(4), range(4, 8), range(8, 10)]}[how]
    assert sampled == batches


def test_pngs_in_each_others_place_are_told(run, whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "out")
    for a, b in ((1, 2), (2, 1)):
        shutil.copy(whole / f"{a:06d}.png", tmp_path / "out" / f"{b:06d}.png")
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)
    assert capsys.readouterr().out.count("is damaged") == 2


@pytest.fixture(scope="module")
def half(run, tmp_path_factory):
    """A set whose batches are there and not joined yet."""
    folder = tmp_path_factory.mktemp("half") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSet, "finish", ImageSet.wait)
        generate(run, folder)
    return folder


@pytest.mark.parametrize("how", [*DAMAGES, "another part", "another set's"])
def test_a_damaged_part_of_a_half_made_set_is_named_and_sampled_again(
    how, run, whole, half, tmp_path, sampled, capsys, monkeypatch
):
    shutil.copytree(half, tmp_path / "out")
    path = tmp_path / "out" / "parts" / "000004.npz"
    if how == "another part":
        shutil.copy(half / "parts" / "000000.npz", path)
    elif how == "another set's":
        with monkeypatch.context() as patch:
            patch.setattr(ImageSet, "finish", ImageSet.wait)
            generate(run, tmp_path / "other", seed=4)
        shutil.copy(tmp_path / "other" / "parts" / "000004.npz", path)
        sampled.clear()
    else:
        damage(path, DAMAGES[how])
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)
    assert sampled == [range(4, 8)]
    assert (f"{path} is damaged (" in capsys.readouterr().out) == (how != "deleted")


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_png_of_a_half_made_set_is_named_and_written_again(how, run, whole, half, tmp_path, sampled, capsys):
    shutil.copytree(half, tmp_path / "out")
    damage(tmp_path / "out" / "000005.png", how)
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)
    assert sampled == []
    assert f"{tmp_path}/out/000005.png is damaged (" in capsys.readouterr().out


def test_a_set_killed_while_it_is_recovered_is_recovered(run, whole, tmp_path, monkeypatch, sampled):
    shutil.copytree(whole, tmp_path / "out")
    damage(tmp_path / "out" / "images.npz", DAMAGES["cut"])
    with monkeypatch.context() as patch:
        patch.setattr("ddpm_jax.generation.set_mark.write_text", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            generate(run, tmp_path / "out")
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)
    assert sampled == []


@pytest.mark.parametrize(
    ("there", "then"), [(b"files", b"filet"), (b'"000000.png"', b'"000010.png"'), (b'"seed": 3', b'"seed": 7')]
)
def test_a_set_json_that_is_changed_is_told(there, then, run, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "out")
    path = tmp_path / "out" / "set.json"
    path.write_bytes(path.read_bytes().replace(there, then, 1))
    with pytest.raises(UsageError, match=r"set\.json is damaged \(it is not what was written\); give another --out"):
        generate(run, tmp_path / "out")


def test_a_set_of_an_earlier_version_is_taken_and_told_to_be_unproven(run, whole, tmp_path, capsys):
    """Its set.json lists no digests; what is missing of it is made again."""
    shutil.copytree(whole, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "set.json").read_text())
    (tmp_path / "out" / "set.json").write_text(json.dumps({name: values[name] for name in ("set", "complete")}))
    before = content(tmp_path / "out")
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == before
    assert capsys.readouterr().out.count("cannot be verified") == 1
    (tmp_path / "out" / "000003.png").unlink()
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_a_part_of_no_batch_is_refused(run, half, tmp_path):
    shutil.copytree(half, tmp_path / "out")
    shutil.copy(half / "parts" / "000004.npz", tmp_path / "out" / "parts" / "000005.npz")
    with pytest.raises(
        UsageError, match=r"000005\.npz belongs to no batch of this set; move it away, or give another --out"
    ):
        generate(run, tmp_path / "out")


# ---- One process, and room


def test_a_folder_that_another_process_writes_is_refused(run, half, tmp_path):
    shutil.copytree(half, tmp_path / "out")
    with sole_writer(epath.Path(tmp_path / "out")):
        with pytest.raises(UsageError, match=rf"out is being written by process {os.getpid()} on "):
            generate(run, tmp_path / "out")
        with pytest.raises(UsageError, match="is being written by"):
            write_animation(run, epath.Path(tmp_path / "out/process.gif"), range(1), seed=3, options=FEW, batch_size=1)
    generate(run, tmp_path / "out")
    assert not (tmp_path / "out" / "lock").exists()


def test_what_a_killed_process_left_is_swept(run, whole, half, tmp_path):
    shutil.copytree(half, tmp_path / "out")
    for name in ("images.npz.77.tmp", "set.json.77.tmp", "process.gif.77.tmp", "parts/000004.npz.77.tmp"):
        (tmp_path / "out" / name).write_bytes(b"half")
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.parametrize("place", ["file/out", "n" * 300, "/proc/out", "/proc/self/out"])
def test_a_place_that_cannot_be_written_is_refused(place, run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("ddpm_jax.generation.image_set.generate_batches", None)  # nothing is computed
    with pytest.raises(UsageError, match=r"cannot be written \(.*\); give another --out") as refusal:
        generate(run, tmp_path / place)
    assert str(tmp_path / place) in str(refusal.value)
    assert content(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_disk_that_refuses_a_batch_leaves_what_was_made(number, run, whole, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("ddpm_jax.generation.image_set.write_arrays", refuse)
        with pytest.raises(OSError, match=os.strerror(number)):
            generate(run, tmp_path / "out")
    assert not any(name.endswith(("tmp", "npz", "lock")) for name in content(tmp_path / "out"))
    generate(run, tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


@pytest.mark.parametrize(("format", "copies"), [("shards", 1), ("npz", 2), ("png", 1.5), ("both", 2.5)])
def test_a_set_for_which_the_disk_has_no_room_is_refused_with_the_bytes(format, copies, run, tmp_path, monkeypatch):
    """At once, however many batches there are, and with what the format takes."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(UsageError) as refusal:
        generate(run, tmp_path / "out", range(2 * 10**9), format=format)
    needed = f"{2e9 * 64 * copies / 2**30:,.1f} GiB"
    assert f"a set of 2,000,000,000 images, --format {format}, needs {needed} on the disk, and 1.0 GiB" in str(
        refusal.value
    )
    assert "--num-images" in str(refusal.value)


def test_a_batch_that_cannot_fit_is_refused_with_the_bytes(run, tmp_path):
    with pytest.raises(
        UsageError, match=r"--batch-size 1000000000 needs at least [\d,.]+ GiB of memory, and .* GiB are"
    ):
        generate(run, tmp_path / "out", range(10**9), batch_size=10**9)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ((), "step_0_ema_ancestral_seed_0"),
        (("--sampler", "ddim", "--steps", "10"), "step_0_ema_ddim_steps_10_seed_0"),
        (("--sampler", "ddim", "--steps", "50", "--eta", "0.2"), "step_0_ema_ddim_steps_50_eta_0.2_seed_0"),
        (("--steps", "3", "4", "--clip", "none"), "step_0_ema_ancestral_steps_3-4_clip_none_seed_0"),
        (("--spacing", "logsnr", "--steps", "9"), "step_0_ema_ancestral_steps_9_spacing_logsnr_seed_0"),
        (("--first-image", "64", "--seed", "2", "--weights", "raw"), "step_0_raw_ancestral_seed_2_from_64"),
    ],
)
def test_a_sets_default_folder_is_named_by_all_that_defines_its_images(options, name):
    parsed = arguments.sample(["run", *options])
    assert sample.default_name(0, parsed) == name


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
    assert len(read_images(killed / "images.npz")) == 2000
