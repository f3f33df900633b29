"""The cycles that the TPU compiler expects of a program, read off its text: its estimate for each instruction it has scheduled.

With them the compiler chooses between kernels. They are its own model of the chip, and no measurement.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

from ddpm_jax.benchmark.hlo import Line, parse, shape_of
from ddpm_jax.benchmark.parts import part_of

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->\w+")
_WINDOW = re.compile(r"window=\{size=([\dx]+)([^}]*)")
_DILATED = re.compile(r"lhs_dilate=([\dx]+)")


class Product(NamedTuple):
    """Convolutions and products of matrices that are alike.

    what: their part of the step, and the shapes of both operands and the result. number: how many there are. gflops, cycles: of
    all of them.
    """

    what: str
    number: int
    gflops: float
    cycles: int


def cycles(hlo: str) -> dict[str, int]:
    """The cycles that are expected by part of the step, the most first; a loop's body counts once."""
    parts: Counter[str] = Counter()
    for found in parse(hlo).scheduled():
        for line in found:
            if expected := _CYCLES.search(line.rest):
                parts[part_of(line.op_name)] += int(expected[1])
    return dict(parts.most_common())


def products(hlo: str) -> list[Product]:
    """The convolutions and products of matrices of a program with the cycles of their fusions, the costliest first."""
    program, found = parse(hlo), dict[str, Product]()
    for computation in program.scheduled():
        for line in computation:
            expected = _CYCLES.search(line.rest)
            if expected and int(expected[1]) and (inside := _products_of(program.called(line) or computation, line)):
                what = "; ".join(said for said, _ in inside)
                old = found.get(what, Product(what, 0, 0.0, 0))
                gflops = sum(flops for _, flops in inside) / 1e9
                found[what] = Product(what, old.number + 1, old.gflops + gflops, old.cycles + int(expected[1]))
    return sorted(found.values(), key=lambda product: -product.cycles)


def _products_of(computation: list[Line], line: Line) -> list[tuple[str, float]]:
    """What an instruction multiplies, and its FLOPs. XLA writes a product of matrices as a convolution too.

    computation: what it calls, or lies in.
    """
    types, told = {one.name: one.type for one in computation}, []
    for one in [line] if line in computation else computation:
        labels = _LABELS.search(one.rest)
        if one.op != "convolution" or not labels:
            continue
        first, second = (shape_of(types[name]) for name in one.operands)
        window, result = _WINDOW.search(one.rest), shape_of(one.type)
        # A batched product is a convolution whose window runs over the batch; it takes one place of it each.
        batched = "dot_general" in one.op_name
        places = 1.0
        if window and not batched:
            dilated = _DILATED.search(window[2])  # zeros between the entries of a stride's gradient, which are no work
            places = _places(window[1]) / (_places(dilated[1]) if dilated else 1.0)
        flops = 2.0 * math.prod(result) * second[labels[1].index("i")] * places
        told.append((f"{part_of(one.op_name)}: {first} x {second} -> {result}", flops))
    return told


def _places(sizes: str) -> float:
    """The places of a window: 3x3 -> 9."""
    return float(math.prod(int(n) for n in sizes.split("x")))
