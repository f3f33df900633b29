"""Files that are there whole or not at all, whenever the process is killed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath


@contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
    """A temporary path beside `path`, which takes its place when the block ends, and is removed if it fails.

    The name is the process's own, so that two that write one file at a time do not disturb each other.
    """
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_remnant(path: epath.Path, name: str) -> bool:
    """Whether the path is what a killed process left of writing a file of this name."""
    return path.name.startswith(f"{name}.") and path.name.endswith(".tmp")


def write_text(path: epath.Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text)
