"""Files: written atomically, checked when read, and locked against a second writer.

Files of a workdir or a cache are read by `read_text`, `read_json` or functions built on them. A file that cannot be used raises
`DamagedFileError`, and the caller decides: caches and parts are recomputed, logs are truncated, configs and checkpoints are
reported.
"""

import errno
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from etils import epath

from ddpm_jax.core.errors import UsageError, first_line

LOCK = "lock"
MOST_BYTES = 2**26  # of a text or JSON file: a manifest takes 200 bytes a file, a log 300 bytes a line


class DamagedFileError(UsageError):
    """A file whose content is not what was written. Attributes: `path`, and `reason`, what is wrong."""

    def __init__(self, path: epath.PathLike, reason: str, advice: str = "restore it from a copy, or move it away"):
        super().__init__(f"{path} is damaged ({reason}); {advice}")
        self.path = path
        self.reason = reason


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Gives a DamagedFileError of the block another advice."""
    try:
        yield
    except DamagedFileError as error:
        raise DamagedFileError(error.path, error.reason, advice) from None


# ---- Finding

STORAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}  # scheme -> package that reads it


def open_folder(path: epath.PathLike) -> epath.Path:
    """The path as an epath.Path; it may lie in an object store. Raises UsageError if the store cannot be reached."""
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
    except Exception as error:  # each library has its own errors for a missing network or permission
        raise UsageError(
            f"{path} cannot be reached ({first_line(error)}); look at the network and the credentials, or use a local folder"
        ) from error
    return folder


# ---- Writing


@contextmanager
def whole(path: epath.Path) -> Iterator[epath.Path]:
    """Yields a temporary path that replaces `path` when the block ends, and is removed if the block fails.

    The temporary name holds the process id, so two processes can write the same file.
    """
    temporary = path.parent / f"{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_remnant(path: epath.Path, name: str) -> bool:
    """Whether the path is a temporary file that a killed process left while writing a file of this name."""
    return path.name.startswith(f"{name}.") and path.name.endswith(".tmp")


def remove_remnants(folder: epath.Path, name: str = "") -> None:
    """Removes temporary files that killed processes left, of one name or of all. Call it only where no one else writes."""
    for path in folder.iterdir() if folder.exists() else ():
        if path.name.endswith(".tmp") and (not name or is_remnant(path, name)) and not path.is_dir():
            path.unlink(missing_ok=True)


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file atomically."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def check_place(file: epath.PathLike, advice: str) -> None:
    """Raises UsageError if the file cannot be created: below a file, in a read-only folder, with too long a name.

    The file and its folders are created on trial in a temporary folder, so nothing remains. A full disk raises OSError.
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
    """Whether the path is a regular file: no folder, and no pipe, whose reading would block."""
    return path.is_file() and ("://" in str(path) or stat.S_ISREG(os.stat(path).st_mode))


def digest(value: Any) -> str:
    """SHA-256 of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint(path: epath.Path) -> list[Any] | None:
    """[size, SHA-256] of a file, or None if there is no regular file."""
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
    if "://" not in str(path) and not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would block forever
        raise DamagedFileError(path, "it is no regular file")
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise DamagedFileError(path, f"it has more than {most:,} bytes")
    return content


def read_text(path: epath.Path, *, most: int = MOST_BYTES) -> str:
    """The text of a UTF-8 file. Raises as `read_bytes`, and DamagedFileError for bytes that are not UTF-8."""
    try:
        return read_bytes(path, most=most).decode()
    except UnicodeDecodeError as error:
        raise DamagedFileError(path, f"byte {error.start} is not UTF-8 text") from None


def parse_json(path: epath.PathLike, text: str) -> Any:
    """The JSON object of a file's text. Raises DamagedFileError if it is no JSON object, or nested too deep."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"it has the number {constant}")

    try:
        value = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise DamagedFileError(path, "its JSON is nested too deep") from None
    except ValueError as error:
        raise DamagedFileError(path, f"it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DamagedFileError(path, f"it holds a JSON {type(value).__name__}, expected dict")
    return value


def read_json(path: epath.Path, *, most: int = MOST_BYTES) -> Any:
    """The JSON object of a file. Raises FileNotFoundError, or DamagedFileError if it is no JSON object."""
    return parse_json(path, read_text(path, most=most))


# ---- One process at a time


@contextmanager
def sole_writer(folder: epath.Path, *, lock: str = LOCK, wait: Callable[[], object] | None = None) -> Iterator[None]:
    """Locks FOLDER/lock while the block runs. If another process holds the lock, raises UsageError at once.

    The operating system releases the lock when the process ends. Object stores, and file systems without locks, are not
    locked. wait: called in that case instead; then the lock is waited for.
    """
    if "://" in str(folder):
        yield
        return
    path = folder / lock
    while True:
        file = open(path, "a+")  # noqa: SIM115 - held longer than this block
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if wait is None:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                file.close()
                raise UsageError(
                    f"{folder} is being written by {holder}; wait until it has ended, or choose another folder"
                ) from None
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            break
        # The previous holder may have removed the file after it was opened here: then the lock is on another file.
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
            with suppress(OSError):  # the disk may have become read-only
                path.unlink(missing_ok=True)
