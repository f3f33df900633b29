"""The bytes that a compiled TPU program moves to and from HBM, and how well it fills the matrix unit, read off its text.

`cost_analysis()["bytes accessed"]` counts every operand of every instruction, also those that lie in VMEM, the memory beside the
chip's cores. Here an array counts where its layout says that it lies in HBM, at the size that its tiles have there.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from ddpm_jax.benchmark.parts import part_of
from ddpm_jax.core.sharding import round_up

# %add.1 = f32[8,128]{1,0:T(8,128)S(1)} add(%a, %b), ..., metadata={op_name="jit(f)/add"}
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>.+?) (?P<op>[a-z][\w-]*)\((?P<operands>[^()]*)\)(?P<rest>.*)$"
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_ARRAY = re.compile(
    r"\b(?:pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<order>[\d,]*)(?::(?P<layout>[^{}]*))?\})?"
)
_BODY = re.compile(r"\bbody=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_OPERAND = re.compile(r"%([\w.-]+)")

# These name values and move nothing, or what they move is counted where it starts.
_FREE = {"tuple", "get-tuple-element", "bitcast", "opt-barrier", "parameter", "constant", "after-all", "partition-id"}
_FREE |= {"replica-id", "while", "conditional"}


class Instruction(NamedTuple):
    """A scheduled instruction: its opcode, the bytes it reads from HBM and writes there, and the name that JAX gave it."""

    op: str
    read: int
    written: int
    op_name: str


def array_bytes(match: re.Match[str]) -> int:
    """The bytes of an array, tiles included."""
    layout, shape = match["layout"] or "", [int(n) for n in match["shape"].split(",") if n]
    tile = re.match(r"T\(([\d,]+)\)", layout)
    if tile and match["order"]:
        minor_first = zip(match["order"].split(","), reversed(tile[1].split(",")), strict=False)
        for dimension, size in ((int(d), int(n)) for d, n in minor_first):
            shape[dimension] = round_up(shape[dimension], size)
    return math.prod(shape) * max(int(match["bits"] or 8) // 8, 1)


def _shape(type_: str) -> list[int]:
    array = _ARRAY.search(type_)
    return [int(n) for n in array["shape"].split(",") if n] if array else []


def hbm_bytes(type_: str) -> int:
    """The bytes of a type's arrays that lie in HBM: those whose layout names no other memory space S(n)."""
    return sum(array_bytes(a) for a in _ARRAY.finditer(type_) if not re.search(r"S\([1-9]", a["layout"] or ""))


def _parse(hlo: str) -> tuple[str, dict[str, list[re.Match[str]]]]:
    """The name of the entry computation, and the instructions of each one."""
    computations: dict[str, list[re.Match[str]]] = defaultdict(list)
    entry, current = "", None
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = head["name"]
            entry = current if head["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(match)
    return entry, computations


def instructions(hlo: str) -> Iterator[Instruction]:
    """Every instruction of the scheduled program that touches HBM; those of a loop's body come once.

    A copy that starts early and ends later counts once. Without a name of its own it has that of the first use of its result.
    """
    entry, computations = _parse(hlo)
    todo = [entry]
    while todo:
        found = computations[todo.pop()]
        types = {match["name"]: match["type"] for match in found}
        users: dict[str, re.Match[str]] = {}
        for match in found:
            todo += _BODY.findall(match["rest"])
            todo += [name for branches in _BRANCHES.findall(match["rest"]) for name in _OPERAND.findall(branches)]
            for operand in _OPERAND.findall(match["operands"]):
                users.setdefault(operand, match)
        for match in found:
            if match["op"] in _FREE or match["op"].endswith("-done"):
                continue
            operands = set(_OPERAND.findall(match["operands"]))
            read, result = sum(hbm_bytes(types.get(name, "")) for name in operands), match["type"]
            if match["op"] in ("copy-start", "slice-start"):  # (result, operand, context), ((operand), result, context)
                result = [array[0] for array in _ARRAY.finditer(result)][match["op"] == "slice-start"]
            if match["op"].startswith("slice"):  # no more is read than what is kept
                read = min(read, sum(map(array_bytes, _ARRAY.finditer(result))))
            written = hbm_bytes(result)
            if read or written:
                yield Instruction(match["op"], read, written, _name(match, users))


def _name(match: re.Match[str], users: dict[str, re.Match[str]]) -> str:
    name = re.search(r'op_name="([^"]*)"', match["rest"])
    while not name and match["name"] in users:
        match = users[match["name"]]
        name = re.search(r'op_name="([^"]*)"', match["rest"])
    return name[1] if name else ""


def traffic(hlo: str) -> dict[str, int]:
    """Bytes to and from HBM by part of the step, the largest first; a loop's body counts once."""
    parts: Counter[str] = Counter()
    for one in instructions(hlo):
        parts[part_of(one.op_name)] += one.read + one.written
    return dict(parts.most_common())


def matrix_fill(hlo: str, width: int) -> float:
    """The share of the matrix unit's work that is not padding, over all convolutions and products of a program.

    The unit multiplies blocks of width x width, so the features that are summed over and those that come out are rounded up to
    its width. A program without any has 1.
    """
    _, computations = _parse(hlo)
    work = padded = 0.0
    for found in computations.values():
        types = {match["name"]: match["type"] for match in found}
        for match in found:
            labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", match["rest"])
            if match["op"] != "convolution" or not labels:
                continue
            kernel = _shape(types[_OPERAND.findall(match["operands"])[1]])
            result = _shape(match["type"])
            summed, out = kernel[labels[1].index("i")], result[labels[2].index("f")]
            # A batched product is written as a convolution whose window runs over the batch; it takes one place of it each.
            window = re.search(r"window=\{size=([\dx]+)", match["rest"])
            batched = re.search(r'op_name="[^"]*dot_general"', match["rest"])
            places = math.prod(int(n) for n in window[1].split("x")) if window and not batched else 1
            flops = 2.0 * math.prod(result) * summed * places
            work += flops
            padded += flops * round_up(summed, width) / summed * round_up(out, width) / out
    return work / padded if padded else 1.0
