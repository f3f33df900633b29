"""Power-function averages: their profiles against quadrature, their updates and rebuilding against sums over all steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import WIDTH, TrainConfig
from ddpm_jax.training.ema import update_averages
from ddpm_jax.training.posthoc import Profile, fit, gamma_of, inner
from ddpm_jax.training.weights import tracked

STEPS = 4000
NODES, QUADRATURE = np.polynomial.legendre.leggauss(400)  # on [-1, 1]


def density(profile, tau):
    """The profile's values by its definition."""
    p = (profile.gamma + 1) / profile.t * (tau / profile.t) ** profile.gamma
    return np.where(tau <= profile.t, p, 0.0)


def integral(f, t):
    return QUADRATURE @ f(t * (NODES + 1) / 2) * t / 2


def shares(profile, steps=STEPS):
    """The share of each step's parameters in an average: the integrals of its profile between steps."""
    ends = np.minimum(np.arange(steps + 1) / profile.t, 1)
    return np.diff(ends ** (profile.gamma + 1))


def test_the_papers_exponents():
    """Karras et al. 2024 use gamma = 16.97 and 6.94 for the widths 0.05 and 0.10."""
    assert round(gamma_of(0.05), 2) == 16.97
    assert round(gamma_of(0.10), 2) == 6.94


@pytest.mark.parametrize("width", [WIDTH.low, 0.01, 0.05, 0.1, 0.2, WIDTH.high])
def test_the_width_is_the_profiles_standard_deviation(width):
    """Over the last 40 widths, outside of which a narrow profile is nothing."""
    profile = Profile(gamma_of(width), 1.0)
    tau = 1 - min(1, 40 * width) * (1 - NODES) / 2
    p = density(profile, tau) * QUADRATURE
    p, mean = p / p.sum(), p @ tau / p.sum()
    assert np.sqrt(p @ (tau - mean) ** 2) == pytest.approx(width, rel=1e-5)
    assert profile.gamma > 0  # later parameters weigh more


def test_inner_products_are_integrals():
    profiles = [Profile(gamma_of(width), t) for width in (0.05, 0.1, 0.25) for t in (3.0, 10.0, 10.5)]
    expected = [
        [integral(lambda tau, a=a, b=b: density(a, tau) * density(b, tau), min(a.t, b.t)) for b in profiles]
        for a in profiles
    ]
    np.testing.assert_allclose(inner(profiles, profiles), expected, rtol=1e-6)


def test_updates_weigh_each_step_by_the_integral_of_the_profile(x64):
    """From the first step on, so that the initial parameters have no share."""
    options = TrainConfig(ema_widths=(0.05, 0.1, 0.25), ema_decays=(0.9,))
    walk = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 5)), axis=0)

    def step(averages, given):
        return update_averages(options, averages, *given), None

    first = {name: jnp.full(5, 1e3) for name in tracked(options)}
    last, _ = jax.lax.scan(step, first, (jnp.asarray(walk), jnp.arange(STEPS)))
    for width in options.ema_widths:
        expected = shares(Profile(gamma_of(width), STEPS)) @ walk
        np.testing.assert_allclose(last[f"width:{width}"], expected, rtol=1e-5)
    decayed = 0.1 * 0.9 ** np.arange(STEPS)[::-1] @ walk
    np.testing.assert_allclose(last["ema:0.9"], decayed, rtol=1e-5)


def test_late_updates_keep_their_digits_in_float32():
    """In float32 1 - 1/t is a multiple of 6e-8, so that at step 1,000,000 the share would be off by more than 1 %."""
    options, step = TrainConfig(ema_widths=(0.05, 0.1)), jnp.int32(999_999)
    averages = {name: jnp.zeros(1) for name in tracked(options)}
    updated = update_averages(options, averages, jnp.ones(1), step)
    for width in options.ema_widths:
        expected = -np.expm1((gamma_of(width) + 1) * np.log1p(-1e-6))
        np.testing.assert_allclose(updated[f"width:{width}"], expected, rtol=1e-6)


def test_further_decays_have_the_warmup_too():
    """The first steps' decays are 1/10 and 2/11."""
    options = TrainConfig(ema_warmup=True, ema_decays=(0.15, 0.99))
    averages = {name: jnp.zeros(1) for name in tracked(options)}
    for n in range(2):
        averages = update_averages(options, averages, jnp.ones(1), jnp.int32(n))
    np.testing.assert_allclose(averages["ema:0.15"], 1 - 0.1 * 0.15, rtol=1e-6)
    np.testing.assert_allclose(averages["ema:0.99"], 1 - 0.1 * 2 / 11, rtol=1e-6)


# ---- Rebuilding


def snapshots_of(count, widths=(0.05, 0.1)):
    return [Profile(gamma_of(w), round(STEPS * (i + 1) / count)) for i in range(count) for w in widths]


# Relative errors of the rebuilt average of a random walk by the number of snapshots, and bounds of them.
ERRORS = {8: {0.03: 2e-2, 0.07: 2e-3, 0.15: 3e-3}, 40: {0.03: 3e-4, 0.07: 2e-5, 0.15: 3e-5, 0.2: 5e-4}}
ERRORS[160] = {0.03: 6e-6, 0.07: 4e-7, 0.15: 6e-7, 0.2: 2e-5, 0.25: 8e-4}


@pytest.mark.parametrize("count", ERRORS)
def test_a_rebuilt_average_is_close_to_the_average_of_that_width(count):
    walk = np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 200)), axis=0)
    profiles = snapshots_of(count)
    averages = np.stack([shares(profile) @ walk for profile in profiles])
    for width, most in ERRORS[count].items():
        target = Profile(gamma_of(width), STEPS)
        expected = shares(target) @ walk
        found = fit(profiles, target)
        error = np.linalg.norm(found.coefficients @ averages - expected) / np.linalg.norm(expected)
        assert most / 100 < error < most, (width, error)


def test_the_error_of_a_fit_is_that_of_its_profile():
    profiles, target = snapshots_of(6), Profile(gamma_of(0.15), STEPS)
    found = fit(profiles, target)
    tau = (np.arange(200_000) + 0.5) * STEPS / 200_000
    made = sum(x * density(profile, tau) for x, profile in zip(found.coefficients, profiles, strict=True))
    left = made - density(target, tau)
    assert np.linalg.norm(left) / np.linalg.norm(density(target, tau)) == pytest.approx(found.error, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 8, 160])
def test_no_fit_has_less_error_with_the_same_sum(count):
    """Moving along any direction that keeps the sum makes the profile worse."""
    profiles, target = snapshots_of(count), Profile(gamma_of(0.13), STEPS)
    x, error = fit(profiles, target)
    gram, to_target, norm = inner(profiles, profiles), inner(profiles, [target])[:, 0], inner([target], [target])[0, 0]
    assert x.sum() == pytest.approx(1, abs=1e-9)
    for direction in np.random.default_rng(0).normal(size=(20, len(x))):
        y = x + 0.1 * (direction - direction.mean())
        assert norm - 2 * to_target @ y + y @ gram @ y > error**2 * norm


def test_parameters_that_stand_still_are_rebuilt_exactly():
    for width in (0.02, 0.15, 0.28):
        assert fit(snapshots_of(4), Profile(gamma_of(width), STEPS)).coefficients.sum() == pytest.approx(1, abs=1e-12)


def test_an_average_that_was_tracked_is_found_again():
    profiles = snapshots_of(8)
    for i, profile in enumerate(profiles):
        found = fit(profiles, profile)
        np.testing.assert_allclose(found.coefficients, np.eye(len(profiles))[i], atol=1e-9)
        assert found.error < 1e-6
