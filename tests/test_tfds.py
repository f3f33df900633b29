"""Data sets of tensorflow-datasets: found, read without TensorFlow, prepared; and told in a sentence where they are not."""

import errno
import gzip
import io
import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from test_data import fed, mesh_of
from test_pictures import RNG, encoded
from tiny import tiny

from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import batch_indices, open_source, tfds

library = pytest.importorskip("tensorflow_datasets", reason="tensorflow-datasets is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of tensorflow-datasets' own

IMAGES = RNG.integers(0, 256, (50, 8, 8, 3), np.uint8)


class TinyPictures(library.core.GeneratorBasedBuilder):
    """50 random pictures in 10 classes, and 5 in the split test."""

    VERSION = library.core.Version("1.2.0")

    def _info(self):
        features = {"image": library.features.Image(), "label": library.features.ClassLabel(num_classes=10)}
        return library.core.DatasetInfo(builder=self, features=library.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self.examples(50), "test": self.examples(5)}

    _generate_examples = None  # the splits above bring theirs

    def examples(self, count):
        for i in range(count):
            yield i, {"image": as_file(IMAGES[i]), "label": i % 10}


def as_file(image):
    """A picture for tensorflow-datasets, which would need TensorFlow to encode an array itself."""
    return io.BytesIO(encoded(image))


def idx(path):
    """The array of an IDX file, the format of MNIST and its kin."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder))
        assert tfds.prepare("tfds:tiny_pictures") == folder / "tiny_pictures" / "1.2.0"
    return folder


@pytest.fixture(autouse=True)
def folders(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    monkeypatch.setenv("DDPM_JAX_CACHE", str(tmp_path / "cache"))


def opened(source="tfds:tiny_pictures", **changes):
    return open_source(DataConfig(**({"source": source, "image_size": 8, "channels": 3} | changes)))


def refuses(message):
    return pytest.raises(UsageError, match=f"^{re.escape(message)}$")


def everything(source):
    return source.read(np.arange(len(source)))


def test_a_prepared_set_gives_its_pictures_and_labels():
    source = opened()
    places = [int(np.flatnonzero((image == IMAGES).all((1, 2, 3)))[0]) for image in everything(source)]
    assert sorted(places) == list(range(50))  # tensorflow-datasets shuffles once, when it prepares
    assert source.labels.tolist() == [place % 10 for place in places]
    assert source.identity["images"] == 50
    assert source.identity["tfds"] == "tiny_pictures/1.2.0:train"
    assert opened().identity == source.identity


def test_splits_may_be_named_and_cut():
    assert len(opened("tfds:tiny_pictures:test")) == 5
    part = opened("tfds:tiny_pictures:train[10:14]")
    np.testing.assert_array_equal(everything(part), everything(opened())[10:14])
    assert part.identity != opened().identity


def test_batches_are_bit_identical_for_any_cache_and_number_of_workers():
    expected = everything(opened())[batch_indices(0, 0, 6, 16, 50)]
    for data_cache in ("device", "host", "none"):
        for workers in (1, 4):
            data = {"source": "tfds:tiny_pictures", "channels": 3, "cache": data_cache, "workers": workers}
            config = tiny(data=data)
            np.testing.assert_array_equal(fed(config, open_source(config.data), mesh_of(2), 0, 6)[0], expected)


def test_reading_needs_no_tensorflow():
    code = """
import sys
from ddpm_jax.config import DataConfig
from ddpm_jax.data import open_source
source = open_source(DataConfig(source="tfds:tiny_pictures", image_size=8, cache="none"))
print(source.images[[0, 1]].shape, source.labels.shape, "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "(2, 8, 8, 3) (50,) False\n", done.stderr


def test_missing_data_is_told_at_once_with_the_command_that_prepares_it(prepared):
    start = time.perf_counter()
    with refuses(
        f"the data set 'cifar10' is not prepared in {prepared}; prepare it with: ddpm-jax prepare-data tfds:cifar10"
    ):
        opened("tfds:cifar10")
    assert time.perf_counter() - start < 1
    (prepared / "begun" / "incomplete.XYZ_1.0.0").mkdir(parents=True, exist_ok=True)
    (prepared / "begun" / "incomplete.XYZ_1.0.0" / "dataset_info.json").write_text("{}")
    with refuses(
        f"the data set 'begun' is not prepared in {prepared}; prepare it with: ddpm-jax prepare-data tfds:begun"
    ):
        opened("tfds:begun:test")


def test_another_file_format_is_told(prepared):
    folder = prepared / "old" / "3.0.2"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset_info.json").write_text(json.dumps({"fileFormat": "tfrecord"}))
    (folder / "old-train.tfrecord-00000-of-00001").write_bytes(b"")
    with refuses(
        f"the data set 'old' is prepared in {folder}, but not as array_record; prepare it with: "
        "ddpm-jax prepare-data tfds:old"
    ):
        opened("tfds:old")


def test_unknown_splits_and_missing_names_are_refused():
    with refuses(
        "data.source='tfds:tiny_pictures:valid' has the splits test, train, but no 'valid'; choose one of them"
    ):
        opened("tfds:tiny_pictures:valid")
    with refuses("data.source='tfds:' names no data set; use tfds:NAME[:split], such as tfds:cifar10"):
        opened("tfds:")


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        UsageError, match=r'^a tfds source needs tensorflow_datasets, .*; pip install "ddpm-jax\[tfds\]"'
    ):
        opened()


def test_preparing_what_cannot_be_is_refused_in_a_sentence(monkeypatch):
    with refuses("tensorflow-datasets has no data set 'fashion_mnits'; perhaps you meant fashion_mnist"):
        tfds.prepare("tfds:fashion_mnits")
    for error, message in [
        (
            OSError("no route to host"),
            "cifar10 cannot be fetched (no route to host); look at the network and try again",
        ),
        (
            ImportError("No module named x"),
            "needs more packages (No module named x); pip install 'ddpm-jax[tensorflow]'",
        ),
        (AssertionError("Place\n  x.tar there"), "cannot be prepared (Place x.tar there)"),
    ]:
        monkeypatch.setattr(library, "builder", Mock(side_effect=error))
        with pytest.raises(UsageError, match=re.escape(message)):
            tfds.prepare("tfds:cifar10")
    monkeypatch.setattr(library, "builder", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):  # told by the script as every full disk is
        tfds.prepare("tfds:cifar10")


def test_without_a_network_it_ends_soon_and_names_the_host(monkeypatch, tmp_path):
    """tensorflow-datasets' own downloader, on a port where nothing listens."""

    class Fetched(TinyPictures, skip_registration=True):
        def _split_generators(self, manager):
            manager.download("http://127.0.0.1:9/pictures.zip")

    monkeypatch.setattr(library, "builder", lambda *_, **options: Fetched(data_dir=tmp_path))
    monkeypatch.setattr(tfds, "RETRIES", 2)
    start = time.perf_counter()
    with refuses("cifar10 cannot be fetched (127.0.0.1 cannot be reached); look at the network and try again"):
        tfds.prepare("tfds:cifar10")
    assert time.perf_counter() - start < 10


def test_preparing_twice_does_nothing(prepared):
    files = {file: file.stat().st_mtime_ns for file in prepared.rglob("*.array_record*")}
    tfds.prepare("tfds:tiny_pictures")
    assert {file: file.stat().st_mtime_ns for file in prepared.rglob("*.array_record*")} == files


FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not FASHION.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist_is_read(tmp_path, monkeypatch):
    """Debian's Fashion-MNIST, written as tensorflow-datasets would, is the same pictures and labels through `tfds:`."""
    images, labels = (idx(FASHION / f"t10k-{name}-ubyte.gz")[:2000] for name in ("images-idx3", "labels-idx1"))

    class FashionMnist(TinyPictures, skip_registration=True):
        VERSION = library.core.Version("3.0.1")

        def _split_generators(self, _):
            examples = ((i, {"image": as_file(images[i]), "label": labels[i]}) for i in range(len(images)))
            return {"train": examples}

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    FashionMnist(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = opened("tfds:fashion_mnist", image_size=28, channels=1)
    assert len(source) == 2000

    def ordered(images, labels):
        rows = np.concatenate([images.reshape(-1, 28 * 28), labels[:, None].astype(np.uint8)], 1)
        return rows[np.lexsort(rows.T)]

    np.testing.assert_array_equal(ordered(everything(source), source.labels), ordered(images, labels))
