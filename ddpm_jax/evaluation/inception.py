"""Inception-v3 for the Fréchet Inception distance: Google's graph of 2015-12-05 with 1008 outputs, and its preprocessing."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ddpm_jax.evaluation.options import Preprocessing

SIZE = 299


class Convolution(nn.Module):
    """A convolution with bias and ReLU; the batch normalisation is folded in."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            self.features,
            self.kernel,
            strides=self.stride,
            padding=self.padding,
            precision=jax.lax.Precision.HIGHEST,
            name="conv",
        )(x)
        return nn.relu(x)


def _max_pool(x: Array, *, stride: int, padding: str) -> Array:
    return nn.max_pool(x, (3, 3), strides=(stride, stride), padding=padding)


def _average_pool(x: Array) -> Array:
    # TensorFlow does not count the padding.
    return nn.avg_pool(x, (3, 3), strides=(1, 1), padding="SAME", count_include_pad=False)


class Mixed(nn.Module):
    """Concatenates the outputs of several branches over one input."""

    branches: Callable[[Callable, Array], list[Array]]

    @nn.compact
    def __call__(self, x):
        def conv(name, features, *kernel, x, stride=1):
            return Convolution(features, kernel or (1, 1), stride, "VALID" if stride > 1 else "SAME", name=name)(x)

        return jnp.concatenate(self.branches(conv, x), axis=-1)


def _mixed_5(pool_features: int):
    def branches(conv, x):
        five = conv("branch5x5_2", 64, 5, 5, x=conv("branch5x5_1", 48, x=x))
        double = conv("branch3x3dbl_2", 96, 3, 3, x=conv("branch3x3dbl_1", 64, x=x))
        double = conv("branch3x3dbl_3", 96, 3, 3, x=double)
        return [conv("branch1x1", 64, x=x), five, double, conv("branch_pool", pool_features, x=_average_pool(x))]

    return branches


def _mixed_6a(conv, x):
    double = conv("branch3x3dbl_2", 96, 3, 3, x=conv("branch3x3dbl_1", 64, x=x))
    double = conv("branch3x3dbl_3", 96, 3, 3, x=double, stride=2)
    return [conv("branch3x3", 384, 3, 3, x=x, stride=2), double, _max_pool(x, stride=2, padding="VALID")]


def _mixed_6(inner: int):
    def branches(conv, x):
        seven = conv("branch7x7_2", inner, 1, 7, x=conv("branch7x7_1", inner, x=x))
        seven = conv("branch7x7_3", 192, 7, 1, x=seven)
        double = conv("branch7x7dbl_2", inner, 7, 1, x=conv("branch7x7dbl_1", inner, x=x))
        double = conv("branch7x7dbl_3", inner, 1, 7, x=double)
        double = conv("branch7x7dbl_4", inner, 7, 1, x=double)
        double = conv("branch7x7dbl_5", 192, 1, 7, x=double)
        return [conv("branch1x1", 192, x=x), seven, double, conv("branch_pool", 192, x=_average_pool(x))]

    return branches


def _mixed_7a(conv, x):
    three = conv("branch3x3_2", 320, 3, 3, x=conv("branch3x3_1", 192, x=x), stride=2)
    seven = conv("branch7x7x3_2", 192, 1, 7, x=conv("branch7x7x3_1", 192, x=x))
    seven = conv("branch7x7x3_3", 192, 7, 1, x=seven)
    seven = conv("branch7x7x3_4", 192, 3, 3, x=seven, stride=2)
    return [three, seven, _max_pool(x, stride=2, padding="VALID")]


def _mixed_7(pool: Callable[[Array], Array]):
    def branches(conv, x):
        three = conv("branch3x3_1", 384, x=x)
        double = conv("branch3x3dbl_2", 384, 3, 3, x=conv("branch3x3dbl_1", 448, x=x))
        return [
            conv("branch1x1", 320, x=x),
            conv("branch3x3_2a", 384, 1, 3, x=three),
            conv("branch3x3_2b", 384, 3, 1, x=three),
            conv("branch3x3dbl_3a", 384, 1, 3, x=double),
            conv("branch3x3dbl_3b", 384, 3, 1, x=double),
            conv("branch_pool", 192, x=pool(x)),
        ]

    return branches


class InceptionV3(nn.Module):
    """Features (B, 2048) and logits (B, 1008) of images (B, 299, 299, 3) in [-1, 1], float32.

    The logits have no bias, as in the definition of the Inception score. The last block uses max pooling, as the 2015 graph
    does; later versions use average pooling.
    """

    @nn.compact
    def __call__(self, x: Float[Array, "B 299 299 3"]) -> dict[str, Array]:
        x = Convolution(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Convolution(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = Convolution(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _max_pool(x, stride=2, padding="VALID")
        x = Convolution(80, name="Conv2d_3b_1x1")(x)
        x = Convolution(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x)
        x = _max_pool(x, stride=2, padding="VALID")
        for name, branches in {
            "Mixed_5b": _mixed_5(32),
            "Mixed_5c": _mixed_5(64),
            "Mixed_5d": _mixed_5(64),
            "Mixed_6a": _mixed_6a,
            "Mixed_6b": _mixed_6(128),
            "Mixed_6c": _mixed_6(160),
            "Mixed_6d": _mixed_6(160),
            "Mixed_6e": _mixed_6(192),
            "Mixed_7a": _mixed_7a,
            "Mixed_7b": _mixed_7(_average_pool),
            "Mixed_7c": _mixed_7(functools.partial(_max_pool, stride=1, padding="SAME")),
        }.items():
            x = Mixed(branches, name=name)(x)
        features = x.mean(axis=(1, 2))
        logits = nn.Dense(1008, use_bias=False, precision=jax.lax.Precision.HIGHEST, name="fc")(features)
        return {"features": features, "logits": logits}


def resize_matrix(size: int, preprocessing: Preprocessing) -> Float[np.ndarray, "299 size"]:
    """The matrix of bilinear interpolation from `size` pixels to 299, float32, without antialiasing.

    tensorflow: output i samples input i * size / 299, as TensorFlow 1 does. pytorch-fid: it samples (i + 1/2) size / 299 - 1/2,
    which aligns the pixels' centres.
    """
    places = np.arange(SIZE) * (size / SIZE)
    if preprocessing == "pytorch-fid":
        places = np.maximum((np.arange(SIZE) + 0.5) * (size / SIZE) - 0.5, 0.0)
    low = np.floor(places).astype(int)
    high, rows = np.minimum(low + 1, size - 1), np.arange(SIZE)
    matrix = np.zeros((SIZE, size))
    np.add.at(matrix, (rows, low), 1 - (places - low))
    np.add.at(matrix, (rows, high), places - low)
    return matrix.astype(np.float32)


def preprocess(images: UInt8[Array, "B H W C"], preprocessing: Preprocessing) -> Float[Array, "B 299 299 3"]:
    """Images resized and scaled for the network; a grey channel is repeated.

    tensorflow: resized as TensorFlow 1 does, then (x - 128) / 128 (the original FID, torch-fidelity). pytorch-fid: resized with
    aligned centres, then x / 127.5 - 1.
    """
    x = jnp.asarray(images, jnp.float32)
    down, across = (jnp.asarray(resize_matrix(size, preprocessing)) for size in x.shape[1:3])
    x = jnp.einsum("ih,bhwc,jw->bijc", down, x, across, precision=jax.lax.Precision.HIGHEST)
    x = jnp.broadcast_to(x, (*x.shape[:3], 3))
    return (x - 128.0) / 128.0 if preprocessing == "tensorflow" else x / 127.5 - 1.0
