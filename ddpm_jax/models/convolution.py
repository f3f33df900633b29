"""The U-Net's 2-D convolution, and one for training whose gradients are fast on CPU inside `lax.scan`.

XLA:CPU rewrites convolutions to its fast form only in a program's entry computation. Inside a scan over training steps, the
gradients that JAX derives are many times slower. Therefore both gradients are written here in forms that are fast everywhere on
CPU. Other platforms use JAX's gradients.
"""

import functools

import jax
from jax import lax
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x: Float[Array, "B H W C"], kernel: Float[Array, "k k C D"], stride: int) -> Float[Array, "B h w D"]:
    """Convolves images with a square kernel, TensorFlow's SAME padding (with stride 2 and even H, W: bottom and right only).

    x, kernel and the result have the same dtype.
    """
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=_LAYOUT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv_in_training(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k k C D"], stride: int
) -> Float[Array, "B h w D"]:
    """`conv` with the gradients below on CPU; differentiable in reverse mode only."""
    return conv(x, kernel, stride)


def _padding(x, kernel, stride):
    return lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), "SAME")


def _input_gradient(x, kernel, g, stride):
    """The transposed convolution: g, dilated by the stride, with the kernel flipped and its channels exchanged."""
    padding = [
        (k - 1 - low, n - 1 + low - (m - 1) * stride)
        for n, m, k, (low, _) in zip(
            x.shape[1:3], g.shape[1:3], kernel.shape[:2], _padding(x, kernel, stride), strict=True
        )
    ]
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    return lax.conv_general_dilated(
        g, flipped, (1, 1), padding, lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )


def _kernel_gradient(x, kernel, g, stride):
    """The convolution of x with g as its kernel: the images of the batch are the channels, the channels of x the images."""
    size = kernel.shape[0]
    if size == 1:  # a product of matrices
        pixels = x[:, ::stride, ::stride].reshape(-1, x.shape[-1])
        return (pixels.T @ g.reshape(-1, g.shape[-1])).reshape(kernel.shape)
    padding = [
        (low, (m - 1) * stride + size - n - low)
        for n, m, (low, _) in zip(x.shape[1:3], g.shape[1:3], _padding(x, kernel, stride), strict=True)
    ]
    images, of_g = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    gradient = lax.conv_general_dilated(
        images, of_g, (1, 1), padding, rhs_dilation=(stride, stride), dimension_numbers=_LAYOUT
    )
    return gradient.transpose(1, 2, 0, 3)


def _forward(x, kernel, stride):
    return conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, g):
    def cpu(x, kernel, g):
        return _input_gradient(x, kernel, g, stride), _kernel_gradient(x, kernel, g, stride)

    def default(x, kernel, g):
        return jax.vjp(lambda x, kernel: conv(x, kernel, stride), x, kernel)[1](g)

    return lax.platform_dependent(*residuals, g, cpu=cpu, default=default)


conv_in_training.defvjp(_forward, _backward)
