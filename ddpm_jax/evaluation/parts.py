"""Long computations over images, split into parts on disk, so that they resume after a kill with the same numbers.

Each definition has a folder, named by its digest. Parts are written atomically, and a damaged one is computed again. Process 0
reads, writes and broadcasts the parts; all processes compute the missing ones together.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ddpm_jax.core import sharding
from ddpm_jax.core.files import DamagedFileError, digest, write_text
from ddpm_jax.data.arrays import Arrays, parse_arrays, write_arrays


def _of(path: epath.Path) -> str:
    # The folder's name is the digest of the definition; the file's name is the range.
    return f"{path.parent.name}/{path.name}"


def save_arrays(path: epath.Path, arrays: Arrays) -> None:
    """Writes an .npz file atomically, on process 0 only."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arrays, of=_of(path))


def load_arrays(path: epath.Path) -> Arrays | None:
    """The arrays of a file of `save_arrays`; None if it is missing, damaged or misplaced. Process 0 reports a damaged file."""
    content = sharding.first_reads(path)
    if content is None:
        return None
    try:
        return parse_arrays(path, content, of=_of(path))
    except DamagedFileError as error:
        if jax.process_index() == 0:
            tqdm.write(f"{path} is damaged ({error.reason}) and is made again")
        return None


def progress(title: str, total: int, *, unit: str, leave: bool) -> tqdm:
    """A progress bar, on process 0 only."""
    return tqdm(total=total, desc=title, unit=unit, leave=leave, disable=jax.process_index() != 0, dynamic_ncols=True)


class Parts:
    """Computes arrays over ranges of images, and keeps them in a subfolder of `folder`, if any.

    definition: everything that the arrays depend on except the range, as JSON values. compute: range -> arrays, whose first
    axis is the images.
    """

    def __init__(self, folder: epath.Path | None, definition: dict[str, Any], compute: Callable[[range], Arrays]):
        self.folder = None if folder is None else folder / digest(definition)[:16]
        self.definition = definition
        self.compute = compute
        self._described = False

    def get(self, part: range) -> Arrays:
        """The arrays of one range, read from disk or computed."""
        if self.folder is None:
            return self.compute(part)
        path = self.folder / f"{part.start:07d}-{part.stop - 1:07d}.npz"
        arrays = load_arrays(path)
        if arrays is None:
            arrays = self.compute(part)
            save_arrays(path, arrays)
        self._describe(self.folder)
        return arrays

    def _describe(self, folder: epath.Path) -> None:
        """Writes the definition into the folder, for people to read."""
        path, text = folder / "definition.json", json.dumps(self.definition, indent=2) + "\n"
        if jax.process_index() == 0 and not self._described:
            if not path.exists() or path.read_bytes() != text.encode():
                write_text(path, text)
            self._described = True

    def each(self, count: int, batch_size: int, *, title: str) -> Iterator[Arrays]:
        """Yields the arrays of images 0 .. count - 1 in ranges of `batch_size`, with a progress bar on process 0."""
        with progress(title, count, unit="image", leave=self.folder is not None) as bar:
            for first in range(0, count, batch_size):
                part = range(first, min(first + batch_size, count))
                yield self.get(part)
                bar.update(len(part))

    def all(self, count: int, batch_size: int, *, title: str) -> Arrays:
        """The arrays of images 0 .. count - 1, concatenated."""
        parts = list(self.each(count, batch_size, title=title))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
