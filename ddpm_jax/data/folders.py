"""Finding the files of a folder and its sub-folders: links are followed once, and outputs of runs are skipped."""

import collections
import os
from pathlib import Path

from tqdm import tqdm

from ddpm_jax.core.errors import UsageError

HIDDEN = (".", "__MACOSX")  # the first letters of hidden files and folders
READ = "are links to folders that are read already, or that hold this one"
OUTPUT = "hold a run or a set of generated images"
SHEETS = ("grid.png", "process.")  # of an image set, which is given itself: no images of it


def find_files(root: str) -> dict[str, str]:
    """{relative name: path} of the files in a folder and its sub-folders. Follows links to folders; skips hidden files.

    Each real folder is read once, under its own name if it lies in `root`, or else under its first link, so circular links end.
    Folders already read, folders of runs and image sets (whose grids would become data) and unreadable folders are left out with
    a note. Raises UsageError if `root` cannot be read.
    """
    files: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    read = {_identity(str(parent)) for parent in Path(root).resolve().parents}
    folders, links = [("", root)], collections.deque[tuple[str, str]]()
    with tqdm(desc=f"Looking for pictures in {root}", unit="folder", delay=2, dynamic_ncols=True) as bar:
        while folders or links:
            inside, path = folders.pop() if folders else links.popleft()
            try:
                identity = _identity(path)
                entries = [] if identity in read else sorted(os.scandir(path), key=lambda entry: entry.name)
            except OSError as error:
                if not inside:
                    raise UsageError(
                        f"the folder data.source={root!r} cannot be read ({error.strerror}); make it readable, or give another"
                    ) from None
                left_out.setdefault(f"cannot be read ({error.strerror})", []).append(inside)
                continue
            names = {entry.name for entry in entries}
            if not inside and _is_run(names):
                raise UsageError(
                    f"data.source={root!r} is the workdir of a run, whose pictures are sheets of many images; give a folder of "
                    "images, such as those that sample.py writes"
                )
            if identity in read or (inside and _is_output(names)):
                left_out.setdefault(READ if identity in read else OUTPUT, []).append(inside)
                continue
            read.add(identity)
            bar.update()
            for entry in entries:
                name = inside + entry.name
                if entry.name.startswith(HIDDEN) or ("set.json" in names and entry.name.startswith(SHEETS)):
                    continue
                if not os.path.isdir(entry.path):
                    files[name] = entry.path
                elif entry.is_symlink():
                    links.append((f"{name}/", entry.path))
                else:
                    folders.append((f"{name}/", entry.path))
    for why, folders_left in left_out.items():
        tqdm.write(f"Note: {len(folders_left)} folders in {root} that {why} are left out, e.g. {min(folders_left)}.")
    return files


def _identity(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _is_run(names: set[str]) -> bool:
    """Whether a folder that holds these names is a workdir (see workdir.py)."""
    return names >= {"config.json", "checkpoints"}


def _is_output(names: set[str]) -> bool:
    """Whether a folder that holds these names is a workdir or an image set (see image_set.py)."""
    return _is_run(names) or ("set.json" in names and bool(names & {"parts", "grid.png"}))
