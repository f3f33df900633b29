"""The bytes that a compiled TPU program moves to and from HBM, read off its text.

`cost_analysis()["bytes accessed"]` counts every operand of every instruction, also those that lie in VMEM, the memory beside the
chip's cores. Here an array counts where its layout says that it lies in HBM, at the size that its tiles have there.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from ddpm_jax.benchmark.hlo import ARRAY, Line, array_bytes, parse
from ddpm_jax.benchmark.parts import part_of

# These name values and move nothing, or what they move is counted where it starts.
_FREE = {"tuple", "get-tuple-element", "bitcast", "opt-barrier", "parameter", "constant", "after-all", "partition-id"}
_FREE |= {"replica-id", "while", "conditional"}


class Instruction(NamedTuple):
    """A scheduled instruction: its opcode, the bytes it reads from HBM and writes there, and the name that JAX gave it."""

    op: str
    read: int
    written: int
    op_name: str


def hbm_bytes(type_: str) -> int:
    """The bytes of a type's arrays that lie in HBM: those whose layout names no other memory space S(n)."""
    return sum(array_bytes(a) for a in ARRAY.finditer(type_) if not re.search(r"S\([1-9]", a["layout"] or ""))


def instructions(hlo: str) -> Iterator[Instruction]:
    """Every instruction of the scheduled program that touches HBM; those of a loop's body come once.

    A copy that starts early and ends later counts once. Without a name of its own it has that of the first use of its result.
    """
    for found in parse(hlo).scheduled():
        types = {line.name: line.type for line in found}
        users: dict[str, Line] = {}
        for line in found:
            for operand in line.operands:
                users.setdefault(operand, line)
        for line in found:
            if line.op in _FREE or line.op.endswith("-done"):
                continue
            read, result = sum(hbm_bytes(types.get(name, "")) for name in set(line.operands)), line.type
            if line.op in ("copy-start", "slice-start"):  # (result, operand, context), ((operand), result, context)
                result = [array[0] for array in ARRAY.finditer(result)][line.op == "slice-start"]
            if line.op.startswith("slice"):  # no more is read than what is kept
                read = min(read, sum(map(array_bytes, ARRAY.finditer(result))))
            written = hbm_bytes(result)
            if read or written:
                yield Instruction(line.op, read, written, _name(line, users))


def _name(line: Line, users: dict[str, Line]) -> str:
    while not line.op_name and line.name in users:
        line = users[line.name]
    return line.op_name


def traffic(hlo: str) -> dict[str, int]:
    """Bytes to and from HBM by part of the step, the largest first; a loop's body counts once."""
    parts: Counter[str] = Counter()
    for one in instructions(hlo):
        parts[part_of(one.op_name)] += one.read + one.written
    return dict(parts.most_common())
