"""The data's part of the contract: the order of images is a function of (seed, step), and no cache or layout changes a batch."""

import io
import itertools
import os
import pickle
import re
import resource
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from tiny import experiment, tiny

from ddpm_jax.config import DataConfig
from ddpm_jax.core import room, sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.provenance import made_with
from ddpm_jax.data import SOURCES, Source, batch_indices, batches, epoch_order, make_feed, open_source, sources
from ddpm_jax.training.start import start_state
from ddpm_jax.training.step import draw

SIZES = [(10, 4), (10, 5), (7, 7), (5, 12), (1, 3), (1797, 128)]  # images, images in a batch
sizes = pytest.mark.parametrize(("size", "batch_size"), SIZES)


def philox4x64(key, counter):
    """Four words of Philox4x64 with 10 rounds (Salmon et al. 2011), in whole numbers of Python."""
    mask = 2**64 - 1
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & mask, (p0 >> 64) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


def order_from_paper(seed, epoch, size):
    """The order of the contract: places sorted by their Philox words, whose counter starts at 1."""
    words = [word for block in range(-(-size // 4)) for word in philox4x64((seed, epoch), (block + 1, 0, 0, 0))]
    return sorted(range(size), key=lambda i: words[i])


# ---- Order


def test_philox_has_its_published_answer():
    published = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64((0, 0), (0, 0, 0, 0)) == published


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("epoch", [0, 1, 1000])
@pytest.mark.parametrize("size", [1, 10, 1797])
def test_order_sorts_philox_words(seed, epoch, size):
    assert epoch_order(seed, epoch, size).tolist() == order_from_paper(seed, epoch, size)


def test_golden_orders():
    # They change only if the contract does, and then every published run is another.
    assert epoch_order(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(0, 1, 10).tolist() == [5, 3, 7, 8, 2, 4, 1, 0, 6, 9]
    assert epoch_order(1, 0, 10).tolist() == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    assert epoch_order(2**32 - 1, 3, 10).tolist() == [8, 6, 5, 7, 3, 4, 2, 1, 9, 0]
    assert epoch_order(0, 0, 1797)[:10].tolist() == [1051, 998, 162, 670, 664, 1492, 185, 322, 431, 318]
    assert batch_indices(0, 1, 3, 4, 10).tolist() == [[8, 5, 4, 3], [6, 7, 5, 3], [7, 8, 2, 4]]


@pytest.mark.parametrize("size", [1, 2, 10, 1797])
def test_every_epoch_is_a_permutation(size):
    for seed in (0, 5):
        for epoch in (0, 1, 99):
            assert sorted(epoch_order(seed, epoch, size)) == list(range(size))


def test_no_two_epochs_or_seeds_share_an_order():
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_equal_words_keep_their_order(monkeypatch):
    class Constant:
        def __init__(self, key):
            pass

        def random_raw(self, size):
            return np.zeros(size, np.uint64)

    monkeypatch.setattr(np.random, "Philox", Constant)
    assert epoch_order(123, 456, 50).tolist() == list(range(50))
    epoch_order.cache_clear()


def test_an_order_cannot_be_changed_by_who_gets_it():
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 10)[0] = 1


@sizes
def test_batches_are_the_epochs_laid_end_to_end(size, batch_size):
    steps = 40
    epochs = range(-(-steps * batch_size // size))
    laid = np.concatenate([epoch_order(3, epoch, size) for epoch in epochs])[: steps * batch_size]
    np.testing.assert_array_equal(batch_indices(3, 0, steps, batch_size, size), laid.reshape(steps, batch_size))


@sizes
def test_batches_do_not_depend_on_where_a_run_is_cut(size, batch_size):
    together = batch_indices(3, 0, 40, batch_size, size)
    rng = np.random.default_rng(0)
    for _ in range(5):
        cuts = [0, *sorted(rng.choice(np.arange(1, 40), 6, replace=False)), 40]
        parts = [batch_indices(3, int(a), int(b - a), batch_size, size) for a, b in itertools.pairwise(cuts)]
        np.testing.assert_array_equal(np.concatenate(parts), together)
    for step in range(40):  # a resume at any step, also in the middle of an epoch
        np.testing.assert_array_equal(batch_indices(3, step, 1, batch_size, size)[0], together[step])


@sizes
def test_batches_are_places_of_the_data_set(size, batch_size):
    indices = batch_indices(2**32 - 1, 10**6, 3, batch_size, size)
    assert indices.shape == (3, batch_size)
    assert indices.dtype == np.int64
    assert 0 <= indices.min() <= indices.max() < size


# ---- Sources


def digits_config(**changes):
    return DataConfig(**({"source": "digits", "image_size": 8, "channels": 1} | changes))


@pytest.fixture(scope="module")
def digits():
    return open_source(digits_config())


def test_digits_are_scikit_learns(digits):
    assert len(digits) == 1797
    assert digits.images.shape == (1797, 8, 8, 1)
    assert digits.images.dtype == np.uint8
    assert (digits.images.min(), digits.images.max()) == (0, 255)
    original = load_digits()
    np.testing.assert_allclose(digits.images[..., 0] / 255 * 16, original.images, atol=0.5 / 255 * 16 + 1e-12)
    np.testing.assert_array_equal(digits.labels, original.target)
    assert np.bincount(digits.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_identity_of_the_digits_is_stable(digits):
    # Checkpoints remember it: another one would refuse to continue every run on digits.
    sha256 = "bbe74ba6220adbe5995dc1c231e80955bb564b15bdd32c6aa732efb403fa14f7"
    assert digits.identity == {"images": 1797, "sha256": sha256}
    assert open_source(digits_config()).identity == digits.identity


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)
LABELS = np.array([3, 1, 4, 1, 5, 9])


def open_images(path, **changes):
    return open_source(DataConfig(**({"source": str(path), "image_size": 4, "channels": 3} | changes)))


def saved(path, images=IMAGES, **others):
    """The path of an array file with these images."""
    if path.suffix == ".npy":
        np.save(path, images)
    else:
        np.savez(path, images=images, **others)
    return path


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_array_file_gives_its_images(name, tmp_path):
    source = open_images(saved(tmp_path / name))
    np.testing.assert_array_equal(source.images, IMAGES)
    np.testing.assert_array_equal(source.read(np.array([5, 0, 0])), IMAGES[[5, 0, 0]])
    assert source.labels is None
    assert len(source) == 6
    assert isinstance(source.images, np.memmap) == (name == "x.npy")  # a big .npy is not read at once


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_npz_may_have_labels(dtype, tmp_path):
    source = open_images(saved(tmp_path / "x.npz", labels=LABELS.astype(dtype)))
    np.testing.assert_array_equal(source.images, IMAGES)
    np.testing.assert_array_equal(source.labels, LABELS)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_grey_images_may_lack_the_channel_axis(name, tmp_path):
    source = open_images(saved(tmp_path / name, IMAGES[..., 0]), channels=1)
    np.testing.assert_array_equal(source.images, IMAGES[..., :1])


def test_what_an_array_file_is_decides_not_its_name(tmp_path):
    saved(tmp_path / "x.npz", labels=LABELS).rename(tmp_path / "a.npy")
    saved(tmp_path / "x.npy").rename(tmp_path / "b.npz")
    np.testing.assert_array_equal(open_images(tmp_path / "a.npy").labels, LABELS)
    np.testing.assert_array_equal(open_images(tmp_path / "b.npz").images, IMAGES)


def test_identity_is_of_the_content(tmp_path):
    identity = open_images(saved(tmp_path / "x.npy")).identity
    assert identity["images"] == 6
    fortran = np.asfortranarray(IMAGES)
    for same in (saved(tmp_path / "y.npy"), saved(tmp_path / "y.npz"), saved(tmp_path / "z.npy", fortran)):
        assert open_images(same).identity == identity
    changed = IMAGES.copy()
    changed[5, 3, 3, 2] ^= 1
    others = [
        saved(tmp_path / "a.npy", changed),
        saved(tmp_path / "b.npy", IMAGES[::-1]),
        saved(tmp_path / "c.npy", IMAGES[:5]),
        saved(tmp_path / "d.npz", labels=LABELS),
        saved(tmp_path / "e.npz", labels=LABELS[::-1]),
    ]
    digests = {open_images(path).identity["sha256"] for path in others}
    assert len(digests | {identity["sha256"]}) == 6


def test_identity_reads_images_beyond_the_first_block(tmp_path):
    images = np.zeros((5000, 1, 1, 1), np.uint8)
    one = open_images(saved(tmp_path / "one.npy", images), image_size=1, channels=1).identity
    images[4999] = 1
    assert open_images(saved(tmp_path / "two.npy", images), image_size=1, channels=1).identity != one


def refuses(message):
    return pytest.raises(UsageError, match=f"^{re.escape(message)}$")


def test_unknown_source_is_refused_with_the_known_ones():
    with refuses(
        "data.source='digit' does not exist; perhaps you meant digits; else use one of "
        + ", ".join(SOURCES)
        + " (endings stand for a file's path)"
    ):
        open_source(digits_config(source="digit"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("FOLDER", None),
        ("cifar10", "tfds:cifar10"),
        ("CIFAR-10", "tfds:cifar10"),
        ("{}/pictrues", "{}/pictures"),
        ("{}/pictrues/cats/tabby", "{}/pictures"),  # where the path breaks off
        ("{}/wholly-other/cats", None),
        ("{}/image.npz", "{}/images.npz"),
        ("{}/zzz/y", None),
        ("z" * 4096, None),
        ("{}/" + "z" * 4096, None),
        ("a\0b", None),
    ],
)
def test_a_path_that_does_not_exist_is_said_with_what_comes_near(name, near, tmp_path):
    (tmp_path / "pictures").mkdir()
    saved(tmp_path / "images.npz")
    with pytest.raises(
        UsageError, match=r"^data.source='.*' does not exist; .*use one of digits, tfds:NAME, "
    ) as caught:
        open_images(name.format(tmp_path))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))
    hint = re.search(r"perhaps you meant (.*); else", str(caught.value))
    assert (hint and hint[1]) == (near and near.format(tmp_path))


def test_a_file_of_no_kind_that_is_read_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(UsageError, match=r"x.tar' is a file of an unknown kind; use one of digits"):
        open_images(tmp_path / "x.tar")


def test_an_array_file_that_is_none_is_refused(tmp_path):
    path = str(tmp_path / "folder.npz")
    (tmp_path / "folder.npz").mkdir()
    with refuses(f"data.source={path!r} is not a file; give the path of an .npy or .npz file of images"):
        open_images(path)


@pytest.mark.parametrize(
    ("images", "what"),
    [
        (IMAGES / 255.0, "float64 values of shape (6, 4, 4, 3)"),
        (IMAGES.astype(np.int64), "int64 values of shape (6, 4, 4, 3)"),
        (IMAGES[0, 0], "uint8 values of shape (4, 3)"),
        (IMAGES[None], "uint8 values of shape (1, 6, 4, 4, 3)"),
        (np.uint8(3), "uint8 values of shape ()"),
        (IMAGES[:0], "uint8 values of shape (0, 4, 4, 3)"),
    ],
)
def test_arrays_that_are_no_images_are_refused(images, what, tmp_path):
    path = saved(tmp_path / "x.npz", images)
    with refuses(
        f"data.source='{path}' has {what}, expected uint8 of shape (N, H, W) or (N, H, W, C) and at least one image"
    ):
        open_images(path)


FLOATS = np.random.default_rng(1).normal(size=(6, 4, 6, 5)).astype(np.float32)
RANGE = (-4.0, 4.0)


def open_floats(path, **changes):
    return open_images(path, **({"image_size": (4, 6), "channels": 5, "value_range": RANGE} | changes))


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_float32_arrays_of_any_size_and_channels_keep_every_bit(name, tmp_path):
    source = open_floats(saved(tmp_path / name, FLOATS))
    assert source.images.dtype == np.float32
    np.testing.assert_array_equal(source.read(np.array([5, 0])), FLOATS[[5, 0]])
    changed = FLOATS.copy()
    changed[3, 1, 2, 4] = np.nextafter(changed[3, 1, 2, 4], np.float32(9))
    assert open_floats(saved(tmp_path / f"2{name}", changed)).identity != source.identity


def test_float32_arrays_need_a_range_and_8_bit_ones_none(tmp_path):
    path = saved(tmp_path / "x.npy", FLOATS)
    start = f"data.source='{path}' has float32 values of shape (6, 4, 6, 5), expected uint8 of shape"
    with refuses(f"{start} (N, H, W) or (N, H, W, C) and at least one image; float32 values need data.value_range"):
        open_floats(path, value_range=None)
    with refuses(
        f"data.source='{saved(path)}' has uint8 values of shape (6, 4, 4, 3), expected float32 of shape (N, H, W) or "
        "(N, H, W, C) and at least one image"
    ):
        open_images(path, value_range=(0, 255))


@pytest.mark.parametrize(("value", "what"), [(5.5, "to 5.5"), (-np.inf, "from -inf to"), (np.nan, "from nan to nan")])
def test_values_outside_of_the_declared_range_are_refused(value, what, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DIGEST_BYTES", FLOATS[0].nbytes)  # one image at a time
    changed = FLOATS.copy()
    changed[5, 3, 5, 0] = value
    with pytest.raises(
        UsageError, match=f"has values .*{what}.*, but data.value_range is .-4.0, 4.0.; declare the range"
    ):
        open_floats(saved(tmp_path / "x.npy", changed))


@pytest.mark.parametrize("cache", ["device", "host", "none"])
def test_batches_of_float32_do_not_depend_on_cache_or_devices(cache, tmp_path):
    data = {"image_size": (4, 6), "channels": 5, "value_range": RANGE, "cache": cache}
    data["source"] = str(saved(tmp_path / "x.npy", FLOATS))
    config = tiny(data=data, train={"batch_size": 4})
    images, *_ = fed(config, open_source(config.data), mesh_of(2), 7, 2)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, FLOATS[batch_indices(config.seed, 7, 2, 4, 6)])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"image_size": 8}, (8, 8, 3)), ({"channels": 1}, (4, 4, 1)), ({"image_size": 3}, (3, 3, 3))],
)
def test_images_of_another_size_are_refused(changes, expected, tmp_path):
    path = saved(tmp_path / "x.npy")
    with refuses(
        f"data.source='{path}' has images of shape (4, 4, 3), but data.image_size and data.channels say {expected}; "
        "change these or the images"
    ):
        open_images(path, **changes)


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (LABELS[:5], "type int64 and shape (5,)"),
        (LABELS[:, None], "type int64 and shape (6, 1)"),
        (LABELS / 2, "type float64 and shape (6,)"),
        (np.array(list("abcdef")), "type <U1 and shape (6,)"),
    ],
)
def test_labels_that_are_none_are_refused(labels, what, tmp_path):
    path = saved(tmp_path / "x.npz", labels=labels)
    with refuses(f"data.source='{path}' has labels of {what}, expected whole numbers of shape (6,)"):
        open_images(path)


