"""Pictures decoded once, into a file of uint8 images that later runs and other processes map into memory.

The files lie in the folder that the environment variable DDPM_JAX_CACHE names, else in ~/.cache/ddpm_jax; any of them can be
deleted at any time. Beside them lie the lists of pictures that cannot be decoded.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from ddpm_jax.data.pictures import DecodedPictures, PictureError, Pictures
from ddpm_jax.errors import UsageError
from ddpm_jax.files import write_text

BLOCK = 256  # pictures decoded side by side before they are written
NAMED = 5  # of many bad pictures, how many a message names


def cache_folder() -> Path:
    """Where decoded images and lists of bad pictures are kept on this machine."""
    return Path(os.environ.get("DDPM_JAX_CACHE") or Path.home() / ".cache" / "ddpm_jax")


def decode_once(images: DecodedPictures) -> np.ndarray:
    """The images as a memory-mapped uint8 array (N, S, S, C), from the cache's file, which is made if it is not there whole.

    Several processes may ask at once: one decodes, the others wait. Raises UsageError naming the pictures that cannot be
    decoded, or saying why the file cannot be written; then none is left behind.
    """
    key = json.dumps([images.pictures.identity, images.pictures.stamp, images.shape, PIL.__version__])
    path = cache_folder() / "decoded" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    cached = _mapped(path, images.shape)
    if cached is not None:
        return cached
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path.with_suffix(".lock")):
            if _mapped(path, images.shape) is None:
                _write(path, images)
    except OSError as error:
        raise UsageError(
            f"the {images.nbytes / 1e6:,.0f} MB of decoded images cannot be written to {path.parent} ({error}); make room, "
            "name another folder in the environment variable DDPM_JAX_CACHE, or decode at every step with --data.cache none"
        ) from None
    cached = _mapped(path, images.shape)
    assert cached is not None
    return cached


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The file's array, or None where the file is missing, cut short or of something else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == shape and array.dtype == np.uint8 else None


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # held until the file is closed, also by a kill
        yield


def _write(path: Path, images: DecodedPictures) -> None:
    if images.nbytes > (free := shutil.disk_usage(path.parent).free):
        raise OSError(errno.ENOSPC, f"only {free / 1e6:,.0f} MB are free")
    temporary = path.with_suffix(".tmp")
    try:
        # Written, not mapped: where there is no room, a write fails, but a mapping kills the process.
        with temporary.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": images.shape}
            np.lib.format.write_array_header_1_0(file, header)
            bad: list[PictureError] = []
            for block, errors in _blocks(images, "Decoding pictures"):
                bad += errors
                if not bad:
                    file.write(block.data)
            if bad:
                raise _refusal(bad, len(images))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _blocks(images: DecodedPictures, what: str) -> Iterator[tuple[np.ndarray, list[PictureError]]]:
    with tqdm(total=len(images), desc=what, unit="picture", dynamic_ncols=True) as bar:
        for first in range(0, len(images), BLOCK):
            block = range(first, min(first + BLOCK, len(images)))
            yield images.attempts(block)
            bar.update(len(block))


def _refusal(bad: list[PictureError], total: int) -> UsageError:
    if len(bad) == 1:
        return bad[0]
    first = ", ".join(f"{picture.name} ({picture.reason})" for picture in bad[:NAMED])
    return UsageError(
        f"{len(bad)} of {total} pictures cannot be decoded: {first}{', ...' if len(bad) > NAMED else ''}; mend or remove "
        "them, or list them all with prepare_data.py SOURCE --check and leave them out with --data.on-bad-image skip"
    )


# ---- Bad pictures


def bad_list(pictures: Pictures) -> Path:
    """The file that lists which of these pictures cannot be decoded: JSON, {name: reason}."""
    identity = json.dumps(pictures.identity, sort_keys=True)
    return cache_folder() / "bad" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"


def list_bad(images: DecodedPictures) -> dict[str, str]:
    """Decodes every picture and writes the list of those that cannot be; returns it, {name: reason}."""
    bad = {error.name: error.reason for _, errors in _blocks(images, "Checking pictures") for error in errors}
    path = bad_list(images.pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(bad, indent=1) + "\n")
    return bad


def without_bad(pictures: Pictures, source: str) -> Pictures:
    """The pictures less those of the list, whose number their identity then tells. Raises UsageError if there is no list."""
    path = bad_list(pictures)
    if not path.exists():
        raise UsageError(
            "data.on_bad_image=skip needs the list of bad pictures, and there is none of these pictures as they are now; "
            f"write it with prepare_data.py {source} --check"
        )
    bad = json.loads(path.read_text())
    kept = [i for i, name in enumerate(pictures.names) if name not in bad]
    if len(kept) == len(pictures.names):
        return pictures
    if not kept:
        raise UsageError(f"none of the {len(pictures.names)} pictures of {source} can be decoded; see {path}")

    def labels():
        every = pictures.labels()
        return None if every is None else every[kept]

    identity = pictures.identity | {
        "images": len(kept),
        "skipped": len(bad),
        "skipped_sha256": hashlib.sha256(json.dumps(sorted(bad)).encode()).hexdigest(),
    }
    return replace(
        pictures,
        names=[pictures.names[i] for i in kept],
        read=lambda i: pictures.read(kept[i]),
        labels=labels,
        identity=identity,
    )
