"""Conversion between 8-bit pixels and the network's range: x / 127.5 - 1, in [-1, 1] (section 3.3)."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def from_uint8(images: Any, dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Pixels 0..255 as x / 127.5 - 1."""
    return jnp.asarray(images).astype(dtype) / 127.5 - 1.0


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Pixels of [-1, 1] as round((x + 1) 127.5), clipped to 0..255."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
