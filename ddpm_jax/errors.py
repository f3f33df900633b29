"""The two kinds of failure that a person is told in one sentence: what was got, what was expected, what to do."""

import contextlib
import importlib
import os
import sys
from typing import Any


class UsageError(ValueError):
    """Something the user can put right: an option, a path, a file. The scripts end with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a full disk. The scripts end with exit code 1."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def import_extra(module: str, extra: str, what: str, otherwise: str = "") -> Any:
    """A module of an extra of the package. what: needs it, the subject of the sentence. otherwise: what to do instead.

    Raises UsageError where it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        instead = f", or {otherwise}" if otherwise else ""
        raise UsageError(
            f'{what} needs {module}, which cannot be imported ({first_line(error)}); pip install "ddpm-jax[{extra}]"{instead}'
        ) from None


def say(message: str, *, before: str = "\n") -> None:
    """Writes a line to standard error past Python's buffers, which a thread that was interrupted may hold.

    before: ends the line that a progress bar may stand in.
    """
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{before}{os.path.basename(sys.argv[0])}: {message}.\n".encode())
