"""Folders and zip files of pictures: their order, labels and identity, the cache of decoded images, and bad pictures."""

import errno
import json
import os
import re
import shutil
import socket
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_data import fed, mesh_of
from test_pictures import COLOURS, RNG, encoded
from tiny import tiny

from ddpm_jax.config import DataConfig
from ddpm_jax.core import files
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import batch_indices, batches, cache, open_source, pictures, sources
from ddpm_jax.generation.image_set import SET
from ddpm_jax.training.workdir import CHECKPOINTS, CONFIG

NAMES = ["b/2.png", "b/10.png", "a/x.PNG", "B/y.webp", "a/sub/z.bmp", "é.jpeg", "a.jpg"]
SORTED = ["B/y.webp", "a.jpg", "a/sub/z.bmp", "a/x.PNG", "b/10.png", "b/2.png", "é.jpeg"]
PIXELS = {name: RNG.integers(0, 256, (8, 8, 3), np.uint8) for name in NAMES}
FORMS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
CONTENT = {name: encoded(PIXELS[name], FORMS[Path(name).suffix.lower()]) for name in NAMES}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_folder(path, names=NAMES, content=CONTENT):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content[name])
    return path


def make_zip(path, names=NAMES, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, content[name])
    return path


def opened(path, **changes):
    return open_source(DataConfig(**({"source": str(path), "image_size": 8, "channels": 3} | changes)))


def everything(source):
    return source.read(np.arange(len(source)))


@pytest.fixture(params=["folder", "zip"])
def make(request, tmp_path):
    """Makes a folder or a zip file of pictures."""
    if request.param == "folder":
        return lambda name="pictures", **options: make_folder(tmp_path / name, **options)
    return lambda name="pictures", **options: make_zip(tmp_path / f"{name}.zip", **options)


def to_decode(path):
    return sources.decoded(sources.open_pictures(str(path)), DataConfig(source=str(path), image_size=8))


def list_bad(path):
    """Writes the list of the bad pictures of a source, as prepare_data.py --check does; returns it."""
    bad = cache.find_bad(to_decode(path))
    cache.write_bad(to_decode(path), bad)
    return bad


def refuses(message):
    return pytest.raises(UsageError, match=f"^{re.escape(message)}$")


# ---- Order, labels, identity


@pytest.mark.parametrize("data_cache", ["auto", "device", "host", "none"])
def test_pictures_are_sorted_by_their_relative_names(data_cache, make):
    images = everything(opened(make(), cache=data_cache))
    expected = np.stack([pictures.decode(CONTENT[name], (8, 8), 3) for name in SORTED])
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(images[5], PIXELS["b/2.png"])


def test_order_does_not_depend_on_the_file_system(make):
    one, other = opened(make("one")), opened(make("other", names=NAMES[::-1]))
    np.testing.assert_array_equal(everything(one), everything(other))
    assert one.identity == other.identity


def test_labels_are_the_sorted_sub_folders(make):
    # "", B, a, a/sub, b; the names in order: B/y a.jpg a/sub/z a/x b/10 b/2 é
    assert opened(make()).labels.tolist() == [1, 0, 3, 2, 4, 4, 0]
    flat = {name.replace("/", "_"): content for name, content in CONTENT.items()}
    assert opened(make("flat", names=list(flat), content=flat)).labels is None


def test_identity_is_of_names_and_contents_not_of_times(make):
    path = make("one")
    identity = opened(path).identity
    assert identity["images"] == 7
    os.utime(path, (1, 1))
    for file in path.rglob("*.*") if path.is_dir() else []:
        os.utime(file, (1, 1))
    assert opened(path).identity == identity
    fewer = opened(make("fewer", names=NAMES[1:])).identity
    renamed = {("c/2.png" if name == "b/2.png" else name): content for name, content in CONTENT.items()}
    renamed = opened(make("renamed", names=list(renamed), content=renamed)).identity
    longer = CONTENT | {"b/2.png": CONTENT["b/2.png"] + b"\0"}
    longer = opened(make("longer", content=longer)).identity
    assert len({json.dumps(i) for i in (identity, fewer, renamed, longer)}) == 4


def test_identity_of_a_zip_has_its_checksums(tmp_path):
    other = CONTENT | {"b/2.png": CONTENT["b/2.png"][:-1] + b"\0"}  # as long as before
    one, two = make_zip(tmp_path / "1.zip"), make_zip(tmp_path / "2.zip", content=other)
    assert opened(one).identity != opened(two, cache="none").identity


