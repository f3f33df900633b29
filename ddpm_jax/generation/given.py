"""What each image of a set is drawn with: its class, its condition, the picture that it starts from.

Each is a row of a table. Images take the rows in turn, so that image i's depends on i alone.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from PIL import Image

from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import Source, open_source
from ddpm_jax.data.conditions import Conditioning, source_of_conditions
from ddpm_jax.data.pictures import ENDINGS, FORMATS, DecodedPictures, Pictures
from ddpm_jax.data.sources import decoded, open_conditions, open_content
from ddpm_jax.generation.options import STARTS, GivenOptions
from ddpm_jax.training.workdir import Run

# By name: an array, or pictures decoded at each read; each has a length, and rows by an array of indices.
Tables = Mapping[str, Any]
BLOCK = 256  # rows hashed at a time
KEPT, OPEN = 255, 0  # values of a mask
FRACTIONS = 8  # images of an interpolation if nobody says


def given_at(tables: Tables, indices: Int[np.ndarray, " B"]) -> dict[str, Any]:
    """The rows of the images of these indices, by the tables' names."""
    return {name: table[indices % len(table)] for name, table in tables.items()}


class ConditionsOf:
    """The conditions of a source's images, in an order, as a table."""

    def __init__(self, conditioning: Conditioning, source: Source, order: Int[np.ndarray, " N"]):
        self._conditioning, self._source, self.order = conditioning, source, order

    def __len__(self) -> int:
        """The number of conditions."""
        return len(self.order)

    def __getitem__(self, places: Int[np.ndarray, " B"]) -> Shaped[np.ndarray, "B h w K"]:
        """The conditions at these places of the order, as they are stored."""
        return np.asarray(self._conditioning.split(self._source.read_rows(self.order[places]))[1])


@dataclasses.dataclass(frozen=True)
class Given:
    """Pictures given to a run.

    Attributes:
        options: What is done with them.
        tables: By the generator's arguments: conditions, pictures, masks, ends, fractions.
        definition: What decides the images: the options, and SHA-256 of the tables.
        count: How many images are drawn if nobody says; None: as many as always.
    """

    options: GivenOptions
    tables: Tables
    definition: Mapping[str, Any]
    count: int | None


def with_given(run: Run, options: GivenOptions, num_images: int | None) -> Run:
    """The run with the pictures that the options name.

    Raises UsageError if they cannot be read or do not fit the run, or a run with conditions is given none.
    """
    data, tables = run.config.data, dict[str, Any]()
    if (run.experiment.conditioning is None) != (not options.conditions):
        raise UsageError(
            f"the run draws an image of a condition (data.condition={data.condition}); give these by --conditions"
            if run.experiment.conditioning
            else "--conditions needs a run with conditions, but this one has none; leave it out, or train with data.condition"
        )
    if options.conditions:
        tables["conditions"] = _read("--conditions", options.conditions, data, conditions=True)
    if options.from_images:
        tables["pictures"] = _read("--from-images", options.from_images, data)
    if options.inpaint:
        tables["pictures"] = _read("--inpaint", options.inpaint, data)
        tables["masks"] = _masks(options.mask, data, len(tables["pictures"]))
    count = max((len(table) for table in tables.values()), default=None)
    if options.interpolate:
        tables["ends"] = np.stack([_end(name, data) for name in options.interpolate])[None]
        count = num_images or count or FRACTIONS
        tables["fractions"] = np.linspace(0, 1, count, dtype=np.float32)
    if not tables:
        return run
    used = {name: getattr(options, name) for name in _deciding(options)}
    definition = used | {name: _sha(table) for name, table in tables.items()}
    return dataclasses.replace(run, given=Given(options, tables, definition, count))


def _deciding(options: GivenOptions) -> list[str]:
    """The numbers that the images depend on; of the pictures it is their content."""
    start = next((name for name in STARTS if getattr(options, name)), "")
    return {"": [], "inpaint": ["inpaint_jump", "inpaint_times"]}.get(start, ["noise_level"])


def _sha(table: Any) -> str:
    sha = hashlib.sha256()
    for first in range(0, len(table), BLOCK):
        block = table[np.arange(first, min(first + BLOCK, len(table)))]
        sha.update(f"{block.dtype} {block.shape} ".encode() + block.tobytes())
    return sha.hexdigest()


# ---- Reading


@contextlib.contextmanager
def _told_of(option: str, name: str) -> Iterator[None]:
    """Says the option in the place of data.source, where an error does."""
    try:
        yield
    except UsageError as error:
        said = str(error).replace(f"data.source={name!r}", f"{option} {name}")
        raise UsageError(said if option in said else f"{option} {name}: {said}") from None


def _read(option: str, name: str, data: DataConfig, *, conditions: bool = False) -> np.ndarray | DecodedPictures:
    """The pictures that an option names, preprocessed like the run's images, or like its conditions."""
    with _told_of(option, name):
        if conditions:
            data = source_of_conditions(data, name)
        data = dataclasses.replace(
            data, source=name, cache="none", on_bad_image="stop", condition="none", condition_source=""
        )
        if _is_picture(name):
            return decoded(_one(name), data)
        return (open_conditions if conditions else open_source)(data).images


def _is_picture(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and os.path.isfile(name)


def _one(name: str) -> Pictures:
    """A single picture."""
    return Pictures([name], lambda i: Path(name).read_bytes(), lambda: None, {}, "")


def _end(name: str, data: DataConfig) -> Shaped[np.ndarray, "H W C"]:
    """A picture of --interpolate, or the image of the run's data that has this number."""
    if not name.isdecimal():
        table = _read("--interpolate", name, data)
        if len(table) != 1:
            raise UsageError(
                f"--interpolate {name} has {len(table)} pictures; give one, or the number of an image of the data"
            )
        return table[np.arange(1)][0]
    source = open_source(dataclasses.replace(data, condition="none", condition_source="", condition_channels=0))
    if int(name) >= len(source):
        raise UsageError(f"--interpolate {name} is no image of the run's data, which has 0 to {len(source) - 1}")
    return source.read(np.array([int(name)]))[0]


def _masks(name: str, data: DataConfig, count: int) -> Shaped[np.ndarray, "N H W 1"]:
    """One mask, or as many as there are pictures: uint8, KEPT or OPEN."""
    eight_bits = dataclasses.replace(data, channels=1, value_range=None)
    with _told_of("--mask", name):
        content = _one(name) if _is_picture(name) else open_content(name)
        if isinstance(content, Pictures):
            for i, each in enumerate(content.names):
                _check_mask_size(each, content.read(i), data.size)
    table = _read("--mask", name, eight_bits)
    if len(table) not in (1, count):
        raise UsageError(f"--mask {name} has {len(table)} masks for {count} pictures; give one, or one for each")
    masks = table[np.arange(len(table))]
    for i, mask in enumerate(masks):
        soft = mask[(mask != KEPT) & (mask != OPEN)]
        if len(soft):
            raise UsageError(
                f"--mask {name} is soft: mask {i} has the value {soft[0]}, expected {KEPT} (kept) and {OPEN} (filled in) alone; "
                "threshold it, and store it without loss, as PNG"
            )
    return masks


def _check_mask_size(name: str, content: bytes, size: tuple[int, int]) -> None:
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
    except Exception:  # a damaged picture can raise any error; it is named where it is decoded
        return
    if (height, width) != size:
        raise UsageError(
            f"--mask has a mask of {height} x {width} pixels ({name}), but the run's images have {size[0]} x {size[1]}; give "
            "one of this size: a mask is not resized, since that would make it soft"
        )
