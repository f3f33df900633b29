"""The largest training batch that a device's memory holds, by compiling the train step and running nothing."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax

from ddpm_jax.benchmark.programs import Row, compile_program, image_shapes
from ddpm_jax.core import sharding
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import abstract_state, make_train_step

USABLE = 0.9  # of a device's memory; the driver, libraries and gaps between arrays take the rest
MULTIPLE = 8  # batches are multiples of it
MOST_TRIES = 4  # for one size of memory


def largest(needed: Callable[[int], float], limit: float, *, multiple: int, start: int) -> int:
    """The largest multiple whose need is within a limit, 0 if there is none; a need that was asked for once is kept by `needed`.

    The need grows nearly as a straight line: the line through the two values nearest to the limit says which one is asked next.
    """
    known = {batch: needed(batch) for batch in {multiple, max(start // multiple, 2) * multiple}}
    for _ in range(MOST_TRIES):
        a, b = sorted(known, key=lambda batch: abs(known[batch] - limit))[:2]
        slope = (known[a] - known[b]) / (a - b)
        if slope <= 0:
            break
        batch = max(int(a + (limit - known[a]) / slope) // multiple, 1) * multiple
        if batch in known:
            break
        known[batch] = needed(batch)
    return max((batch for batch in known if known[batch] <= limit), default=0)


def largest_batches(experiment: Experiment, sizes: Sequence[int]) -> Iterator[Row]:
    """The largest train.batch_size of one device for each size of its memory in GiB. Each batch that is told was compiled."""
    config = experiment.config

    @functools.cache
    def cost(batch: int) -> Row:
        train = dataclasses.replace(config.train, batch_size=batch)
        one = Experiment.from_config(dataclasses.replace(config, train=train))
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        program = make_train_step(one, mesh=mesh)
        return compile_program(program, abstract_state(one, mesh), image_shapes(one, 1), None)[1]

    multiple = MULTIPLE * config.train.accumulation
    for size in sizes:
        limit = USABLE * size * 1024
        batch = largest(
            lambda batch: cost(batch)["memory_mib"], limit, multiple=multiple, start=config.train.batch_size
        )
        labels = {"what": "largest batch", "device_gib": size, "batch": batch, "dtype": config.model.dtype}
        yield labels | (cost(batch) if batch else {})