def test_hidden_files_are_left_out_and_others_with_a_note(make, capsys):
    more = {".hidden.png": b"", ".git/a.png": b"", "__MACOSX/a/._x.png": b"", "notes": b"hello", "b/list.csv": b""}
    more |= {"1.gif": b"", "b/2.GIF": b""}
    path = make(names=[*NAMES, *more], content=CONTENT | more)
    assert [len(opened(path)), len(opened(path))] == [7, 7]  # as train.py does that chooses a config by the pictures
    written = capsys.readouterr()
    note = f"Note: 4 of the files in {path} do not end like a picture and are left out: 2 .gif, 1 .csv, 1 without an ending.\n"
    assert (written.out + written.err).count(note) == 1


def test_mixed_sizes_and_kinds_are_fine(make):
    content = {
        "large.png": encoded(np.full((90, 50, 3), 10, np.uint8)),
        "small.png": encoded(np.full((3, 4), 20, np.uint8)),
        "clear.png": encoded(np.full((8, 8, 4), 0, np.uint8)),
    }
    images = everything(opened(make(names=list(content), content=content)))
    assert [image.reshape(-1, 3).max(0).tolist() for image in images] == [[255] * 3, [10] * 3, [20] * 3]
    assert everything(opened(make(names=list(content), content=content), channels=1)).shape == (3, 8, 8, 1)


# ---- Batches


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("data_cache", ["device", "host", "none"])
def test_batches_are_bit_identical_for_any_cache_and_number_of_workers(data_cache, workers, make):
    config = tiny(
        data={"source": str(make()), "channels": 3, "cache": data_cache, "workers": workers}, train={"batch_size": 4}
    )
    source = open_source(config.data)
    expected = np.stack([pictures.decode(CONTENT[name], (8, 8), 3) for name in SORTED])
    expected = expected[batch_indices(config.seed, 0, 9, 4, 7)]
    images = np.concatenate([fed(config, source, mesh_of(2), first, 3)[0] for first in (0, 3, 6)])
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize("data_cache", ["device", "host", "none"])
def test_a_feed_begun_in_the_middle_of_an_epoch_goes_on_the_same(data_cache, make):
    config = tiny(data={"source": str(make()), "channels": 3, "cache": data_cache}, train={"batch_size": 2})
    source = open_source(config.data)
    feed = batches.make_feed(config, source, mesh_of(2))

    def images(feed, step):
        batch, dataset = feed(step, 1)
        return np.asarray(batch) if dataset is None else np.asarray(dataset)[np.asarray(batch)]

    whole = [images(feed, step) for step in range(8)]
    again = batches.make_feed(config, open_source(config.data), mesh_of(2))
    for step in range(5, 8):  # the second epoch begins within step 3
        np.testing.assert_array_equal(images(again, step), whole[step])


# ---- The cache


def cached(folder):
    return sorted((folder / "decoded").glob("*.npy"))


def test_pictures_are_decoded_once(make, cache_folder, monkeypatch):
    path = make()
    images = everything(opened(path))
    (file,) = cached(cache_folder)
    assert isinstance(opened(path).images, np.memmap)
    monkeypatch.setattr(pictures, "decode", None)  # from here on nothing can be decoded
    np.testing.assert_array_equal(everything(opened(path)), images)
    with pytest.raises(UsageError, match="cannot be decoded"):
        opened(path, image_size=4)
    assert cached(cache_folder) == [file]


def test_other_sizes_channels_and_contents_have_other_caches(make, cache_folder):
    path = make()
    for number, changes in enumerate([{}, {"image_size": 4}, {"channels": 1}], 1):
        assert everything(opened(path, **changes)).shape[0] == 7
        assert len(cached(cache_folder)) == number


def test_a_picture_changed_in_place_is_decoded_again(tmp_path):
    path = make_folder(tmp_path / "pictures")
    opened(path)
    changed = encoded(PIXELS["b/10.png"])[: len(CONTENT["b/2.png"])].ljust(len(CONTENT["b/2.png"]), b"\0")
    (path / "b/2.png").write_bytes(changed)
    os.utime(path / "b/2.png", ns=(1, 1))
    np.testing.assert_array_equal(everything(opened(path))[5], PIXELS["b/10.png"])


