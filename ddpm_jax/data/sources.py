"""Where images come from. A source has a length and reads any of its images as uint8; `open_source` finds it by name.

A new kind of source is one function here and one line in `open_source`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from sklearn.datasets import load_digits

from ddpm_jax.config import DataConfig
from ddpm_jax.errors import UsageError


@dataclass(frozen=True)
class Source:
    """Images, all of one size.

    images: uint8 (N, H, W, C), in memory or memory-mapped. labels: int (N,) or None. identity: what a checkpoint remembers of
    the data set, to refuse another one.
    """

    images: UInt8[np.ndarray, "N H W C"]
    labels: np.ndarray | None
    identity: dict[str, str | int]

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def read(self, indices: np.ndarray) -> UInt8[np.ndarray, "n H W C"]:
        """The images at these places, uint8 (n, H, W, C)."""
        return self.images[indices]


def digits(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The 1,797 handwritten 8x8 digits that scikit-learn ships, grey, 0..16 stretched to 0..255; labels 0 to 9."""
    data = load_digits()
    return np.round(data.images * (255 / 16)).astype(np.uint8)[..., None], data.target


def array_file(name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Images of an .npy file, or of an .npz file's `images` (and its `labels`, if there); uint8 (N, H, W) or (N, H, W, C)."""
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"data.source={name!r} is not a file; give the path of an .npy or .npz file of uint8 images")
    try:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content, None
        with content:
            arrays = {key: content[key] for key in ("images", "labels") if key in content}
    except Exception as error:  # a broken file raises almost anything
        raise UsageError(
            f"{name} cannot be read as an array file ({error}); write it with numpy.save or numpy.savez"
        ) from None
    if "images" not in arrays:
        raise UsageError(f"{name} has the arrays {', '.join(content.files)}, expected one called images")
    return arrays["images"], arrays.get("labels")


SOURCES: dict[str, Callable[[str], tuple[np.ndarray, np.ndarray | None]]] = {
    "digits": digits,
    ".npy": array_file,
    ".npz": array_file,
}


def open_source(config: DataConfig) -> Source:
    """The source that `data.source` names: a name or a file ending of `SOURCES`. Raises UsageError for what cannot be used."""
    name = config.source
    reader = SOURCES.get(name) or SOURCES.get(Path(name).suffix)
    if reader is None:
        raise UsageError(
            f"data.source={name!r} is unknown; use one of {', '.join(SOURCES)} (endings stand for a file's path)"
        )
    images, labels = reader(name)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise UsageError(
            f"data.source={name!r} has {images.dtype} values of shape {images.shape}, "
            "expected uint8 of shape (N, H, W) or (N, H, W, C) and at least one image"
        )
    if images.ndim == 3:
        images = images[..., None]
    expected = (config.image_size, config.image_size, config.channels)
    if images.shape[1:] != expected:
        raise UsageError(
            f"data.source={name!r} has images of shape {images.shape[1:]}, but data.image_size and data.channels say "
            f"{expected}; change these or the images"
        )
    if labels is not None and (labels.shape != (len(images),) or labels.dtype.kind not in "iu"):
        raise UsageError(
            f"data.source={name!r} has labels of type {labels.dtype} and shape {labels.shape}, "
            f"expected whole numbers of shape ({len(images)},)"
        )
    return Source(images, labels, _identity(images, labels))


def _identity(images: np.ndarray, labels: np.ndarray | None) -> dict[str, str | int]:
    digest = hashlib.sha256(str(images.shape).encode())
    for first in range(0, len(images), 4096):
        digest.update(images[first : first + 4096].tobytes())
    if labels is not None:
        digest.update(labels.astype(np.int64).tobytes())
    return {"images": len(images), "sha256": digest.hexdigest()}
