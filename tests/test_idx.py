"""Files in MNIST's format, written here byte by byte as its authors describe them."""

import gzip
import re

import numpy as np
import pytest

from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4), np.uint8)
LABELS = np.array([3, 1, 4, 1, 5], np.uint8)


def idx(array, *, kind=8):
    """The bytes of an array in the IDX format."""
    head = bytes([0, 0, kind, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return head + array.tobytes()


@pytest.fixture
def path(tmp_path):
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))
    return tmp_path / "train-images-idx3-ubyte.gz"


def open_images(path):
    return open_source(DataConfig(source=str(path), image_size=4, channels=1))


def test_images_and_the_labels_beside_them_are_read(path):
    source = open_images(path)
    np.testing.assert_array_equal(source.read(np.arange(5))[..., 0], IMAGES)
    np.testing.assert_array_equal(source.labels, LABELS)


def test_a_file_without_labels_beside_it_is_read(path):
    path.with_name("train-labels-idx1-ubyte.gz").unlink()
    assert open_images(path).labels is None
    renamed = path.rename(path.with_name("mine.gz"))
    np.testing.assert_array_equal(open_images(renamed).images[..., 0], IMAGES)


def test_it_is_the_same_data_set_as_an_npz_of_its_arrays(path, tmp_path):
    np.savez(tmp_path / "same.npz", images=IMAGES, labels=LABELS)
    assert open_images(path).identity == open_images(tmp_path / "same.npz").identity


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (idx(IMAGES), "Not a gzipped file"),
        (gzip.compress(idx(IMAGES))[:-20], "Compressed file ended before"),
        (gzip.compress(idx(IMAGES)[:-1]), "its values are not the 80 of its header"),
        (gzip.compress(idx(IMAGES) + b"\0"), "its values are not the 80 of its header"),
        (gzip.compress(idx(IMAGES, kind=13)), "starts with the bytes [0, 0, 13, 3], expected [0, 0, 8, 3]"),
        (gzip.compress(idx(LABELS)), "starts with the bytes [0, 0, 8, 1]"),
        (gzip.compress(b""), "starts with the bytes []"),
        (gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12), "of memory"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the bytes hold the time
)
def test_a_file_that_is_none_is_refused(content, reason, path):
    path.write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(reason)):
        open_images(path)
