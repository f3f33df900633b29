"""Images in the IDX format, in which MNIST and its successors (Fashion-MNIST, KMNIST, EMNIST) are published.

A file holds two zeros, the type of its values (8: uint8), the number of axes, the length of each axis as a big-endian uint32,
and the values. train-images-idx3-ubyte.gz has its labels beside it, in train-labels-idx1-ubyte.gz.
"""

import gzip
import math
import os
import struct
import zlib

import numpy as np

from ddpm_jax.core import room
from ddpm_jax.core.errors import UsageError

UINT8 = 8
IMAGES, LABELS = "images-idx3", "labels-idx1"


def read_idx(path: str, axes: int) -> np.ndarray:
    """The uint8 array of a gzip-compressed IDX file.

    Raises UsageError if the file is damaged, or holds another type or number of axes.
    """
    try:
        with gzip.open(path) as file:
            head = file.read(4)
            if head != bytes([0, 0, UINT8, axes]):
                raise UsageError(
                    f"{path} starts with the bytes {list(head)}, expected {[0, 0, UINT8, axes]}: an IDX file of uint8 "
                    f"values with {axes} axes; give such a file, or a zip or npz file"
                )
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            room.check_memory(math.prod(shape), f"the images of {path}", "store them as an .npy file, which is mapped")
            values = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UsageError(f"{path} cannot be read as a gzip-compressed IDX file ({error}); copy it again") from None
    if len(values) != math.prod(shape):
        raise UsageError(f"{path} is damaged: its values are not the {math.prod(shape):,} of its header; copy it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def read_images(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The images (N, H, W) of a file, and the labels (N,) of the file beside it, or None if there is none."""
    folder, name = os.path.split(path)
    beside = os.path.join(folder, name.replace(IMAGES, LABELS))
    labels = read_idx(beside, 1) if beside != path and os.path.isfile(beside) else None
    return read_idx(path, 3), labels
