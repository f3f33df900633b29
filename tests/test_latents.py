"""The chain's intermediate latents: the paper's Figures 6 to 8, starting from a noised image, inpainting."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import SHAPE, mixture_x_0, model_of

from ddpm_jax import make_schedule, q_sample
from ddpm_jax.core import rng
from ddpm_jax.diffusion.process import Process
from ddpm_jax.sampling import choose_steps, make_sampler, reverse, sample_loop
from ddpm_jax.sampling.inpainting import _walk, inpaint
from ddpm_jax.sampling.latents import (
    interpolate,
    make_chain,
    progressive_generation,
    shared_latents,
    start_row,
)

SCHEDULE = make_schedule("linear", T=40, beta_start=2e-3, beta_end=0.4)
MODEL = model_of(mixture_x_0, SCHEDULE)
KEY = jax.random.key(0)


def chain_of(sampler):
    return make_chain(sampler, MODEL, KEY, image_shape=SHAPE)


@pytest.fixture(scope="module")
def images():
    return sample_loop(make_sampler(Process(SCHEDULE)), MODEL, KEY, jnp.arange(5), image_shape=SHAPE)


def test_progressive_generation_shows_predictions_and_ends_with_the_images(images):
    seen = progressive_generation(chain_of(make_sampler(Process(SCHEDULE))), jnp.arange(5), count=4)
    np.testing.assert_array_equal(seen.t, [39, 26, 13, 0])
    np.testing.assert_allclose(seen.images, images, atol=1e-6)
    x_T = rng.image_normal(rng.image_keys(KEY, jnp.arange(5)), 0, SHAPE)
    np.testing.assert_allclose(seen.x_0[0], mixture_x_0(SCHEDULE, x_T, jnp.full(5, 39)).clip(-1, 1), atol=1e-4)
    away = [float(jnp.abs(x_0 - images).mean()) for x_0 in seen.x_0]
    assert away[0] > away[2] > away[3]  # the prediction closes in on the image


def test_progressive_generation_of_fewer_rows_than_asked_for_shows_each_once():
    sampler = make_sampler(Process(SCHEDULE), "ddim", steps=5)
    seen = progressive_generation(chain_of(sampler), jnp.arange(2))
    np.testing.assert_array_equal(seen.t, [39, 29, 20, 10, 0])
    np.testing.assert_allclose(seen.x_0[-1], seen.images, atol=1e-6)
    assert all(jnp.abs(x_0).max() > 0 for x_0 in seen.x_0)


def test_shared_latents_begin_with_the_image_itself_and_share_more_the_later_they_part(images):
    spread = []
    for t in (39, 20, 5, 1):
        together = shared_latents(chain_of(make_sampler(Process(SCHEDULE))), 2, t=t, count=40)
        np.testing.assert_allclose(together[0], images[2], atol=1e-5)
        spread.append(float(together.std(axis=0).mean()))
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] < 0.2 * spread[0]


def test_a_noised_image_comes_back_like_itself_from_little_noise():
    x_0 = jnp.asarray([-0.6, 0.1, 0.7, 0.1]).reshape(1, *SHAPE) * jnp.ones((30, 1, 1, 1))
    away = []
    for t in (2, 15, 39):
        chain = chain_of(make_sampler(Process(SCHEDULE)))
        (back,) = interpolate(chain, SCHEDULE, jnp.arange(30), x_0, x_0, t=t, fractions=(0.0,))
        away.append(float(jnp.abs(back - x_0).mean()))
    assert away == sorted(away)
    assert away[0] < 0.2
    assert away[2] > 0.4


def test_interpolation_goes_from_one_image_to_the_other_in_x_t():
    x_0, other = (jnp.full((2, *SHAPE), v) for v in (-0.6, 0.7))
    images = interpolate(
        chain_of(make_sampler(Process(SCHEDULE))),
        SCHEDULE,
        jnp.arange(2),
        x_0,
        other,
        t=15,
        fractions=(0.0, 0.5, 1.0),
    )
    assert images.shape == (3, 2, *SHAPE)
    # By hand: both x_t in these shares, decoded over the last rows with the noise of images 0 and 1.
    level = jnp.full(2, 15)
    noises = [rng.image_normal(rng.image_keys(KEY, jnp.arange(i, i + 2)), 0, SHAPE) for i in (0, 2)]
    a, b = (q_sample(SCHEDULE, x, level, eps) for x, eps in zip((x_0, other), noises, strict=True))
    for f, image in zip((0.0, 0.5, 1.0), images, strict=True):
        x_t = (1 - f) * a + f * b
        by_hand, _ = reverse(make_sampler(Process(SCHEDULE)), MODEL, KEY, jnp.arange(2), x_t, rows=slice(24, None))
        np.testing.assert_allclose(image, by_hand, atol=1e-5)


def test_a_chain_starts_at_the_noisiest_step_that_is_at_most_t():
    sampler = make_sampler(Process(SCHEDULE), "ddim", steps=5)
    np.testing.assert_array_equal(sampler.rows["t"], [39, 29, 20, 10, 0])
    assert [start_row(sampler, t) for t in (39, 38, 20, 0)] == [0, 1, 2, 4]
    with pytest.raises(ValueError, match="got t = 4, expected at least 10"):
        start_row(dataclasses.replace(sampler, rows={"t": np.array([20, 10])}), 4)


def test_a_sampler_that_looks_back_cannot_start_anywhere():
    with pytest.raises(ValueError, match="looks back"):
        progressive_generation(chain_of(make_sampler(Process(SCHEDULE), "dpm++2m")), jnp.arange(2))


# ---- Inpainting


def test_the_walk_goes_back_as_often_as_asked_and_ends_at_the_clean_image():
    i, back = _walk(10, jump=3, times=2)
    assert i[0] == 9
    assert i[-1] == 0
    for k in range(len(i) - 1):
        assert i[k + 1] == i[k] - 1 + back[k]
    assert back[-1] == 0
    assert set(np.flatnonzero(back) * 0 + back[back > 0]) == {3}
    assert sorted(i[back > 0] - 1) == [0, 3, 6]  # once at every third level
    assert (_walk(10, jump=3, times=1)[1] == 0).all()
    np.testing.assert_array_equal(_walk(10, jump=3, times=1)[0], np.arange(10)[::-1])


def correlated_model(rho, std):
    """Two neighbouring pixels, N(0, std^2) each, with correlation rho: the exact eps."""

    def model(x_t, t):
        signal, noise = (
            jnp.asarray(a, x_t.dtype)[t][:, None, None, None]
            for a in (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
        )
        both = jnp.concatenate([x_t.sum(1, keepdims=True), x_t[:, :1] - x_t[:, 1:]], axis=1) / jnp.sqrt(2.0)
        variance = std**2 * jnp.asarray([1 + rho, 1 - rho]).reshape(1, 2, 1, 1)
        scaled = noise * both / (signal**2 * variance + noise**2)
        return jnp.concatenate([scaled.sum(1, keepdims=True), scaled[:, :1] - scaled[:, 1:]], axis=1) / jnp.sqrt(2.0)

    return model


def test_inpainting_keeps_what_is_known_and_fills_in_what_belongs_to_it():
    """Given one of two correlated pixels the other comes near its conditional distribution, by going back much nearer."""
    rho, std, n = 0.9, 0.3, 500
    known = jnp.full((n, 2, 1, 1), 0.4)
    mask = jnp.asarray([1.0, 0.0]).reshape(1, 2, 1, 1) * jnp.ones((n, 1, 1, 1))
    errors = []
    for times in (1, 5):
        sampler = inpaint(
            Process(SCHEDULE, variance="fixed_small"),
            np.arange(SCHEDULE.T),
            known,
            mask,
            jump=1,
            times=times,
            clip=False,
        )
        x = sample_loop(sampler, correlated_model(rho, std), KEY, jnp.arange(n), image_shape=(2, 1, 1))
        np.testing.assert_array_equal(x[:, 0], known[:, 0])
        errors.append(abs(float(x[:, 1].mean()) - rho * 0.4))
    assert errors[1] < 0.5 * errors[0]
    assert abs(float(x[:, 1].std()) / (std * np.sqrt(1 - rho**2)) - 1) < 0.2


def test_inpainting_of_a_part_of_the_steps_takes_the_known_pixels_too():
    known, mask = jnp.full((3, *SHAPE), 0.7), jnp.zeros((3, 2, 2, 1)).at[:, 0].set(1.0)
    sampler = inpaint(Process(SCHEDULE), choose_steps(SCHEDULE, 10), known, mask, jump=2, times=2)
    x = sample_loop(sampler, MODEL, KEY, jnp.arange(3), image_shape=SHAPE)
    np.testing.assert_array_equal(x[:, 0], known[:, 0])
    assert jnp.isfinite(x).all()
    with pytest.raises(ValueError, match="got jump = 0"):
        inpaint(Process(SCHEDULE), np.arange(40), known, mask, jump=0)
    with pytest.raises(ValueError, match="got jump = 10 with 10 steps, expected less, or times = 1"):
        inpaint(Process(SCHEDULE), choose_steps(SCHEDULE, 10), known, mask)
    assert len(inpaint(Process(SCHEDULE), choose_steps(SCHEDULE, 10), known, mask, times=1)) == 10
    assert len(inpaint(Process(SCHEDULE), choose_steps(SCHEDULE, 10), known, mask, jump=9)) == 10 + 9 * 9