def test_a_cache_file_cut_short_is_made_again(make, cache_folder):
    path = make()
    images = everything(opened(path))
    (file,) = cached(cache_folder)
    content = file.read_bytes()
    for left in (0, 5, 100, len(content) - 1):
        file.write_bytes(content[:left])
        np.testing.assert_array_equal(everything(opened(path)), images)
        assert file.read_bytes() == content


def damages(content, other):
    """{what: content} of ways that a cache's array file comes to hold other bytes than were written."""
    flipped, end = bytearray(content), len(content)
    flipped[-1] ^= 1
    return {
        "one bit": bytes(flipped),
        "zeros": content[:-500] + bytes(500),
        "zeros from the start": bytes(end),
        "two pictures changed places": content[:-384] + content[-192:] + content[-384:-192],
        "cut short": content[:-1],
        "empty": b"",
        "longer": content + b"\0",
        "order of Fortran": content.replace(b"'fortran_order': False", b"'fortran_order': True "),
        "other images of the same shape": other,
        "text": b"hello",
    }


WAYS = tuple(damages(bytes(1000), b""))


def noted(capsys):
    written = capsys.readouterr()
    return [line for line in (written.out + written.err).splitlines() if line.startswith("Note: ")]


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_cache_is_told_and_decoded_anew(way, make, cache_folder, capsys):
    path = make()
    images = everything(opened(path))
    (file,) = cached(cache_folder)
    content = file.read_bytes()
    file.write_bytes(damages(content, content[:-1344] + bytes(1344))[way])
    capsys.readouterr()
    config = tiny(data={"source": str(path), "channels": 3}, train={"batch_size": 7})
    fed_images, _, _ = fed(config, open_source(config.data), mesh_of(1), 0, 1)
    (note,) = noted(capsys)
    assert str(file) in note
    assert "damaged" in note
    np.testing.assert_array_equal(fed_images[0], images[batch_indices(config.seed, 0, 1, 7, 7)[0]])
    assert file.read_bytes() == content
    assert everything(opened(path)).tobytes() == images.tobytes()
    assert noted(capsys) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"key": 3, "crc32": "x"}'])
def test_damaged_checksums_of_a_cache_are_told_and_it_is_decoded_anew(content, make, cache_folder, capsys):
    path = make()
    images = everything(opened(path))
    (file,) = (cache_folder / "decoded").glob("*.json")
    before = file.read_bytes()
    file.write_bytes(content)
    capsys.readouterr()
    np.testing.assert_array_equal(everything(opened(path)), images)
    assert [("damaged" in note, "decoded anew" in note) for note in noted(capsys)] == [(True, True)]
    assert file.read_bytes() == before


def test_the_cache_of_other_pictures_is_not_taken_with_its_checksums(tmp_path, cache_folder, capsys):
    one = make_folder(tmp_path / "one")
    images = everything(opened(one))
    (mine,) = cached(cache_folder)
    opened(make_folder(tmp_path / "two", content=CONTENT | {"b/2.png": CONTENT["b/10.png"]}))
    (theirs,) = set(cached(cache_folder)) - {mine}
    for ending in (".npy", ".json"):
        shutil.copy(theirs.with_suffix(ending), mine.with_suffix(ending))
    capsys.readouterr()
    np.testing.assert_array_equal(everything(opened(one)), images)
    assert ["other images" in note for note in noted(capsys)] == [True]


def test_a_cache_without_checksums_is_decoded_anew(make, cache_folder):
    path = make()
    images = everything(opened(path))
    (file,) = cached(cache_folder)
    file.with_suffix(".json").unlink()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    np.testing.assert_array_equal(everything(opened(path)), images)
    assert file.with_suffix(".json").exists()


def test_large_pictures_are_decoded_and_checked_in_blocks_of_few(make, cache_folder, monkeypatch):
    assert cache.BLOCK_BYTES == 2**28
    monkeypatch.setattr(cache, "BLOCK_BYTES", 2 * 8 * 8 * 3)
    path = make()
    images = everything(opened(path))
    (file,) = (cache_folder / "decoded").glob("*.json")
    assert len(json.loads(file.read_text())["crc32"]) == 1 + 4  # the header, and 7 pictures in twos
    monkeypatch.setattr(pictures, "decode", None)
    np.testing.assert_array_equal(everything(opened(path)), images)


