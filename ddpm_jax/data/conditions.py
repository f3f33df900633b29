"""Conditions: a picture that comes with each image and that the network is given beside x_t (SR3, Saharia et al. 2021).

It is computed from the image itself, or is one of a pair. It may be smaller than the image; the network is given it brought to
the image's size. A paired condition is stored as further channels of its image, so it follows it through every cache, order,
flip and turn. To add a kind that is computed, write a function and add it to `CONDITIONS`.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import digest
from ddpm_jax.data.pictures import DecodedPictures, PictureError, Pictures, upright_size
from ddpm_jax.data.pixels import Pixels

Images = Float[Array, "B H W C"]
LUMA = (0.299, 0.587, 0.114)  # as in pictures.py


def grey(x_0: Images) -> Images:
    """The luma of RGB images, (B, H, W, 1): colourisation."""
    if x_0.shape[-1] != len(LUMA):
        raise UsageError(f"data.condition=grey is of RGB images, got data.channels={x_0.shape[-1]}; use 3 channels")
    return (x_0 * jnp.asarray(LUMA, x_0.dtype)[None, None, None, :]).sum(axis=-1, keepdims=True)


def downsample(x_0: Images, *, factor: int) -> Images:
    """The means of squares of factor x factor pixels, (B, H / factor, W / factor, C): super-resolution."""
    B, H, W, C = x_0.shape
    if H % factor or W % factor:
        raise UsageError(
            f"data.condition=downsample{factor} needs sides that {factor} divides, got images of {H} x {W}; change "
            "data.image_size"
        )
    return x_0.reshape(B, H // factor, factor, W // factor, factor, C).mean(axis=(2, 4))


PAIRED = "paired"
# By name: images in [-1, 1] -> their conditions, of the same size or smaller; None where nothing is computed.
CONDITIONS: dict[str, Callable[[Images], Images] | None] = {
    "none": None,
    PAIRED: None,
    "grey": grey,
    "downsample2": functools.partial(downsample, factor=2),
    "downsample4": functools.partial(downsample, factor=4),
    "downsample8": functools.partial(downsample, factor=8),
}


@dataclass(frozen=True)
class Conditioning:
    """What the conditions of an experiment are.

    Attributes:
        compute: Images in [-1, 1] -> their conditions; None: they are paired.
        shape: (h, w, K) of a condition as it is stored.
        image_shape: (H, W, C) of an image.
        pixels: How both are stored.
    """

    compute: Callable[[Images], Images] | None
    shape: tuple[int, int, int]
    image_shape: tuple[int, int, int]
    pixels: Pixels

    def split(self, rows: Any) -> tuple[Shaped[Array, "B H W C"], Shaped[Array, "B h w K"]]:
        """Images and conditions, as they are stored, of a source's rows (B, H, W, D) (`Source.rows`)."""
        C = self.image_shape[-1]
        if self.compute is None:
            return rows[..., :C], rows[..., C:]
        # As a file would hold them, so that conditions of pictures that are given later are of the same values.
        return rows, self.pixels.from_network(self.compute(self.pixels.to_network(rows)))

    def to_network(self, conditions: Shaped[Array, "B h w K"]) -> Float[Array, "B H W K"]:
        """Stored conditions as the network is given them: around [-1, 1], bicubic where they are brought to the images' size."""
        x, size = self.pixels.to_network(conditions), (*self.image_shape[:2], self.shape[-1])
        return x if x.shape[1:] == size else jax.vmap(lambda each: jax.image.resize(each, size, "bicubic"))(x)


def conditioning_of(data: DataConfig) -> Conditioning | None:
    """The conditions that a config describes, if any. Raises UsageError if its images cannot have them."""
    if data.condition == "none":
        return None
    compute, image_shape = CONDITIONS[data.condition], (*data.size, data.channels)
    if compute is None:
        shape = (*data.size, data.condition_channels or data.channels)
    else:
        _, h, w, K = jax.eval_shape(compute, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)).shape
        shape = h, w, K
    return Conditioning(compute, shape, image_shape, Pixels(data.value_range))


def source_of_conditions(data: DataConfig, name: str) -> DataConfig:
    """The config that opens pictures or arrays as conditions of a run, of their size and channels."""
    conditioning = conditioning_of(data)
    assert conditioning is not None
    h, w, K = conditioning.shape
    return replace(data, source=name, image_size=(h, w), channels=K, condition="none", on_bad_image="stop")


# ---- Pairs


class Joined:
    """Images and their conditions as one array (N, H, W, C + K), joined at each read."""

    def __init__(self, images: np.ndarray | DecodedPictures, conditions: np.ndarray | DecodedPictures):
        self._parts = images, conditions
        self.shape = (*images.shape[:3], images.shape[3] + conditions.shape[3])
        self.dtype = images.dtype
        self.nbytes = images.nbytes + conditions.nbytes

    def __len__(self) -> int:
        """The number of images."""
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> Shaped[np.ndarray, "n H W D"]:
        """The rows at these indices. Raises PictureError if a picture cannot be decoded."""
        return np.concatenate([part[indices] for part in self._parts], axis=-1)


def in_order_of(images: Pictures, conditions: Pictures, source: str) -> Pictures:
    """The conditions in the order of the images with the same names, their endings apart. source: the conditions'.

    Raises UsageError if an image has no condition, or more than one. Reading a condition raises PictureError if its aspect is not
    its image's: both are cut around their centres, and would no longer show the same.
    """
    stems = [os.path.splitext(name)[0] for name in conditions.names]
    places = {stem: i for i, stem in enumerate(stems)}
    for name in images.names:
        if (stem := os.path.splitext(name)[0]) not in places:
            raise UsageError(
                f"{source} has no condition for the image {name}, expected a picture named {stem}; add it, or remove the image"
            )
    chosen = [places[os.path.splitext(name)[0]] for name in images.names]
    twice = Counter(stems)
    for i in chosen:
        if twice[stems[i]] > 1:
            raise UsageError(f"{source} has {twice[stems[i]]} conditions named {stems[i]}; leave one of them")
    names = [conditions.names[i] for i in chosen]

    def read(i):
        content = conditions.read(chosen[i])
        _check_aspects(images.names[i], upright_size(images.read(i)), names[i], upright_size(content))
        return content

    return replace(
        conditions,
        names=names,
        read=read,
        labels=lambda: None,
        identity=conditions.identity | {"order": digest(chosen)},
        stamp=digest([conditions.stamp, images.stamp, images.identity]),  # since images may change, and are compared
    )


def _check_aspects(image: str, size: tuple[int, int], condition: str, of_condition: tuple[int, int]) -> None:
    """Raises PictureError if the aspects of an image and its condition differ by more than a pixel of the smaller one."""
    (W, H), (w, h) = size, of_condition
    if abs(W * h - w * H) > max(W, H, w, h):
        reason = f"its {w} x {h} pixels have another aspect than the {W} x {H} of the image {image}"
        raise PictureError(
            condition,
            reason,
            f"the condition {condition} does not fit: {reason}; cut or turn one of them to the other's aspect",
        )