def test_npz_without_images_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=IMAGES, labels=LABELS)
    with refuses(f"{path} has the arrays x, labels, expected one named images"):
        open_images(path)


def test_an_array_larger_than_memory_is_refused_unread(tmp_path, monkeypatch):
    path = saved(tmp_path / "x.npz")
    monkeypatch.setattr(room, "free_memory", lambda: IMAGES.nbytes)
    with pytest.raises(UsageError, match=r"needs at least .* of memory, and .* are free; store it as an .npy file"):
        open_images(path)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize(
    "shape", [(10**12, 4, 4, 3), (2**62, 4, 4, 3), (-6, 4, 4, 3), (6, 4, 4, 10**30), ("6", 4, 4, 3)]
)
def test_headers_that_claim_other_sizes_are_refused_in_little_memory(shape, name, tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    content = header.getvalue() + IMAGES.tobytes()
    path = tmp_path / name
    if name == "x.npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("images.npy", content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match="cannot be read as an array file"):
        open_images(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**16  # in KiB


class Trap:
    """Pickled code, which must not be executed."""

    def __reduce__(self):
        return (pytest.fail, ("a data file's code was executed",))


def trap_file(path, kind):
    if kind == "images":
        np.savez(path, images=np.array([Trap()], object))
    elif kind == "labels":
        np.savez(path, images=IMAGES, labels=np.array([Trap()], object))
    elif kind == "array":
        with path.open("wb") as file:
            np.save(file, np.array([Trap()], object))
    else:
        path.write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize("kind", ["images", "labels", "array", "pickle"])
@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_pickles_are_refused_unread(kind, name, tmp_path):
    path = tmp_path / "x.npz"
    trap_file(path, kind)
    path = path.rename(tmp_path / name)
    with pytest.raises(
        UsageError,
        match=rf"^{path} cannot be read as an array file \(.*(pickle|Python objects).*\); write it with numpy.save",
    ):
        open_images(path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # NumPy leaves a broken zip file open
def test_broken_files_are_refused_in_a_sentence(tmp_path):
    np.savez_compressed(tmp_path / "whole.npz", images=np.zeros((50, 4, 4, 3), np.uint8))
    saved(tmp_path / "whole.npy")
    broken = {"empty.npy": b"", "empty.npz": b"", "text.npz": b"hello", "text.npy": b"hello"}
    for name in ("whole.npy", "whole.npz"):
        content = (tmp_path / name).read_bytes()
        for left in range(1, len(content), 7):
            broken[f"cut_{left}_{name}"] = content[:left]
        if name == "whole.npz":
            for i in range(0, len(content), 3):
                broken[f"flipped_{i}_{name}"] = content[:i] + bytes([content[i] ^ 0x55]) + content[i + 1 :]
    messages = []
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        try:
            open_images(tmp_path / name)
        except UsageError as error:
            messages.append(str(error))
    assert len(messages) > len(broken) / 2  # what is left whole, as a time in a header, may pass
    assert "\n" not in "".join(messages)


# ---- Batches on devices


def mesh_of(devices, fsdp=1):
    return sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])


def fed(config, source, mesh, first_step, num_steps):
    """The batches that the compiled step will see, and the arrays that carry them."""
    batch, dataset = make_feed(config, source, mesh)(first_step, num_steps)
    for array in jax.tree.leaves((batch, dataset)):
        assert len(array.sharding.device_set) == mesh.devices.size
    return np.asarray(batch) if dataset is None else np.asarray(dataset)[np.asarray(batch)], batch, dataset


@pytest.mark.parametrize("cache", ["device", "host", "none"])
@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 1), (4, 1), (8, 1), (8, 4)])
def test_batches_do_not_depend_on_cache_or_devices(cache, devices, fsdp, digits):
    config = tiny(data={"cache": cache}, seed=3)
    expected = digits.images[batch_indices(3, 110, 4, 16, 1797)]  # the first epoch ends within step 112
    images, batch, dataset = fed(config, digits, mesh_of(devices, fsdp), 110, 4)
    assert images.dtype == np.uint8
    np.testing.assert_array_equal(images, expected)
    assert batch.dtype == (np.int32 if cache == "device" else np.uint8)
    assert {shard.data.shape[:2] for shard in batch.addressable_shards} == {(4, 16 // devices)}
    assert (dataset is None) == (cache != "device")


def test_host_reads_what_each_device_needs_and_no_more(digits, monkeypatch):
    monkeypatch.setattr(batches, "AHEAD", 0)
    asked = []

    class Counting(Source):
        def read(self, indices):
            asked.append(len(indices))
            return super().read(indices)

    source = Counting(digits.images, lambda: None, {})
    fed(tiny(data={"cache": "host"}), source, mesh_of(4), 0, 2)
    assert asked == [8] * 4


def test_memory_mapped_file_feeds_the_same(tmp_path, digits):
    source = open_source(digits_config(source=str(saved(tmp_path / "x.npy", digits.images))))
    config = tiny(data={"cache": "host"})
    one, other = (fed(config, either, mesh_of(2), 0, 3)[0] for either in (source, digits))
    np.testing.assert_array_equal(one, other)


def test_a_data_set_without_room_on_the_devices_is_refused_with_its_bytes(monkeypatch, digits):
    config = tiny(data={"cache": "device"})
    monkeypatch.setattr(room, "free_memory", lambda: digits.images.nbytes - 1)
    with pytest.raises(UsageError, match=r"^the data set needs at least .*; use --data.cache host$"):
        make_feed(config, digits, mesh_of(1))

    def device(free):
        stats = {"bytes_limit": 2**40 + free, "bytes_in_use": 2**40}
        return SimpleNamespace(platform="gpu", memory_stats=lambda: stats)

    room.check_devices([device(2**32), device(2**32)], 2**32, "the data set", "use less")
    with pytest.raises(UsageError, match=r"needs at least 4.0 GiB of memory .*, and 1.0 GiB are free on .*; use less"):
        room.check_devices([device(2**32), device(2**30)], 2**32, "the data set", "use less")


def test_auto_caches_on_the_devices_up_to_a_size(monkeypatch, digits):
    assert batches.DEVICE_CACHE_BYTES == 2**30
    assert batches.on_device(tiny(data={"cache": "auto"}), digits)
    for limit, there in ((digits.images.nbytes, True), (digits.images.nbytes - 1, False)):
        monkeypatch.setattr(batches, "DEVICE_CACHE_BYTES", limit)
        assert batches.on_device(tiny(data={"cache": "auto"}), digits) is there
        assert batches.on_device(tiny(data={"cache": "device"}), digits)
        assert not batches.on_device(tiny(data={"cache": "host"}), digits)


def test_a_data_set_that_changed_since_the_checkpoint_is_refused_with_what_differs(digits):
    before = {"images": 1796, "sha256": "0f"}
    checkpoints = SimpleNamespace(
        sweep=lambda: 0, choose=lambda **_: 5, restore_meta=lambda _: {"data": before, "since_log": {}}
    )
    with refuses(
        f"the data set has changed since the checkpoint of step 5: it was {before} and is {digits.identity}; "
        "give the same data, start in another workdir, or continue with the new data by --changed-data"
    ):
        start_state(experiment(tiny()), digits, mesh_of(1), checkpoints)


def test_a_resume_says_that_files_were_written_since_the_checkpoint(tmp_path, capsys):
    """A picture may have been edited although its size is the same."""
    for i in range(2):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")
    config = tiny(data={"source": str(tmp_path), "image_size": 4})

    def resumed(**meta):
        checkpoints = SimpleNamespace(
            sweep=lambda: 0, choose=lambda **_: 5, restore_meta=lambda _: meta, restore_state=lambda *_: None
        )
        source = open_source(config.data)
        return start_state(experiment(config), source, mesh_of(1), checkpoints)[1], capsys.readouterr().out

    meta, said = resumed(data=None)  # of earlier versions
    assert "written since" not in said
    assert "written since" not in resumed(**meta)[1]
    os.utime(tmp_path / "1.png", (0, 0))
    again, said = resumed(**meta)
    assert "Note: files of the data set were written since the checkpoint of step 5." in said
    assert again["data"] == meta["data"]
    assert "written since" not in resumed(**again)[1]


def test_a_resume_with_other_software_or_devices_says_that_it_is_not_bit_for_bit(digits, capsys):
    made = made_with(mesh_of(2))
    assert set(made) == {"jax", "jaxlib", "devices"}
    assert made["devices"].startswith("2 x ")

    def said(was):
        meta = {"data": digits.identity, "since_log": {}, "made_with": was}
        checkpoints = SimpleNamespace(
            sweep=lambda: 0, choose=lambda **_: 5, restore_meta=lambda _: meta, restore_state=lambda *_: None
        )
        assert start_state(experiment(tiny()), digits, mesh_of(2), checkpoints)[1]["made_with"] == made
        return capsys.readouterr().out

    assert said({}) == said(made) == ""  # of earlier versions, and the same
    assert "Note: the checkpoint was made with other software or devices" in said(made | {"jaxlib": "0.1"})
    assert f"not bit for bit (jaxlib 0.1 -> {made['jaxlib']})." in said(made | {"jaxlib": "0.1"})
    assert "1 x cpu -> 2 x " in said(made | {"devices": "1 x cpu"})


def test_device_cache_is_sent_once(digits):
    feed = make_feed(tiny(data={"cache": "device"}), digits, mesh_of(2))
    assert feed(0, 2)[1] is feed(2, 2)[1]


def test_every_image_is_flipped_in_some_epochs_and_not_in_others():
    """Flips are drawn on the devices at every step; with 30 epochs no image keeps its side by chance (32 x 2 ** -30)."""
    config, size, flips = tiny(train={"batch_size": 16}), 16, []
    for step in range(30 * size // 16):
        images = batch_indices(config.seed, step, 1, 16, size)[0]
        drawn = np.asarray(draw(experiment(config), jnp.int32(step), (16, 1, 1, 1), None).flip)
        flips.append(np.stack([images, drawn]))
    images, drawn = np.concatenate(flips, axis=1)
    shares = np.bincount(images, drawn) / 30
    assert 0 < shares.min() < shares.max() < 1
    assert abs(shares.mean() - 0.5) < 4 * 0.5 / np.sqrt(30 * size)
