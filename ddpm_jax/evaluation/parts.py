"""Long computations over images, in parts that survive the process: each range of images is computed once and kept on disk.

Parts of one definition lie in a folder named by its digest, so that what was computed under another never mixes in. A part is
written whole or not at all; a damaged one is computed anew. So a run killed at any moment continues with the same numbers.

Of several processes the first one reads and writes, and tells the others what it read: all compute the same parts together.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from ddpm_jax import sharding
from ddpm_jax.arrays import Arrays, parse_arrays, write_arrays
from ddpm_jax.files import DamagedFileError, write_text


def digest(definition: Any) -> str:
    """SHA-256 of what JSON can hold, the same for equal content."""
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()


def _of(path: epath.Path) -> str:
    # The folder's name is the digest of what the arrays depend on, the file's name which of them they are.
    return f"{path.parent.name}/{path.name}"


def save_arrays(path: epath.Path, arrays: Arrays) -> None:
    """Writes an .npz file whole or not at all, on the first process."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_arrays(path, arrays, of=_of(path))


def load_arrays(path: epath.Path) -> Arrays | None:
    """The arrays of a file that `save_arrays` wrote, or None if it is not there, damaged, or was moved from another place.

    A damaged one is named on the first process.
    """
    content = sharding.first_reads(path)
    if content is None:
        return None
    try:
        return parse_arrays(path, content, of=_of(path))
    except DamagedFileError as error:
        if jax.process_index() == 0:
            tqdm.write(f"{path} is damaged ({error.reason}) and is made again")
        return None


class Parts:
    """compute(range of images) -> arrays whose first axis is those images, remembered in a folder below `folder`, if any.

    definition: all that the arrays depend on but the images' places, as JSON holds it.
    """

    def __init__(self, folder: epath.Path | None, definition: dict[str, Any], compute: Callable[[range], Arrays]):
        self.folder = None if folder is None else folder / digest(definition)[:16]
        self.definition = definition
        self.compute = compute
        self._described = False

    def get(self, part: range) -> Arrays:
        """The arrays of one range, read or computed."""
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
        """Says in the folder what its name is the digest of: nothing reads it, and a person may."""
        path, text = folder / "definition.json", json.dumps(self.definition, indent=2) + "\n"
        if jax.process_index() == 0 and not self._described:
            if not path.exists() or path.read_bytes() != text.encode():
                write_text(path, text)
            self._described = True

    def each(self, count: int, batch_size: int, *, title: str) -> Iterator[Arrays]:
        """The arrays of images 0 .. count - 1, by ranges of `batch_size`, with a progress bar on the first process."""
        shown = {"disable": jax.process_index() != 0, "leave": self.folder is not None, "dynamic_ncols": True}
        with tqdm(total=count, desc=title, unit="image", **shown) as bar:
            for first in range(0, count, batch_size):
                part = range(first, min(first + batch_size, count))
                yield self.get(part)
                bar.update(len(part))

    def all(self, count: int, batch_size: int, *, title: str) -> Arrays:
        """The arrays of images 0 .. count - 1, together."""
        parts = list(self.each(count, batch_size, title=title))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
