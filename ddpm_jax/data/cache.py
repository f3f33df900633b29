"""The cache of decoded pictures: files of images that runs and processes map into memory.

The cache is the folder DDPM_JAX_CACHE of the environment, or else ~/.cache/ddpm_jax. Its files may be deleted at any time. Their
checksums are checked before use. It also holds the lists of pictures that cannot be decoded.
"""

import functools
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
from etils import epath
from tqdm import tqdm

from ddpm_jax.config import DataConfig
from ddpm_jax.core import files, room
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.core.files import DamagedFileError
from ddpm_jax.data.pictures import DecodedPictures, PictureError, Pictures

DECODING = (
    2  # raised whenever pictures.py decodes some picture to other values, so that no file of older values is used
)
BLOCK = 256  # pictures that are decoded in parallel before they are written; fewer if they exceed BLOCK_BYTES
BLOCK_BYTES = 2**28
READ_BYTES = 2**20  # read at a time by each thread that checks a file
REMEDY = (
    "make room, name another folder in the environment variable DDPM_JAX_CACHE, "
    "or decode at every step with --data.cache none"
)
NAMED = 5  # bad pictures, or kinds of files, that a message names


def cache_folder() -> Path:
    """The folder of decoded images and lists of bad pictures on this machine."""
    return Path(os.environ.get("DDPM_JAX_CACHE") or Path.home() / ".cache" / "ddpm_jax")


def decode_once(images: DecodedPictures) -> np.ndarray:
    """The images as a memory-mapped array (N, H, W, C), decoded into a file of the cache if it has none.

    A damaged file is reported and made again. If several processes call it, one decodes and the others wait. Raises UsageError
    if pictures cannot be decoded or the file cannot be written; no file remains.
    """
    of_floats = [] if images.value_range is None else [images.value_range]
    versions = [PIL.__version__, DECODING]
    key = json.dumps([images.pictures.identity, images.pictures.stamp, images.shape, *versions, *of_floats])
    path = cache_folder() / "decoded" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    try:
        cached = _mapped(path, key, images)
    except DamagedFileError as error:
        tqdm.write(f"Note: the cache {error.path} is damaged ({error.reason}); the pictures are decoded anew.")
        cached = None
    if cached is not None:
        return cached
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # On a file system without locks both decode, and the later file replaces the other.
        said = "Note: another process decodes the same pictures; waiting for it."
        lock = path.with_suffix(".lock").name
        with files.sole_writer(epath.Path(path.parent), lock=lock, wait=lambda: tqdm.write(said)):
            with suppress(DamagedFileError):
                cached = _mapped(path, key, images)  # another process may have written it meanwhile
            if cached is None:
                _write(path, key, images)
                cached = np.load(path, mmap_mode="r", allow_pickle=False)
            return cached
    except OSError as error:
        raise UsageError(f"the decoded images cannot be written to {path.parent} ({error}); {REMEDY}") from None


# ---- The file NAME.npy, and NAME.json beside it with its key and checksums


def _mapped(path: Path, key: str, images: DecodedPictures) -> np.ndarray | None:
    """Maps the file's array, or returns None if there is no file. Raises DamagedFileError if a checksum does not match.

    It checks the whole file once, so that training need not check what it reads.
    """
    try:
        written = files.read_json(epath.Path(path.with_suffix(".json")))
        if written.get("key") != key:
            raise DamagedFileError(path, "it belongs to other images")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size - images.nbytes < READ_BYTES:  # the header, of a hundred bytes
                raise DamagedFileError(path, f"it has {size:,} bytes, expected {images.nbytes:,} and a header")
            starts = [0, *range(size - images.nbytes, size, _block_bytes(images))]
            ends = [*starts[1:], size]
            with ThreadPoolExecutor() as threads:
                found = threads.map(functools.partial(_checksum, file.fileno()), starts, ends)
                bar = tqdm(found, "Checking the cache", len(starts), unit="block", delay=2, dynamic_ncols=True)
                if list(bar) != written.get("crc32"):
                    raise DamagedFileError(path, "its checksums do not match")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, NotADirectoryError):  # or a file without checksums, of an older version
        return None
    except OSError as error:
        raise DamagedFileError(path, f"it cannot be read: {error.strerror}") from None


def _checksum(file: int, start: int, end: int) -> int:
    checksum = 0
    for first in range(start, end, READ_BYTES):
        checksum = zlib.crc32(os.pread(file, min(READ_BYTES, end - first), first), checksum)
    return checksum


