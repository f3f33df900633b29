import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ddpm_jax.models.convolution import conv, conv_in_training

# height, width, kernel size, stride
CASES = [
    (8, 8, 3, 1),
    (7, 6, 3, 1),
    (8, 8, 3, 2),
    (7, 10, 3, 2),
    (2, 1, 3, 2),
    (6, 7, 1, 2),
    (9, 8, 5, 2),
]
B, C, D = 2, 3, 4


def plain_conv(x, kernel, stride):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def images_kernel_and_cotangent(height, width, size, stride, dtype=np.float64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, height, width, C)).astype(dtype)
    kernel = rng.normal(size=(size, size, C, D)).astype(dtype)
    g = rng.normal(size=(B, -(-height // stride), -(-width // stride), D)).astype(dtype)
    return x, kernel, g


@pytest.mark.parametrize(("height", "width", "size", "stride"), CASES)
def test_output_and_both_gradients_match_the_plain_convolution(x64, height, width, size, stride):
    x, kernel, g = images_kernel_and_cotangent(height, width, size, stride)

    def output_and_gradients(f):
        def run(x, kernel, g):
            output, pullback = jax.vjp(lambda x, kernel: f(x, kernel, stride), x, kernel)
            return output, *pullback(g)

        return jax.jit(run)(x, kernel, g)

    for got, expected in zip(output_and_gradients(conv_in_training), output_and_gradients(plain_conv), strict=True):
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_in_a_scan_match_the_plain_convolution_outside(x64, stride):
    x, kernel, g = images_kernel_and_cotangent(6, 7, 3, stride)
    scales = jnp.array([1.0, -2.0, 0.5])

    def gradients(f, scale):
        return jax.grad(lambda x, kernel: jnp.vdot(f(scale * x, kernel, stride), g), argnums=(0, 1))(x, kernel)

    _, got = jax.jit(lambda: lax.scan(lambda carry, scale: (carry, gradients(conv_in_training, scale)), 0, scales))()
    for i, scale in enumerate(scales):
        for got_i, expected in zip(got, gradients(plain_conv, scale), strict=True):
            np.testing.assert_allclose(got_i[i], expected, rtol=1e-12, atol=1e-12)


def test_same_padding_of_even_images_is_at_the_bottom_and_right_only():
    x, *_ = images_kernel_and_cotangent(6, 8, 3, 2, np.float32)
    corner = jnp.zeros((3, 3, C, C)).at[0, 0].set(jnp.eye(C))  # picks the top left pixel of each window
    np.testing.assert_array_equal(conv(x, corner, 2), x[:, ::2, ::2])

    last = (
        jnp.zeros((3, 3, C, C)).at[2, 2].set(jnp.eye(C))
    )  # picks the bottom right one, which the padding supplies at the end
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    np.testing.assert_array_equal(conv(x, last, 2), padded[:, 2::2, 2::2])


def test_bfloat16_stays_bfloat16():
    x, kernel, g = (jnp.asarray(a, jnp.bfloat16) for a in images_kernel_and_cotangent(6, 6, 3, 1))
    output, pullback = jax.vjp(lambda x, kernel: conv_in_training(x, kernel, 1), x, kernel)
    assert [a.dtype for a in (output, *pullback(g))] == [jnp.bfloat16] * 3


# Inside a scan on CPU only convolutions of this layout are fast; on other platforms the gradients are left to XLA.
CANONICAL = "dim_numbers = [b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_each_platform_gets_its_own_gradients(platform, size, stride):
    x, kernel, _ = images_kernel_and_cotangent(6, 6, size, stride, np.float32)
    step = jax.jit(
        jax.value_and_grad(lambda kernel, x: (conv_in_training(x, kernel, stride) ** 2).sum(), argnums=(0, 1))
    )
    text = step.trace(kernel, x).lower(lowering_platforms=(platform,)).as_text()
    convolutions = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(convolutions) == (2 if (platform, size) == ("cpu", 1) else 3)
    assert all(CANONICAL in line for line in convolutions) == (platform == "cpu")
    assert ("stablehlo.dot_general" in text) == ((platform, size) == ("cpu", 1))


def test_lowered_for_several_platforms_at_once():
    x, kernel, _ = images_kernel_and_cotangent(6, 6, 3, 2, np.float32)
    step = jax.jit(jax.grad(lambda kernel, x: (conv_in_training(x, kernel, 2) ** 2).sum()))
    exported = jax.export.export(step, platforms=("cpu", "cuda", "tpu"))(kernel, x)
    np.testing.assert_allclose(exported.call(kernel, x), step(kernel, x), rtol=1e-5, atol=1e-5)
