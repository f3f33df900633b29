"""Data sets of tensorflow-datasets: preparing them, and reading prepared ones without TensorFlow.

They are stored where tensorflow-datasets stores them: in the folder TFDS_DATA_DIR of the environment, or else in
~/tensorflow_datasets.
"""

import contextlib
import difflib
import errno
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.core.errors import UsageError, import_extra
from ddpm_jax.data.pictures import Pictures

PREFIX = "tfds:"
# Image sets to suggest for a name without the prefix. The full list would need TensorFlow.
COMMON = (
    *("celeb_a", "celeb_a_hq", "cifar10", "cifar100", "downsampled_imagenet", "emnist", "fashion_mnist"),
    *("imagenet2012", "imagenet_resized", "imagenette", "kmnist", "lsun", "mnist", "oxford_flowers102"),
    *("stl10", "svhn_cropped"),
)
RETRIES = 6  # of a connection, 13 s in all; the default of ten takes 204 s


def data_folder() -> Path:
    """The folder of prepared data sets on this machine."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def parse(source: str) -> tuple[str, str]:
    """(NAME, split) of `tfds:NAME` or `tfds:NAME:split`; the split is train by default. Raises UsageError without a name."""
    name, _, split = source.removeprefix(PREFIX).partition(":")
    if not name:
        raise UsageError(f"data.source={source!r} names no data set; use tfds:NAME[:split], such as tfds:cifar10")
    return name, split or "train"


def pictures(source: str) -> Pictures:
    """The encoded pictures of `tfds:NAME[:split]`, in the data set's own order. Raises UsageError if it is not prepared."""
    name, split = parse(source)
    folder = _prepared(name)
    tfds = _import()
    builder = tfds.builder_from_directory(folder)
    features = builder.info.features
    if "image" not in features or not isinstance(features["image"], tfds.features.Image):
        raise UsageError(
            f"data.source={source!r} has the features {', '.join(features)}, expected a picture called image; choose another set"
        )
    try:
        encoded = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except (KeyError, ValueError):
        splits = ", ".join(sorted(builder.info.splits))
        raise UsageError(
            f"data.source={source!r} has the splits {splits}, but no {split!r}; choose one of them"
        ) from None

    has_labels = "label" in features and isinstance(features["label"], tfds.features.ClassLabel)

    def labels():
        if not has_labels:
            return None
        return np.array([encoded[i]["label"] for i in range(len(encoded))])

    files = sorted(folder.glob("*.array_record*"))
    return Pictures(
        names=_Names(f"{name}:{split}", len(encoded)),
        read=lambda i: encoded[int(i)]["image"],
        labels=labels,
        identity={
            "images": len(encoded),
            "tfds": f"{builder.info.full_name}:{split}",
            "bytes": int(builder.info.dataset_size),
        },
        stamp=json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]),
        classes=lambda: features["label"].names if has_labels else (),
    )


class _Names(Sequence[str]):
    """The names of a split's pictures: their indices."""

    def __init__(self, prefix: str, length: int):
        self.prefix, self.length = prefix, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i):
        return f"{self.prefix}[{i}]"


def _import() -> Any:
    return import_extra("tensorflow_datasets", "tfds", "a tfds source", "use pictures in a folder")


def _prepared(name: str) -> Path:
    """The folder of the newest prepared version. tfds itself would try the network for minutes."""
    infos = (data_folder() / name).glob("*/dataset_info.json")
    found = [
        info.parent for info in infos if re.fullmatch(r"\d+\.\d+\.\d+", info.parent.name)
    ]  # other names are incomplete downloads
    how = f"prepare it with: ddpm-jax prepare-data {PREFIX}{name}"
    if not found:
        raise UsageError(f"the data set {name!r} is not prepared in {data_folder()}; {how}")
    newest = max(found, key=lambda folder: [int(part) for part in folder.name.split(".")])
    if not any(newest.glob("*.array_record*")):
        raise UsageError(f"the data set {name!r} is prepared in {newest}, but not as array_record; {how}")
    return newest


def prepare(source: str) -> Path:
    """Downloads `tfds:NAME` and writes it as array_record, unless it is prepared; returns its folder.

    Raises UsageError if there is no such data set, it cannot be downloaded, a package is missing or a file must be placed by
    hand. Downloaded files are kept for the next try.
    """
    name, _ = parse(source)
    tfds = _import()
    with contextlib.suppress(ImportError):
        from tensorflow_datasets.core.download import downloader

        downloader.MAX_RETRIES = RETRIES
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it logs every retry
    try:
        tfds.builder(name, file_format="array_record", data_dir=data_folder()).download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:  # its message lists all sets; tfds.list_builders needs TensorFlow
        near = difflib.get_close_matches(name, re.findall(r"- (\w+)", str(error)), n=1)
        hint = f"perhaps you meant {near[0]}" if near else "look for it in the catalog of tensorflow-datasets"
        raise UsageError(f"tensorflow-datasets has no data set {name!r}; {hint}") from None
    except ImportError as error:
        raise UsageError(
            f"preparing {name} needs more packages ({error}); pip install 'ddpm-jax[tensorflow]'"
        ) from None
    except AssertionError as error:  # tfds asks for an archive to be placed by hand
        raise UsageError(f"{name} cannot be prepared ({' '.join(str(error).split())})") from None
    except OSError as error:
        if error.filename or error.errno in (errno.ENOSPC, errno.EROFS):  # an error of the disk: cli.py reports it
            raise
        url = getattr(getattr(error, "request", None), "url", None)
        why = f"{urllib.parse.urlsplit(url).hostname} cannot be reached" if url else error
        raise UsageError(f"{name} cannot be fetched ({why}); look at the network and try again") from None
    return _prepared(name)
