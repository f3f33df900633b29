"""Stored values and the network's range: 8 bits as in the paper, float32 by a declared range, and both as pictures."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.data.pixels import EIGHT_BITS, Pixels
from ddpm_jax.data.sheets import beside, grid

LEVELS = np.arange(256, dtype=np.uint8)
RANGES = [(0, 1), (-1, 1), (0, 65535), (-1024.0, 3071.0), (1e-30, 3e-30), (-1e30, 1e30)]


def test_8_bits_are_the_papers_and_come_back():
    x = EIGHT_BITS.to_network(LEVELS)
    np.testing.assert_allclose(x, LEVELS / 127.5 - 1, atol=1e-7)
    np.testing.assert_array_equal(EIGHT_BITS.from_network(x), LEVELS)
    assert EIGHT_BITS.to_pictures(LEVELS) is LEVELS


@pytest.mark.parametrize("value_range", RANGES)
def test_the_ends_of_a_range_become_minus_1_and_1_and_come_back(value_range):
    low, high = value_range
    values = np.linspace(low, high, 1001).astype(np.float32)
    x = Pixels(value_range).to_network(values)
    assert x.dtype == jnp.float32
    np.testing.assert_allclose(x, np.linspace(-1, 1, 1001), atol=1e-6)
    back = Pixels(value_range).from_network(x)
    assert back.dtype == jnp.float32
    np.testing.assert_allclose(back, values, atol=3e-7 * (high / 2 - low / 2), rtol=0)


def test_values_in_minus_1_to_1_pass_without_a_changed_bit():
    values = np.array([-1, -1e-30, 0, 1e-12, 1 / 3, 1], np.float32)
    pixels = Pixels((-1, 1))
    np.testing.assert_array_equal(pixels.to_network(values), values)
    np.testing.assert_array_equal(pixels.from_network(jnp.asarray(values)), values)


def test_samples_outside_are_clipped_to_the_range():
    np.testing.assert_array_equal(Pixels((2, 6)).from_network(jnp.array([-1.5, 0, 7])), [2, 4, 6])


def test_float32_is_shown_in_256_levels_of_its_range():
    values = np.array([0, 1, 257, 32768, 65535], np.float32)
    pictures = Pixels((0, 65535)).to_pictures(values)
    assert pictures.dtype == np.uint8
    assert pictures.tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize(("channels", "shown"), [(1, [0]), (2, [0]), (3, [0, 1, 2]), (4, [0, 1, 2]), (7, [0, 1, 2])])
def test_a_grid_shows_the_first_three_channels_or_the_first_one(channels, shown):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, channels), np.uint8)
    np.testing.assert_array_equal(grid(images), grid(images[..., shown]))
    assert grid(images).shape[-1] == len(shown)
    np.testing.assert_array_equal(grid(images)[:4, :6], images[0][..., shown])
    assert beside(grid(images), grid(images)).shape[-1] == len(shown)