def test_a_read_only_cache_is_used_and_one_that_cannot_be_written_is_told(make, monkeypatch):
    path = make()
    images = everything(opened(path))

    def read_only(file, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))

    monkeypatch.setattr(files, "whole", read_only)
    monkeypatch.setattr(files, "sole_writer", read_only)
    np.testing.assert_array_equal(everything(opened(path)), images)
    with pytest.raises(
        UsageError, match=r"cannot be written to .*Read-only file system.*; make room, name another folder"
    ):
        opened(path, image_size=4)
    assert len(opened(path, image_size=4, cache="none")) == 7


def test_a_file_system_without_locks_is_fine(make, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    assert len(opened(make())) == 7


def test_what_a_killed_process_left_of_the_cache_is_removed(make, cache_folder):
    path = make()
    opened(path)
    (file,) = cached(cache_folder)
    left = file.with_name(f"{file.name}.12345.tmp")
    left.write_bytes(b"half")
    file.unlink()
    opened(path)
    assert not left.exists()


def test_a_cache_cut_off_while_it_was_written_is_not_used(make, cache_folder, monkeypatch):
    path = make()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(path)
    assert cached(cache_folder) == []
    monkeypatch.undo()


def test_several_processes_decode_once(make, cache_folder, monkeypatch):
    path, written, write = make(), [], cache._write
    monkeypatch.setattr(cache, "_write", lambda *a: (written.append(a), write(*a)))
    threads = [
        threading.Thread(target=lambda: opened(path)) for _ in range(4)
    ]  # a lock file locks threads as processes
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert len(cached(cache_folder)) == 1


def test_no_room_for_the_cache_is_told_before_anything_is_decoded(make, cache_folder, monkeypatch):
    path = make()
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(pictures, "decode", None)
    with refuses(
        f"a file of 7 decoded images needs 0 MiB on the disk, and 0 MiB are free in {cache_folder / 'decoded'}; make "
        "room, name another folder in the environment variable DDPM_JAX_CACHE, or decode at every step with --data.cache none"
    ):
        opened(path)
    assert len(opened(path, cache="none")) == 7
    assert list((cache_folder / "decoded").glob("*.[nt][pm]*")) == []


def test_a_cache_folder_that_is_none_is_told(make, cache_folder):
    cache_folder.write_text("a file")
    with pytest.raises(
        UsageError, match=r"cannot be written to .*cache.decoded \(.*\); make room, name another folder"
    ):
        opened(make())


def test_auto_keeps_small_sets_on_the_device_larger_ones_in_a_file_and_decodes_the_rest(make, monkeypatch):
    assert (batches.DEVICE_CACHE_BYTES, sources.DECODE_ONCE_BYTES) == (2**30, 2**33)
    path = make()
    config = tiny(data={"source": str(path), "channels": 3})
    size = 7 * 8 * 8 * 3
    for device, file, kept, on_device in [
        (size, size, np.memmap, True),
        (size - 1, size, np.memmap, False),
        (size - 1, size - 1, pictures.DecodedPictures, False),
    ]:
        monkeypatch.setattr(batches, "DEVICE_CACHE_BYTES", device)
        monkeypatch.setattr(sources, "DECODE_ONCE_BYTES", file)
        source = open_source(config.data)
        assert isinstance(source.images, kept)
        assert batches.on_device(config, source) is on_device


# ---- What a folder holds besides


def test_links_in_circles_end_and_every_folder_is_read_once(tmp_path, capsys):
    path = make_folder(tmp_path / "pictures")
    plain = opened(path)
    identity, images = plain.identity, everything(plain)
    (path / "a" / "0 self").symlink_to(path / "a")
    (path / "a" / "sub" / "up").symlink_to("..")
    (path / "above").symlink_to(tmp_path)
    (path / "root").symlink_to("/")
    (path / "B" / "to_b").symlink_to(path / "b")
    (path / "b" / "to_B").symlink_to(path / "B")
    (path / "broken").symlink_to("broken")
    capsys.readouterr()
    source = opened(path)
    assert source.identity == identity
    np.testing.assert_array_equal(everything(source), images)
    (note,) = (note for note in noted(capsys) if "read already" in note)
    assert note.startswith("Note: 6 folders in ")
    assert note.endswith(" e.g. B/to_b/.")


def test_folders_behind_links_are_read(tmp_path):
    make_folder(tmp_path / "elsewhere", names=["b/2.png", "b/10.png"])
    path = make_folder(tmp_path / "pictures", names=["a.jpg"])
    (path / "two").symlink_to(tmp_path / "elsewhere")
    (path / "one").symlink_to(tmp_path / "elsewhere")
    (path / "a.png").symlink_to(tmp_path / "elsewhere" / "b" / "2.png")
    assert list(sources.open_pictures(str(path)).names) == ["a.jpg", "a.png", "one/b/10.png", "one/b/2.png"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_a_link_into_proc_ends(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_folder(tmp_path / "pictures")
    (path / "process").symlink_to("/proc/self")
    start = time.perf_counter()
    assert len(opened(path)) == 7
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_regular_file_is_named_and_never_opened(kind, tmp_path, monkeypatch):
    path = make_folder(tmp_path / "pictures")
    if kind == "pipe":
        os.mkfifo(path / "pipe.png")
    elif kind == "device":
        (path / "device.png").symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(path)  # its address may have a hundred letters
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket.png")
    with pytest.raises(UsageError, match=rf"1 names .* not regular files .*, such as .*{kind}.png; remove them"):
        opened(path)


@pytest.mark.parametrize("make_output", ["workdir", "set", "set being made"])
def test_what_runs_write_into_the_data_folder_is_no_data(make_output, tmp_path, capsys):
    path = make_folder(tmp_path / "pictures")
    identity = opened(path).identity
    out = path / "runs" / "one"
    picture = {"samples/00000100.png": CONTENT["b/2.png"], "grid.png": CONTENT["b/2.png"]}
    make_folder(out, names=list(picture), content=picture)
    if make_output == "workdir":
        (out / CHECKPOINTS).mkdir()
        (out / CONFIG).write_text("{}")
    else:
        (out / SET).write_text("{}")
        (out / "parts").mkdir()
        if make_output == "set being made":
            (out / "grid.png").rename(out / "000000.png")
    capsys.readouterr()
    assert opened(path).identity == identity
    (note,) = noted(capsys)
    assert "runs/one/" in note
    (out / CONFIG).unlink(missing_ok=True)
    (out / SET).unlink(missing_ok=True)
    assert opened(path).identity != identity  # without their marks they are pictures like others


def test_a_set_of_images_that_is_itself_named_is_read(tmp_path):
    path = make_folder(tmp_path / "set", names=["a.jpg"])
    (path / SET).write_text("{}")
    (path / "parts").mkdir()
    (path / "grid.png").write_bytes((path / "a.jpg").read_bytes())
    (path / "process.webp").write_bytes((path / "a.jpg").read_bytes())
    assert len(opened(path)) == 1  # its sheet and its animation are no images


def test_a_workdir_is_no_source_of_images(tmp_path):
    path = make_folder(tmp_path / "run", names=["a.jpg"])
    (path / "checkpoints").mkdir()
    (path / CONFIG).write_text("{}")
    with pytest.raises(UsageError, match=r"is the workdir of a run, .* give a folder of images"):
        opened(path)


def test_folders_that_cannot_be_read_are_noted(tmp_path, monkeypatch, capsys):
    path, scandir = make_folder(tmp_path / "pictures"), os.scandir

    def refuse(folder):
        if str(folder).endswith(closed):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    closed = "b/"
    assert len(opened(path)) == 7
    closed = "/b"
    capsys.readouterr()
    assert len(opened(path)) == 5
    assert ["Permission denied" in note and note.endswith(" b/.") for note in noted(capsys)] == [True]
    closed = "pictures"
    with pytest.raises(UsageError, match="pictures' cannot be read"):
        opened(path)


def test_a_huge_file_with_a_pictures_ending_is_named_unread(tmp_path):
    path = make_folder(tmp_path / "pictures")
    with (path / "huge.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match=r"the picture huge.png cannot be decoded \(its 1,024.0 GiB are more than"):
        opened(path)


def test_a_size_without_room_is_refused_with_its_bytes(make):
    with pytest.raises(UsageError, match=r"1000000 x 1000000 pixels needs at least 6,519.3 GiB of memory, and .* free"):
        opened(make(), image_size=10**6)


def test_batches_without_room_are_refused_with_their_bytes(make):
    path = str(make())
    config = tiny(data={"source": path, "channels": 3, "cache": "host"}, train={"batch_size": 10**10})
    with pytest.raises(UsageError, match=r"10000000000 images each, needs at least .* GiB of memory"):
        batches.make_feed(config, open_source(config.data), mesh_of(1))


# ---- Bad pictures

ADVICE = "with ddpm-jax prepare-data SOURCE --check and leave them out with --data.on-bad-image skip"
CUT = encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
CUT = CUT[: len(CUT) // 2]


@pytest.mark.parametrize("data_cache", ["auto", "device", "host"])
def test_a_truncated_jpeg_is_named_before_training(data_cache, make, cache_folder):
    path = make(content=CONTENT | {"a.jpg": CUT})
    with pytest.raises(UsageError, match=rf"^the picture a.jpg cannot be decoded \(.*truncated.*\); .*{ADVICE}$"):
        opened(path, cache=data_cache)
    assert list((cache_folder / "decoded").iterdir()) == []


def test_a_truncated_jpeg_decoded_on_the_fly_stops_the_run_at_its_step_and_is_named(make):
    path = make(content=CONTENT | {"a.jpg": CUT})
    config = tiny(data={"source": str(path), "channels": 3, "cache": "none"}, train={"batch_size": 1})
    feed = batches.make_feed(config, open_source(config.data), mesh_of(1))
    order = batch_indices(config.seed, 0, 7, 1, 7)[:, 0].tolist()
    for step in range(order.index(SORTED.index("a.jpg"))):
        feed(step, 1)
    with pytest.raises(UsageError, match=r"^the picture a.jpg cannot be decoded \(.*truncated"):
        feed(step + 1, 1)


def test_several_bad_pictures_are_told_together(make):
    bad = {f"bad/{i}.png": b"no picture" for i in range(7)}
    path = make(names=[*NAMES, *bad], content=CONTENT | bad)
    with pytest.raises(
        UsageError, match=r"^7 of 14 pictures cannot be decoded: bad/0.png \(.*bad/4.png \(.*, \.\.\.; mend"
    ):
        opened(path)


def test_a_decompression_bomb_is_named(make):
    header = bytearray(encoded(COLOURS, "BMP"))
    header[18:26] = (30000).to_bytes(4, "little") * 2  # its width and height, while its pixels stay 6 x 6
    path = make(names=["bomb.bmp"], content={"bomb.bmp": bytes(header)})
    with pytest.raises(UsageError, match=r"^the picture bomb.bmp cannot be decoded \(.*900000000 pixels"):
        opened(path)


def test_a_picture_that_is_none_in_a_zip_is_named(tmp_path):
    path = make_zip(
        tmp_path / "x.zip", names=["a.png", "b.png"], content={"a.png": CONTENT["b/2.png"], "b.png": b"hello"}
    )
    with pytest.raises(UsageError, match=r"^the picture b.png cannot be decoded \(cannot identify image file"):
        opened(path)


def test_a_flipped_bit_in_a_zip_is_noticed_by_its_checksum(tmp_path):
    path = make_zip(tmp_path / "x.zip", names=["a/sub/z.bmp"])
    content = bytearray(path.read_bytes())
    content[content.index(CONTENT["a/sub/z.bmp"]) + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"^the picture a/sub/z.bmp cannot be decoded \(Bad CRC-32"):
        opened(path)


def test_skip_leaves_out_what_the_check_listed_and_records_the_count(make):
    path = make(content=CONTENT | {"a.jpg": CUT, "b/10.png": b""})
    identity = sources.open_pictures(str(path)).identity
    with refuses(
        "data.on_bad_image=skip needs the list of bad pictures, but these pictures have none for this data.channels and "
        f"data.value_range; write it with ddpm-jax prepare-data {path} --check"
    ):
        opened(path, on_bad_image="skip")
    bad = list_bad(path)
    assert sorted(bad) == ["a.jpg", "b/10.png"]
    assert "truncated" in bad["a.jpg"]
    for data_cache in ("none", "auto"):
        source = opened(path, on_bad_image="skip", cache=data_cache)
        kept = [name for name in SORTED if name not in bad]
        np.testing.assert_array_equal(
            everything(source), np.stack([pictures.decode(CONTENT[n], (8, 8), 3) for n in kept])
        )
        assert source.labels.tolist() == [1, 3, 2, 4, 0]
        assert (source.identity["images"], source.identity["skipped"]) == (5, 2)
        assert source.identity["sha256"] == identity["sha256"]


def test_skip_with_an_empty_list_changes_nothing(make):
    path = make()
    source = opened(path)
    list_bad(path)
    assert opened(path, on_bad_image="skip").identity == source.identity


def test_a_list_of_other_pictures_is_not_used(make):
    path = make(content=CONTENT | {"a.jpg": CUT})
    list_bad(path)
    path = make(content=CONTENT | {"a.jpg": CUT[:-1]})
    with pytest.raises(UsageError, match="needs the list of bad pictures, but these pictures have none"):
        opened(path, on_bad_image="skip")


@pytest.mark.parametrize(
    "content", [b"", b'{"a.jp', b"\xff\xfe\0", b"[]", b"[" * 100_000, b"3", b'{"x.jpg": "y"}', None]
)
def test_a_damaged_list_of_bad_pictures_is_told_with_the_remedy(content, make):
    path = make(content=CONTENT | {"a.jpg": CUT})
    list_bad(path)
    file = cache.bad_list(to_decode(path))
    if content is None:
        file.unlink()
        os.mkfifo(file)
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        opened(path, on_bad_image="skip")
    assert str(caught.value).startswith(f"{file} is damaged (")
    assert str(caught.value).endswith(f"; write it again with ddpm-jax prepare-data {path} --check")
    assert "\n" not in str(caught.value)
    list_bad(path)
    assert len(opened(path, on_bad_image="skip")) == 6


def test_all_bad_is_refused(make):
    path = make(names=["a.png"], content={"a.png": b""})
    list_bad(path)
    with pytest.raises(UsageError, match=r"^none of the 1 pictures of .* can be decoded"):
        opened(path, on_bad_image="skip")


def test_sources_without_pictures_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    make_zip(tmp_path / "empty.zip", names=[])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("hello")
    for name in ("empty", "empty.zip", "text"):
        with refuses(
            f"data.source={str(tmp_path / name)!r} has no pictures; expected files that end in "
            ".png, .jpg, .jpeg, .webp, .bmp, .tif, .tiff"
        ):
            opened(tmp_path / name)


def test_a_link_to_nowhere_is_named(tmp_path):
    path = make_folder(tmp_path / "pictures")
    (path / "c.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UsageError, match=r"has a picture that cannot be found \(.*c.png'\); remove it or its link$"):
        opened(path)


def test_broken_and_missing_zip_files_are_refused(tmp_path):
    path = tmp_path / "x.zip"
    with pytest.raises(UsageError, match=r"x.zip' does not exist"):
        opened(path)
    path.mkdir()
    with refuses(f"data.source={str(path)!r} is not a file; give the path of a .zip file of pictures, or a folder"):
        opened(path)
    path.rmdir()
    content = make_zip(path).read_bytes()
    for left in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:left])
        with pytest.raises(UsageError, match=rf"^{path} cannot be read as a zip file \(.*\); copy or pack it again$"):
            opened(path)


def test_formats_by_their_first_bytes_not_their_ending(make):
    path = make(names=["a.png"], content={"a.png": encoded(Image.fromarray(COLOURS), "JPEG")})
    assert len(opened(path)) == 1


@pytest.mark.parametrize("data_cache", ["auto", "none"])
@pytest.mark.parametrize(
    ("most", "value_range", "note"),
    [
        (
            4095,
            None,
            "go from 0 to 15, 5.88% of the 8 bits that are kept; scale them; for 16-bit files that hold fewer",
        ),
        (
            4095,
            (0, 65535),
            "go from 0 to 4095, 6.25% of data.value_range; scale them, or set it to the range that they have",
        ),
        (4095, (0, 4095), ""),
        (20_000, None, ""),
    ],
)
def test_values_in_a_small_part_of_their_range_are_told_once(data_cache, most, value_range, note, tmp_path, capsys):
    content = {f"{i}.png": encoded(np.linspace(0, most, 64).astype(np.uint16).reshape(8, 8)) for i in range(3)}
    path = make_folder(tmp_path / "p", list(content), content)
    for _ in range(2):
        opened(path, channels=1, cache=data_cache, value_range=value_range)
    told = "".join(capsys.readouterr())
    assert (
        told.count("Note: the values of 3 of the 3 images of ") == told.count(note or "Note: the values") == bool(note)
    )


def test_values_of_arrays_in_a_small_part_of_their_range_are_told(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.linspace(0, 1, 128, dtype=np.float32).reshape(2, 8, 8))
    opened(tmp_path / "x.npy", channels=1, value_range=(0, 8))
    assert "go from 0 to 1, 12.50% of data.value_range; scale them" in "".join(capsys.readouterr())
