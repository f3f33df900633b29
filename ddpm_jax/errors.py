"""The two kinds of failure that a person is told in one sentence: what was got, what was expected, what to do."""


class UsageError(ValueError):
    """Something the user can put right: an option, a path, a file. The scripts end with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: a loss that is not finite, a full disk. The scripts end with exit code 1."""


def first_line(error: BaseException) -> str:
    """What an error of another library says first, or its kind if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
