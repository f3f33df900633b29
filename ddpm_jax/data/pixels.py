"""Stored values and the network's range [-1, 1]: 8 bits as x / 127.5 - 1 (section 3.3), or float32 of a declared range."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def from_uint8(images: Any, dtype: Any = jnp.float32) -> Float[Array, "*shape"]:
    """Pixels 0..255 as x / 127.5 - 1."""
    return jnp.asarray(images).astype(dtype) / 127.5 - 1.0


def to_uint8(x: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Pixels of [-1, 1] as round((x + 1) 127.5), clipped to 0..255."""
    return jnp.clip(jnp.round((x + 1.0) * 127.5), 0, 255).astype(jnp.uint8)


@dataclass(frozen=True)
class Pixels:
    """How an experiment's images are stored, and what their values become.

    Attributes:
        value_range: The lowest and the highest value of float32 images; None: uint8 images.
    """

    value_range: tuple[float, float] | None = None

    @property
    def dtype(self) -> np.dtype:
        """The type of stored images: uint8 or float32."""
        return np.dtype(np.uint8 if self.value_range is None else np.float32)

    def to_network(self, images: Any) -> Float[Array, "*shape"]:
        """Stored images in [-1, 1], float32."""
        if self.value_range is None:
            return from_uint8(images)
        low, high = self.value_range
        # Around the middle: a range of -1 to 1 then changes no bit of small values.
        return (jnp.asarray(images) - (low + high) / 2) / ((high - low) / 2)

    def from_network(self, x: Float[Array, "*shape"]) -> Array:
        """The inverse of `to_network`, clipped to the range; only uint8 images are rounded."""
        if self.value_range is None:
            return to_uint8(x)
        low, high = self.value_range
        return jnp.clip(x * ((high - low) / 2) + (low + high) / 2, low, high)

    def to_pictures(self, images: np.ndarray) -> UInt8[np.ndarray, "*shape"]:
        """Stored images as 8-bit pictures to look at: float32 ones are rounded to 256 levels of their range."""
        return np.asarray(images if self.value_range is None else to_uint8(self.to_network(images)))


EIGHT_BITS = Pixels()  # uint8 images
