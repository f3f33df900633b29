"""Data sets of tensorflow-datasets: looking whether one is prepared, reading it without TensorFlow, and preparing it.

They lie where tensorflow-datasets keeps them: in the folder that the environment variable TFDS_DATA_DIR names, else in
~/tensorflow_datasets.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddpm_jax.data.pictures import Pictures
from ddpm_jax.errors import UsageError

PREFIX = "tfds:"


def data_folder() -> Path:
    """Where prepared data sets are kept on this machine."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")


def parse(source: str) -> tuple[str, str]:
    """(NAME, split) of `tfds:NAME` or `tfds:NAME:split`; the split is train by default."""
    name, _, split = source.removeprefix(PREFIX).partition(":")
    return name, split or "train"


def pictures(source: str) -> Pictures:
    """The encoded pictures of `tfds:NAME[:split]`, in the data set's own order. Raises UsageError if it is not prepared."""
    name, split = parse(source)
    folder = _prepared(name)
    tfds = _import()
    builder = tfds.builder_from_directory(folder)
    feature = builder.info.features.get("image")
    if not isinstance(feature, tfds.features.Image):
        raise UsageError(
            f"data.source={source!r} has the features {', '.join(builder.info.features)}, expected a picture called image"
        )
    try:
        info = builder.info.splits[split]
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"data.source={source!r} has the splits {', '.join(builder.info.splits)}, but no {split!r} ({error})"
        ) from None
    encoded = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def labels():
        if not isinstance(builder.info.features.get("label"), tfds.features.ClassLabel):
            return None
        only = builder.as_data_source(split, decoders=tfds.decode.PartialDecoding({"label": True}))
        return np.array([only[i]["label"] for i in range(len(only))])

    files = sorted(folder.glob("*.array_record*"))
    return Pictures(
        names=_Names(f"{name}:{split}", len(encoded)),
        read=lambda i: encoded[int(i)]["image"],
        labels=labels,
        identity={
            "images": len(encoded),
            "tfds": f"{builder.info.full_name}:{split}",
            "bytes": info.num_bytes if hasattr(info, "num_bytes") else 0,
        },
        stamp=json.dumps([(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]),
    )


class _Names(Sequence[str]):
    """What the pictures of a split are called: their places, since they have no names."""

    def __init__(self, prefix: str, length: int):
        self.prefix, self.length = prefix, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i):
        return f"{self.prefix}[{i}]"


def _import() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UsageError(
            f"a tfds source needs tensorflow-datasets ({error}); pip install 'ddpm-jax[tfds]', or use pictures in a folder"
        ) from None
    return tensorflow_datasets


def _prepared(name: str) -> Path:
    """The folder of the newest prepared version. Looked for by hand: asked itself, tfds tries the network for minutes."""
    found = [info.parent for info in (data_folder() / name).glob("*/dataset_info.json")]
    how = f"prepare it with: python prepare_data.py {PREFIX}{name}"
    if not found:
        raise UsageError(f"the data set {name!r} is not prepared in {data_folder()}; {how}")
    newest = max(found, key=lambda folder: [int(part) for part in folder.name.split(".") if part.isdigit()])
    if not any(newest.glob("*.array_record*")):
        raise UsageError(f"the data set {name!r} is prepared in {newest}, but not as array_record; {how}")
    return newest


def prepare(source: str) -> Path:
    """Downloads `tfds:NAME` and writes it as array_record, if that is not done; returns its folder.

    Raises UsageError if there is no such data set, a package is missing or a file has to be placed by hand.
    """
    name, _ = parse(source)
    tfds = _import()
    try:
        builder = tfds.builder(name, file_format="array_record", data_dir=data_folder())
        builder.download_and_prepare()
    except ImportError as error:
        raise UsageError(
            f"preparing {name} needs more packages ({error}); pip install 'ddpm-jax[tensorflow]'"
        ) from None
    except (tfds.core.DatasetNotFoundError, AssertionError) as error:  # the latter where an archive is placed by hand
        raise UsageError(f"{name} cannot be prepared ({' '.join(str(error).split())})") from None
    return _prepared(name)
