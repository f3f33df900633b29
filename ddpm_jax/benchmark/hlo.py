"""Reading the text of a compiled TPU program: its scheduled instructions, and the arrays that their types name."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from ddpm_jax.core.sharding import round_up

# %add.1 = f32[8,128]{1,0:T(8,128)S(1)} add(%a, %b), ..., metadata={op_name="jit(f)/add"}
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<op>[a-z][\w-]*)\((?P<operands>[^()]*)\)(?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
ARRAY = re.compile(
    r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<order>[\d,]*)(?::(?P<layout>[^{}]*))?\})?"
)
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_CALLED = re.compile(r"\bcalls=%?([\w.-]+)")
_OPERAND = re.compile(r"%([\w.-]+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Line(NamedTuple):
    """An instruction as it is written: its name, type, opcode, the names of its operands, and what follows them."""

    name: str
    type: str
    op: str
    operands: list[str]
    rest: str

    @property
    def op_name(self) -> str:
        """The place in the program that JAX gave it; empty if there is none."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


class Program(NamedTuple):
    """The computations of a program by name, and which one it begins with."""

    entry: str
    computations: dict[str, list[Line]]

    def scheduled(self) -> Iterator[list[Line]]:
        """The computations whose instructions are carried out one by one: the entry, loops' bodies once, and branches."""
        todo = [self.entry]
        while todo:
            found = self.computations.get(todo.pop(), [])
            for line in found:
                todo += _BODY.findall(line.rest)
                todo += [name for branches in _BRANCHES.findall(line.rest) for name in _OPERAND.findall(branches)]
            yield found

    def called(self, line: Line) -> list[Line]:
        """The instructions of the computation that a fusion calls; empty for another instruction."""
        found = _CALLED.search(line.rest)
        return self.computations.get(found[1], []) if found else []


def parse(hlo: str) -> Program:
    """Reads a program's text."""
    computations: dict[str, list[Line]] = defaultdict(list)
    entry, current = "", None
    for text in hlo.splitlines():
        if head := _COMPUTATION.match(text):
            current = head["name"]
            entry = current if head["entry"] else entry
        elif text.startswith("}"):
            current = None
        elif current and (match := _INSTRUCTION.match(text)):
            operands = _OPERAND.findall(match["operands"])
            computations[current].append(Line(match["name"], match["type"], match["op"], operands, match["rest"]))
    return Program(entry, dict(computations))


def shape_of(type_: str) -> list[int]:
    """The shape of a type's first array; [] if it has none."""
    array = ARRAY.search(type_)
    return [int(n) for n in array["shape"].split(",") if n] if array else []


def array_bytes(match: re.Match[str]) -> int:
    """The bytes of an array, tiles included."""
    layout, shape = match["layout"] or "", [int(n) for n in match["shape"].split(",") if n]
    tile = re.match(r"T\(([\d,]+)\)", layout)
    if tile and match["order"]:
        minor_first = zip(match["order"].split(","), reversed(tile[1].split(",")), strict=False)
        for dimension, size in ((int(d), int(n)) for d, n in minor_first):
            shape[dimension] = round_up(shape[dimension], size)
    return math.prod(shape) * max(int(match["bits"] or 8) // 8, 1)
