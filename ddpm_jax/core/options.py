"""What is said beside an option's type: the range of a number, the names that a text takes.

Nothing here imports JAX, so that command lines are read before it is.
"""

import sys
import typing
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ddpm_jax.core.errors import UsageError

MOST = 2**31 - 1  # the devices count in 32 bits
LAST_SEED = 2**32 - 1
Flag = tyro.conf.FlagCreatePairsOff[bool]  # off by default, and --no-NAME is not offered


@dataclass(frozen=True)
class Bounds:
    """The range of a field, or of each number of a tuple: low to high. above, below: the end itself is excluded."""

    low: float
    high: float = MOST
    above: bool = False
    below: bool = False

    def refusal(self, value: float) -> str | None:
        """What is wrong with a value, and what to do; None if it is inside."""
        inside = self.low < value if self.above else self.low <= value
        if inside and (value < self.high if self.below else value <= self.high):
            return None
        if self.above:
            return "is not a positive number"
        if self.below:
            return f"is outside of [{self.low}, {self.high}); choose a value inside"
        if value < self.low:
            return f"is too small; use {self.low} or more"
        return f"is too large; use {self.high} or less"


FRACTION = Bounds(0, 1, below=True)
POSITIVE = Bounds(0, float("inf"), above=True, below=True)


class Choices(PrimitiveConstructorSpec[str]):
    """The names that a text field takes: those of a table, also of entries added to it later.

    It is also what the command line shows, and takes, for such a field.

    Args:
        table: Module and name of the table, "ddpm_jax.sampling:SAMPLERS". It is not imported for this.
        *names: The table's names, for as long as its module has not been imported and nothing can have been added.
    """

    table: str
    names: tuple[str, ...]

    def __init__(self, table: str, *names: str):
        vars(self).update(
            table=table,
            names=names,
            nargs=1,
            instance_from_str=lambda words: words[0],
            is_instance=lambda value: value in self.choices,
            str_from_instance=lambda name: [name],
        )

    @property
    def choices(self) -> tuple[str, ...]:
        """The names; a property, so that they follow the table."""
        module, _, name = self.table.partition(":")
        return tuple(getattr(sys.modules[module], name)) if module in sys.modules else self.names

    @property
    def metavar(self) -> str:
        """The names as `--help` shows them."""
        return "{" + ",".join(self.choices) + "}"


def beside(hint: Any) -> tuple[Any, ...]:
    """What is said beside a field's type."""
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def refusals(value: Any, marks: Iterable[Any]) -> Iterator[tuple[float, str]]:
    """The numbers of a field's value that are out of its bounds, and what is wrong with each."""
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    for bounds in (mark for mark in marks if isinstance(mark, Bounds)):
        yield from ((number, refusal) for number in numbers if (refusal := bounds.refusal(number)))


def check_bounds(options: Any) -> None:
    """Raises UsageError for the first number of a command's options that is out of its bounds."""
    for name, hint in typing.get_type_hints(type(options), include_extras=True).items():
        for number, refusal in refusals(getattr(options, name), beside(hint)):
            raise UsageError(f"--{name.replace('_', '-')} {number} {refusal}")