def _block_bytes(images: DecodedPictures) -> int:
    """Bytes of a block, which is decoded, written and checked at a time; a multiple of an image's."""
    picture = images.nbytes // len(images)
    return picture * max(1, min(BLOCK, BLOCK_BYTES // picture))


def _write(path: Path, key: str, images: DecodedPictures) -> None:
    room.check_disk(path.parent, images.nbytes, f"a file of {len(images):,} decoded images", REMEDY)
    for name in (path.name, path.with_suffix(".json").name):
        files.remove_remnants(epath.Path(path.parent), name)
    # Written, not mapped: on a full disk a write raises an error, but a mapping kills the process.
    with files.whole(epath.Path(path)) as temporary, temporary.open("wb") as file:
        header = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(images.dtype), "fortran_order": False, "shape": images.shape}
        np.lib.format.write_array_header_1_0(header, described)
        file.write(header.getvalue())
        checksums = [zlib.crc32(header.getvalue())]
        bad: list[PictureError] = []
        for block, errors in _blocks(images, "Decoding pictures"):
            bad += errors
            if not bad:
                file.write(block.data)
                checksums.append(zlib.crc32(block.data))
        if bad:
            raise _refusal(bad, len(images))
        file.flush()
        os.fsync(file.fileno())
    files.write_text(epath.Path(path.with_suffix(".json")), json.dumps({"key": key, "crc32": checksums}) + "\n")


def _blocks(images: DecodedPictures, what: str) -> Iterator[tuple[np.ndarray, list[PictureError]]]:
    count = _block_bytes(images) * len(images) // images.nbytes
    with tqdm(total=len(images), desc=what, unit="picture", dynamic_ncols=True) as bar:
        for first in range(0, len(images), count):
            block = range(first, min(first + count, len(images)))
            yield images.attempts(block)
            bar.update(len(block))


def _refusal(bad: list[PictureError], total: int) -> UsageError:
    undecoded = [picture for picture in bad if not picture.sentence]
    if len(bad) > 1 and not undecoded:
        return UsageError(f"{bad[0]} ({len(bad) - 1} more of {total} are no good either)")
    bad = undecoded or bad
    if len(bad) == 1:
        return bad[0]
    first = ", ".join(f"{picture.name} ({picture.reason})" for picture in bad[:NAMED])
    return UsageError(
        f"{len(bad)} of {total} pictures cannot be decoded: {first}{', ...' if len(bad) > NAMED else ''}; mend or remove "
        "them, or list them all with ddpm-jax prepare-data SOURCE --check and leave them out with --data.on-bad-image skip"
    )


# ---- Bad pictures


def bad_list(images: DecodedPictures) -> Path:
    """The path of the list of pictures that cannot be decoded to such channels and values: JSON, {name: reason}."""
    value_range = [float(end) for end in images.value_range or ()]
    key = files.digest([images.pictures.identity, images.shape[3], value_range, DECODING])
    return cache_folder() / "bad" / f"{key[:32]}.json"


def find_bad(images: DecodedPictures) -> dict[str, str]:
    """Decodes every picture and returns those that fail, {name: reason}."""
    return {error.name: error.reason for _, errors in _blocks(images, "Checking pictures") for error in errors}


def write_bad(images: DecodedPictures, bad: dict[str, str]) -> Path:
    """Writes the list of pictures that cannot be decoded; returns its path. Raises RunError if it cannot be written."""
    path = bad_list(images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(epath.Path(path), json.dumps(bad, indent=1) + "\n")
    except OSError as error:
        raise RunError(
            f"the list of bad pictures cannot be written to {path} ({error.strerror}); make room there, or name another folder "
            "in the environment variable DDPM_JAX_CACHE"
        ) from None
    return path


def without_bad(images: DecodedPictures, source: str) -> Pictures:
    """The pictures without those of the list; their identity records the list. Raises UsageError if there is no list."""
    pictures, path = images.pictures, bad_list(images)
    options = f" --channels {images.shape[3]}" if images.shape[3] != DataConfig.channels else ""
    if images.value_range:
        options += " --value-range {:.17g} {:.17g}".format(*images.value_range)
    command = f"ddpm-jax prepare-data {source} --check{options}"
    try:
        with files.advising(f"write it again with {command}"):
            bad = files.read_json(epath.Path(path))
            if unknown := bad.keys() - set(pictures.names):
                raise DamagedFileError(path, f"it lists {min(unknown)}, which is not among the pictures")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            "data.on_bad_image=skip needs the list of bad pictures, but these pictures have none for this data.channels and "
            f"data.value_range; write it with {command}"
        ) from None
    kept = [i for i, name in enumerate(pictures.names) if name not in bad]
    if len(kept) == len(pictures.names):
        return pictures
    if not kept:
        raise UsageError(f"none of the {len(pictures.names)} pictures of {source} can be decoded; see {path}")

    def labels():
        every = pictures.labels()
        return None if every is None else every[kept]

    left_out: dict[str, str | int] = {
        "images": len(kept),
        "skipped": len(bad),
        "skipped_sha256": files.digest(sorted(bad)),
    }
    return replace(
        pictures,
        names=[pictures.names[i] for i in kept],
        read=lambda i: pictures.read(kept[i]),
        labels=labels,
        identity=pictures.identity | left_out,
    )
