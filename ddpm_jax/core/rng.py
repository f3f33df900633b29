"""Every random draw of a run: root(seed) -> stream(purpose) -> step, or image and reverse step.

    root   = jax.random.key(seed)                      threefry2x32
    stream = fold_in(root, PURPOSE)                    one stream for each purpose below
    train  : fold_in(stream, step)                     draws for the whole global batch
    sample : fold_in(fold_in(stream, image_index), k)  k = 0 draws x_T, k = 1, 2, ... the reverse steps in order

Keys are derived from the seed and never stored or split. The seed and the step (or the image index) therefore determine every
draw. See docs/reproducibility.md.
"""

import enum
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.options import LAST_SEED


class Purpose(enum.IntEnum):
    """The purpose of a stream of draws. Draws depend on these numbers: add new ones, never renumber."""

    INIT = 0
    T = 1
    EPS = 2
    DROPOUT = 3
    FLIP = 4
    SAMPLE = 5
    BOUND = 6
    LABEL_DROPOUT = 7
    FLIP_UD = 8
    TURN = 9
    FLOW = 10
    DEQUANTISE = 11


def root_key(seed: int) -> Key[Array, ""]:
    """The root key of a run: `jax.random.key(seed)` of the threefry2x32 generator.

    seed: 0 to 2**32 - 1. Raises UsageError for any other, which JAX would wrap silently.
    """
    if not 0 <= seed <= LAST_SEED:
        raise UsageError(f"got seed {seed}, expected a whole number from 0 to {LAST_SEED}; choose another")
    return jax.random.key(seed, impl="threefry2x32")


def stream(root: Key[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    """The key of one purpose, fold_in(root, purpose)."""
    return jax.random.fold_in(root, int(purpose))


def step_key(root: Key[Array, ""], purpose: Purpose, step: Int[Array, ""] | int) -> Key[Array, ""]:
    """The key of one purpose at one training step, fold_in(stream, step). `step` may be traced."""
    return jax.random.fold_in(stream(root, purpose), step)


def image_keys(key: Key[Array, ""], indices: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key for each image: fold_in(key, index), shape (B,).

    `indices` are global (in a sample set, a data set or a global batch), so an image's draws do not depend on its batch.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.asarray(indices))


def image_normal(
    keys: Key[Array, " B"], k: Int[Array, ""] | Int[Array, " B"] | int, shape: tuple[int, ...], dtype=jnp.float32
) -> Array:
    """Standard normal draws (B, *shape); image b draws from fold_in(keys[b], k). k: one for all images, or one for each."""
    # Drawn flat: the same words, but a third of the time to compile and run on CPU (jax 0.10.2).
    size = math.prod(shape)
    draw = jax.vmap(lambda key, k: jax.random.normal(jax.random.fold_in(key, k), (size,), dtype))
    return draw(keys, jnp.broadcast_to(k, keys.shape)).reshape(*keys.shape, *shape)


@functools.partial(jax.jit, static_argnums=1)
def random_bits(keys: Key[Array, " B"], shape: tuple[int, ...]) -> UInt32[Array, "B ..."]:
    """jax.random.bits(keys[b], shape) for each b; threefry2x32 keys only.

    Threefry (Salmon et al. 2011, 20 rounds) is written as elementwise operations, which XLA fuses with their consumer. JAX's
    own is a loop over whole arrays on CPU, slow to compile and to run.
    """
    words = jax.random.key_data(keys)
    if words.shape[-1] != 2:
        raise ValueError(
            f"got keys of {words.shape[-1]} words, expected the 2 words of threefry2x32; see ddpm_jax.core.rng.root_key"
        )
    first, second = words.T.reshape(2, -1, *[1] * len(shape))
    schedule = (first, second, first ^ second ^ 0x1BD11BDA)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    count = sum(
        jax.lax.broadcasted_iota(jnp.uint32, (1, *shape), 1 + axis) * stride for axis, stride in enumerate(strides)
    )
    x_0, x_1 = schedule[0], schedule[1] + count
    for i in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            x_0 = x_0 + x_1
            x_1 = x_0 ^ (x_1 << distance | x_1 >> 32 - distance)
        x_0 = x_0 + schedule[(i + 1) % 3]
        x_1 = x_1 + schedule[(i + 2) % 3] + (i + 1)
    return x_0 ^ x_1
