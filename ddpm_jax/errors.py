"""The two kinds of failure that a person is told in one sentence: what was got, what was expected, what to do."""

import contextlib
import os
import sys


class UsageError(ValueError):
    """Something the user can put right: an option, a path, a file. The scripts end with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a full disk. The scripts end with exit code 1."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(message: str, *, before: str = "\n") -> None:
    """Writes a line to standard error past Python's buffers, which a thread that was interrupted may hold.

    before: ends the line that a progress bar may stand in.
    """
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), f"{before}{os.path.basename(sys.argv[0])}: {message}.\n".encode())
