"""Files that are there whole or not at all, read with suspicion, and written by one process at a time.

Every file that lies in a workdir or a cache is read by `read_text`, `read_json` or what is built on them. What cannot be used
raises `DamagedFileError`. The caller decides what becomes of it: caches and parts are made again, logs are cut back,
configurations and checkpoints are named.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from etils import epath

from ddpm_jax.errors import UsageError, first_line

LOCK = "lock"
MOST_BYTES = 2**26  # of a text or JSON file: a manifest has 200 bytes a file, a log 300 bytes a line


class DamagedFileError(UsageError):
    """A file that is not what was written there: `path`, and `reason`, which says what is wrong with it."""

    def __init__(self, path: epath.PathLike, reason: str, advice: str = "restore it from a copy, or move it away"):
        super().__init__(f"{path} is damaged ({reason}); {advice}")
        self.path = path
        self.reason = reason


# ---- Finding

STORAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}  # and what reads them


def open_folder(path: epath.PathLike) -> epath.Path:
    """The path, which may be one of an object store. Raises UsageError where that store cannot be reached from here."""
    scheme, separator, _ = os.fspath(path).partition("://")
    if not separator:
        return epath.Path(path)
    if scheme not in STORAGES:
        known = ", ".join(f"{name}://" for name in STORAGES)
        raise UsageError(f"{path} is on {scheme}://, which is no known storage; use a local folder, or one of {known}")
    try:
        folder = epath.Path(path)
        folder.exists()
    except ImportError:
        raise UsageError(
            f"{path} needs {STORAGES[scheme]}, which is not installed; pip install {STORAGES[scheme]}, use a local folder, "
            f"or mount the storage as one"
        ) from None
    except Exception as error:  # no network, no permission: each library has its own
        raise UsageError(
            f"{path} cannot be reached ({first_line(error)}); look at the network and the credentials, or use a local folder"
        ) from error
    return folder


# ---- Writing


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


def remove_remnants(folder: epath.Path, name: str = "") -> None:
    """Removes what killed processes left of writing a file of this name, or any file; call it where no other one writes."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.endswith(".tmp") and (not name or is_remnant(path, name)) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text)


def check_place(file: epath.PathLike, advice: str) -> None:
    """Raises UsageError where no such file can be made: below a file, in a folder that is not writable, of too long a name.

    It and its folders are tried out in a temporary folder, so that nothing is left. A full disk raises its OSError.
    """
    if "://" in str(file):
        return
    there = Path(file).absolute()
    names: list[str] = []
    try:
        while not names or not there.exists():
            names, there = [there.name, *names], there.parent
        with tempfile.TemporaryDirectory(dir=there) as temporary:
            place = Path(temporary, *names)
            place.parent.mkdir(parents=True, exist_ok=True)
            with whole(epath.Path(place)) as tried:
                tried.touch()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(f"{file} cannot be written ({error.strerror or error}); {advice}") from None


# ---- Reading


def is_regular(path: epath.Path) -> bool:
    """Whether a file is there that can be read to an end: no folder, and no pipe, which would be waited for."""
    return path.is_file() and ("://" in str(path) or stat.S_ISREG(os.stat(path).st_mode))


def fingerprint(path: epath.Path) -> list[Any] | None:
    """Size and SHA-256 of a file, as JSON holds them, or None where no regular file is."""
    if not is_regular(path):
        return None
    sha, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            sha.update(block)
            size += len(block)
    return [size, sha.hexdigest()]


def read_bytes(path: epath.Path, *, most: int = MOST_BYTES) -> bytes:
    """The content of a file. Raises FileNotFoundError, or DamagedFileError for more than `most` bytes or no regular file."""
    if "://" not in str(path) and not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for without an end
        raise DamagedFileError(path, "it is no regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DamagedFileError(path, f"it has more than {most:,} bytes")
    return content


def read_text(path: epath.Path, *, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file. Raises as `read_bytes`, and DamagedFileError for other bytes."""
    try:
        return read_bytes(path, most=most).decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"byte {error.start} is not UTF-8 text") from None


def parse_json(path: epath.PathLike, text: str, *, kind: type = dict) -> Any:
    """The JSON value of a file's text. Raises DamagedFileError where it is not JSON of this kind, or nested too deep."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it has the number {constant}")

    try:
        value = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise DamagedFileError(path, "its JSON is nested too deep") from None
    except ValueError as error:
        raise DamagedFileError(path, f"it is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise DamagedFileError(path, f"it holds a JSON {type(value).__name__}, expected {kind.__name__}")
    return value


def read_json(path: epath.Path, *, kind: type = dict, most: int = MOST_BYTES) -> Any:
    """The JSON value of a file. Raises FileNotFoundError, or DamagedFileError where it is not JSON of this kind."""
    return parse_json(path, read_text(path, most=most), kind=kind)


# ---- One process at a time


@contextmanager
def sole_writer(folder: epath.Path) -> Iterator[None]:
    """Holds the file FOLDER/lock while the block runs. Raises UsageError at once where another process holds it.

    The operating system lets go of it when the process ends, however it ends. On object stores, and on file systems that know
    no locks, nothing is locked.
    """
    if "://" in str(folder):
        yield
        return
    path = folder / LOCK
    while True:
        file = open(path, "a+")  # noqa: SIM115 - held longer than this block
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            file.close()
            raise UsageError(
                f"{folder} is being written by {holder}; wait until it has ended, or choose another folder"
            ) from None
        except OSError:  # a file system without locks
            break
        # The one before may have removed the file after it was opened here: what is locked then is no longer this path.
        if os.path.exists(path) and os.fstat(file.fileno()).st_ino == os.stat(path).st_ino:
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            with suppress(OSError):  # a disk that meanwhile can no longer be written
                path.unlink(missing_ok=True)
