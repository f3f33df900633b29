"""Arrays in .npz files that know what they are of: one that is cut short, changed or in another's place is told as damaged."""

import io
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax.files import DamagedFileError, whole

Arrays = dict[str, np.ndarray]
OF = "of"


def write_arrays(path: epath.Path, arrays: Arrays, *, of: str) -> None:
    """Writes an .npz file whole or not at all. of: what tells it from every other file, kept in it."""
    named: dict[str, Any] = {**arrays, OF: np.array(of)}
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **named)


def parse_arrays(path: epath.Path, content: bytes, *, of: str | None = None) -> Arrays:
    """The arrays of an .npz file's content, each by its checksum. of: what it must say that it is of, unless it is a user's own.

    Raises DamagedFileError.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
    except Exception:  # a damaged header raises almost anything
        raise DamagedFileError(path, f"its {len(content):,} bytes are no whole .npz file") from None
    if of is not None and str(arrays.pop(OF, None)) != of:
        raise DamagedFileError(path, "it does not say that it belongs here")
    return arrays
