"""The loop of all samplers: one `lax.scan` over network evaluations, for any function (x_t, t) -> output.

A sampler is a table of rows, one for each network evaluation, and a function that takes x from one row to the next. The loop
draws the noise. That of image i depends on (key, i, k) alone, with k = 0 for x_T and k = 1, 2, ... for the rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.core import rng

Model = Callable[[Float[Array, "B H W C"], Int[Array, " B"]], Float[Array, "B H W D"]]


@dataclass(frozen=True)
class Sampler:
    """A sampler: rows, and step(model, x, row, noise, previous) -> (x, x_0).

    Attributes:
        rows: A pytree of host arrays, whose first axis of length S is the order of evaluation.
        step: The function of a row. x is float (B, H, W, C). `noise()` gives standard normal draws of x's shape, and `noise(1)`,
            `noise(2)`, ... give others. `previous` holds the x_0 of the last `memory` rows, newest first, zeros before the
            first. It returns the next x and the predicted x_0.
        memory: The number of earlier x_0 that step uses.
        order: Of convergence to the solution of the probability-flow ODE, if no noise is drawn after x_T; else None. The tests
            hold each sampler to it.
    """

    rows: Any
    step: Callable[[Model, Array, Any, Callable[..., Array], tuple[Array, ...]], tuple[Array, Array]]
    memory: int = 0
    order: int | None = None

    def __len__(self) -> int:
        """The number of rows, that is of network evaluations."""
        return len(jax.tree.leaves(self.rows)[0])


class Watched(NamedTuple):
    """Intermediate results (rows watched, B, H, W, C): x after each row, and the x_0 predicted in it."""

    x: Float[Array, "n B H W C"]
    x_0: Float[Array, "n B H W C"]


def draw_x_T(key: Key[Array, ""], indices: Int[Array, " B"], image_shape: tuple[int, int, int]) -> Array:
    """x_T ~ N(0, I) of each image: draw k = 0; float32 (B, H, W, C)."""
    return rng.image_normal(rng.image_keys(key, indices), 0, image_shape)


def reverse(
    sampler: Sampler,
    model: Model,
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    x: Float[Array, "B H W C"],
    *,
    rows: slice = slice(None),
    watch: Sequence[int] = (),
) -> tuple[Float[Array, "B H W C"], Watched]:
    """Runs x through a sampler's rows; returns x, and the intermediate results at the rows `watch`, in their order.

    A row's noise does not depend on `rows`, so a chain may be run in parts.

    Args:
        sampler: The sampler.
        model: Any function (x_t, t) -> output.
        key: The key of all draws.
        indices: The images' global indices, int (B,), which select their noise.
        x: The start.
        rows: The rows to run; default all.
        watch: Rows whose results are returned.

    Raises:
        ValueError: If a sampler with memory does not start at row 0, or a row of `watch` is not run, or occurs twice.
    """
    numbers = np.arange(len(sampler))[rows]
    if sampler.memory and len(numbers) and numbers[0] != 0:
        raise ValueError(f"got a part from row {numbers[0]} on, but this sampler looks back: start at row 0")
    slots = np.full(len(sampler), len(watch))  # out of range: such a write is dropped
    slots[list(watch)] = np.arange(len(watch))
    if len({*watch} & {*numbers.tolist()}) < len(watch):
        raise ValueError(
            f"got rows {list(watch)} to watch, expected some of the {len(numbers)} that are run, each once"
        )
    keys = rng.image_keys(key, indices)

    def body(carry, number_slot_row):
        x, previous, seen = carry
        number, slot, row = number_slot_row
        x, x_0 = sampler.step(model, x, row, _noise(sampler, keys, number, x), previous)
        if len(watch):
            seen = Watched(seen.x.at[slot].set(x, mode="drop"), seen.x_0.at[slot].set(x_0, mode="drop"))
        return (x, (x_0, *previous)[: sampler.memory], seen), None

    nothing_seen = Watched(*(jnp.zeros((len(watch), *x.shape), x.dtype) for _ in range(2)))
    carry = x, (jnp.zeros_like(x),) * sampler.memory, nothing_seen
    scanned = (jnp.asarray(numbers, jnp.int32), jnp.asarray(slots[numbers], jnp.int32), _table(sampler, numbers, x))
    (x, _, seen), _ = jax.lax.scan(body, carry, scanned)
    return x, seen


def advance(
    sampler: Sampler,
    model: Model,
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    x: Float[Array, "B H W C"],
    first: Int[Array, ""] | int,
    last: Int[Array, ""] | int,
) -> tuple[Float[Array, "B H W C"], Float[Array, "B H W C"]]:
    """x after the rows first .. last - 1, and the x_0 predicted in the last of them.

    first and last may be traced, unlike the rows of `reverse`, so one compiled program serves any part of a chain. Raises
    ValueError for a sampler with memory.
    """
    if sampler.memory:
        raise ValueError("got a sampler that looks back, expected one that can start anywhere; use ancestral or ddim")
    keys, table = rng.image_keys(key, indices), _table(sampler, slice(None), x)

    def step(number, carry):
        row = jax.tree.map(lambda a: a[number], table)
        return sampler.step(model, carry[0], row, _noise(sampler, keys, number, x), ())

    return jax.lax.fori_loop(first, last, step, (x, jnp.zeros_like(x)))


def _noise(sampler: Sampler, keys: Key[Array, " B"], number: Any, x: Array) -> Callable[..., Array]:
    """The draws of row `number`: `noise()`, `noise(1)`, ...."""
    return lambda j=0: rng.image_normal(keys, 1 + number + j * len(sampler), x.shape[1:], x.dtype)


def _table(sampler: Sampler, rows: Any, x: Array) -> Any:
    """These rows as device arrays: floats in x's dtype, and int32."""

    def one(a):
        a = np.asarray(a)[rows]
        return jnp.asarray(a, x.dtype if np.issubdtype(a.dtype, np.floating) else jnp.int32)

    return jax.tree.map(one, sampler.rows)


def sample_loop(
    sampler: Sampler, model: Model, key: Key[Array, ""], indices: Int[Array, " B"], *, image_shape: tuple[int, int, int]
) -> Float[Array, "B H W C"]:
    """Draws x_T for each image and runs it through all rows; float32, images in about [-1, 1].

    indices: the images' global indices, int (B,), which select their noise.
    """
    return reverse(sampler, model, key, indices, draw_x_T(key, indices, image_shape))[0]
