"""Which class each image of a set is drawn from. The class of image i depends on i alone."""

from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError

ROW = 8  # images in a row of a grid of 64
MOST_NAMED = 20

Table = Int[np.ndarray, " n"]


def label_table(words: Sequence[str], num_classes: int, names: Sequence[str] = ()) -> Table | None:
    """The labels that images take in turn: image i is of class table[i % len(table)]. None for a run without classes.

    words: numbers or names of classes; all (the default); one-per-row; or a file of one on each line. Raises UsageError for
    any other, and for words where there are no classes.
    """
    if not num_classes:
        if words:
            raise UsageError(
                "--labels needs a run with classes, but this one has none; leave it out, or train with model.num_classes"
            )
        return None
    if tuple(words) in ((), ("all",)):
        return np.arange(num_classes, dtype=np.int32)
    if tuple(words) == ("one-per-row",):
        return np.arange(num_classes, dtype=np.int32).repeat(ROW)
    if len(words) == 1 and words[0] not in names and not words[0].isdecimal():
        words = _lines(words[0], num_classes, names)
    return np.array([_label(word, num_classes, names) for word in words], np.int32)


def _lines(file: str, num_classes: int, names: Sequence[str]) -> list[str]:
    try:
        content = sharding.first_reads(epath.Path(file))
        lines = [line.strip() for line in (content or b"").decode().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        lines = []
    if not lines:
        raise UsageError(f"--labels {file} is neither a class nor a file of classes; {_expected(num_classes, names)}")
    return lines


def _label(word: str, num_classes: int, names: Sequence[str]) -> int:
    if word in names:
        return list(names).index(word)
    if word.isdecimal() and int(word) < num_classes:
        return int(word)
    raise UsageError(f"--labels has {word!r}; {_expected(num_classes, names)}")


def _expected(num_classes: int, names: Sequence[str]) -> str:
    named = f", or names such as {', '.join(names[:MOST_NAMED])}" if names else ""
    return f"give numbers from 0 to {num_classes - 1}{named}, all, one-per-row, or a file of one on each line"
