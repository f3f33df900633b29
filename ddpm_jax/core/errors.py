"""The two kinds of failure that end a command with one sentence: what it got, what it expected, what to do."""

import contextlib
import importlib
import os
import sys
from typing import Any


class UsageError(ValueError):
    """Something the user can correct: an option, a path, a file. The commands end with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot continue: a loss that is not finite, a full disk. The commands end with exit code 1."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def import_extra(module: str, extra: str, what: str, otherwise: str = "") -> Any:
    """Imports a module of an optional extra. what: the subject of the sentence. otherwise: what to do instead.

    Raises UsageError if it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        instead = f", or {otherwise}" if otherwise else ""
        raise UsageError(
            f'{what} needs {module}, which cannot be imported ({first_line(error)}); pip install "ddpm-jax[{extra}]"{instead}'
        ) from None


def program() -> str:
    """What was called, for messages and help: train.py, or ddpm-jax train."""
    return os.path.basename(sys.argv[0])


def say(message: str, *, before: str = "\n") -> None:
    """Writes a line to standard error, bypassing Python's buffers, whose lock an interrupted thread may hold.

    before: written first; the default ends the line of a progress bar.
    """
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{before}{program()}: {message}.\n".encode())
