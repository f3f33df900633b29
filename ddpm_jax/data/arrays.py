""".npz files that record what they belong to, so that a truncated, changed or misplaced file is detected."""

import io
from typing import Any

import numpy as np
from etils import epath

from ddpm_jax.core.files import DamagedFileError, whole

Arrays = dict[str, np.ndarray]
OF = "of"


def write_arrays(path: epath.Path, arrays: Arrays, *, of: str) -> None:
    """Writes an .npz file atomically. of: the file's identity, stored inside."""
    named: dict[str, Any] = {**arrays, OF: np.array(of)}
    with whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **named)


def parse_arrays(path: epath.Path, content: bytes, *, of: str | None = None) -> Arrays:
    """The arrays of an .npz file's content. of: the identity it must hold; None for a user's own file.

    Raises DamagedFileError if a checksum or the identity does not match.
    """
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = dict(file)
    except Exception:  # a damaged header raises almost anything
        raise DamagedFileError(path, f"its {len(content):,} bytes are not a complete .npz file") from None
    if of is not None and str(arrays.pop(OF, None)) != of:
        raise DamagedFileError(path, "it belongs to something else")
    return arrays
