"""The loop that all samplers share: one `lax.scan` over network evaluations, for any function (x_t, t) -> output.

A sampler is a table of rows, one for each network evaluation, and a function that takes x from one row to the next. The loop
draws the noise: image i's depends on (key, i, k) alone, k = 0 for x_T and k = 1, 2, ... for the rows in order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from ddpm_jax import rng

Model = Callable[[Float[Array, "B H W C"], Int[Array, " B"]], Float[Array, "B H W D"]]


@dataclass(frozen=True)
class Sampler:
    """A sampler: rows, and step(model, x, row, noise, previous) -> (x, x_0).

    rows: a pytree of host arrays whose first axis, length S, is the order of the steps. step takes x float (B, H, W, C), one
    row, `noise()`, which gives the step's standard normal draws of x's shape (`noise(1)`, `noise(2)`, ... are others), and the
    x_0 of the last `memory` rows, newest first (zeros where there were none); it returns the next x and the x_0 that it
    predicted. deterministic: no noise is drawn after x_T, so that x follows the probability-flow ODE. order: that of its
    convergence to the ODE's solution, if it is deterministic. The tests hold each sampler to both.
    """

    rows: Any
    step: Callable[[Model, Array, Any, Callable[..., Array], tuple[Array, ...]], tuple[Array, Array]]
    memory: int = 0
    deterministic: bool = False
    order: int | None = None

    def __len__(self) -> int:
        """The number of rows, which is that of network evaluations."""
        return len(jax.tree.leaves(self.rows)[0])


class Watched(NamedTuple):
    """What was seen on the way, (rows watched, B, H, W, C): x after each row, and the x_0 predicted at it."""

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
    """Takes x through a sampler's rows, all of them or a part: (x, what was seen at the rows `watch`, in their order).

    indices: the images' global places, int (B,), which their noise depends on. A row's noise is the same in any part, so a
    chain run in two parts is the same chain. Raises ValueError if a part leaves out rows that the sampler has to remember, or
    a row to watch is not run, or is there twice.
    """
    numbers = np.arange(len(sampler))[rows]
    if sampler.memory and len(numbers) and numbers[0] != 0:
        raise ValueError(f"got a part from row {numbers[0]} on, but this sampler looks back: start at row 0")
    slots = np.full(len(sampler), len(watch))  # one past the last: written nowhere
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

    The rows may be traced, unlike those of `reverse`: one compiled program takes a chain through any part. Raises ValueError
    for a sampler that looks back.
    """
    if sampler.memory:
        raise ValueError("got a sampler that looks back, expected one that can start anywhere; use ancestral or ddim")
    keys, table = rng.image_keys(key, indices), _table(sampler, slice(None), x)

    def step(number, carry):
        row = jax.tree.map(lambda a: a[number], table)
        return sampler.step(model, carry[0], row, _noise(sampler, keys, number, x), ())

    return jax.lax.fori_loop(first, last, step, (x, jnp.zeros_like(x)))


def _noise(sampler: Sampler, keys: Key[Array, " B"], number: Any, x: Array) -> Callable[..., Array]:
    """The draws of a row: `noise()`, `noise(1)`, ..., those of a chain that has run from its start."""
    return lambda j=0: rng.image_normal(keys, 1 + number + j * len(sampler), x.shape[1:], x.dtype)


def _table(sampler: Sampler, rows: Any, x: Array) -> Any:
    return jax.tree.map(lambda a: _to_device(np.asarray(a)[rows], x.dtype), sampler.rows)


def sample_loop(
    sampler: Sampler,
    model: Model,
    key: Key[Array, ""],
    indices: Int[Array, " B"],
    *,
    image_shape: tuple[int, int, int],
) -> Float[Array, "B H W C"]:
    """Draws x_T for each image and takes it through all of the sampler's rows; float32, images in [-1, 1].

    indices: the images' global places, int (B,), which their noise depends on.
    """
    return reverse(sampler, model, key, indices, draw_x_T(key, indices, image_shape))[0]


def _to_device(table: np.ndarray, dtype: Any) -> Array:
    """A host table in the precision of the device loop: x's, and int32."""
    return jnp.asarray(table, dtype if np.issubdtype(table.dtype, np.floating) else jnp.int32)
