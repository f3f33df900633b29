"""Flips and turns: what they do to an image by its own draw, which draws these are, and that off means off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spy import seen_by_the_loss
from tiny import experiment, tiny

from ddpm_jax.config import TrainConfig
from ddpm_jax.core.rng import Purpose
from ddpm_jax.training import step as training
from ddpm_jax.training.augmentation import augment

IMAGES = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
FLIP, FLIP_UD = np.arange(16) % 2 == 1, np.arange(16) // 2 % 2 == 1
TURN = np.arange(16) // 4


def by_hand(images, flip, flip_ud, turn):
    """Image by image, with NumPy's own flips and turns."""
    return np.stack(
        [
            np.rot90(np.flipud(mirrored) if u else mirrored, k)
            for mirrored, u, k in zip(
                [np.fliplr(image) if f else image for image, f in zip(images, flip, strict=True)],
                flip_ud,
                turn,
                strict=True,
            )
        ]
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("flip_ud", [False, True])
@pytest.mark.parametrize("turn", [False, True])
def test_each_image_is_changed_by_its_own_draws_where_the_option_is_on(flip, flip_ud, turn):
    options = TrainConfig(flip=flip, flip_ud=flip_ud, turn=turn)
    expected = by_hand(IMAGES, FLIP & flip, FLIP_UD & flip_ud, TURN * turn)
    np.testing.assert_array_equal(augment(options, jnp.asarray(IMAGES), FLIP, FLIP_UD, jnp.asarray(TURN)), expected)


def test_by_default_only_the_papers_flip_is_on():
    options = TrainConfig()
    assert (options.flip, options.flip_ud, options.turn) == (True, False, False)
    assert augment(TrainConfig(flip=False), IMAGES, FLIP, FLIP_UD, TURN) is IMAGES


def test_images_that_are_no_squares_are_mirrored():
    images = IMAGES[:, :6]
    drawn = augment(TrainConfig(flip_ud=True), jnp.asarray(images), FLIP, FLIP_UD, TURN)
    np.testing.assert_array_equal(drawn, by_hand(images, FLIP, FLIP_UD, 0 * TURN))


def draws_of(step, seed=0, batch=16):
    return training.draw(experiment(tiny(seed=seed)), jnp.int32(step), (batch, 8, 8, 1), None)


def test_the_draws_are_those_of_the_contract():
    def key(purpose):
        return jax.random.fold_in(jax.random.fold_in(jax.random.key(5), int(purpose)), 7)

    draws = draws_of(7, seed=5)
    np.testing.assert_array_equal(draws.flip_ud, jax.random.bernoulli(key(Purpose.FLIP_UD), shape=(16,)))
    np.testing.assert_array_equal(draws.turn, jax.random.randint(key(Purpose.TURN), (16,), 0, 4))


def test_every_turn_and_flip_is_as_frequent_and_independent_of_the_others():
    draws = [draws_of(step, batch=128) for step in range(20)]
    kinds = np.concatenate([np.asarray(d.flip * 8 + d.flip_ud * 4 + d.turn) for d in draws])
    expected = len(kinds) / 16
    chi_squared = ((np.bincount(kinds, minlength=16) - expected) ** 2 / expected).sum()
    assert chi_squared < 45  # of 15 degrees of freedom: once in 10,000


def test_the_step_augments_the_images_before_the_noise(monkeypatch):
    """The loss sees images turned by hand where the draw says so."""
    images, seen = seen_by_the_loss(tiny(train={"flip_ud": True, "turn": True}), monkeypatch, step=3)
    draws = jax.device_get(draws_of(3))
    expected = by_hand(images, draws.flip, draws.flip_ud, draws.turn)
    assert (expected != images).any()
    np.testing.assert_allclose(seen, expected.astype(np.float32) / np.float32(127.5) - 1, atol=1e-7)
