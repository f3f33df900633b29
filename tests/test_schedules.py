"""Every schedule against its closed form, and the laws that the tables of any schedule obey."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from ddpm_jax.diffusion.schedules import BETAS, make_schedule, schedule_from_betas, snr

LENGTHS = (2, 10, 1000, 4000)
START, END = 1e-4, 0.02

names = pytest.mark.parametrize("name", BETAS)
lengths = pytest.mark.parametrize("T", LENGTHS)


def steps_from(a, b, n, i):
    """Entry i of n values equally spaced from a to b."""
    return a if n == 1 else a + (b - a) * i / (n - 1)


def cosine_f(t, T):
    """f(t) of Nichol & Dhariwal's Eq. (17)."""
    return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2


# Beta of step t = 0 .. T-1, one closed form for each schedule.
BETA = {
    "linear": lambda t, T: steps_from(START, END, T, t),
    "quad": lambda t, T: steps_from(math.sqrt(START), math.sqrt(END), T, t) ** 2,
    "const": lambda t, T: END,
    "jsd": lambda t, T: 1 / (T - t),
    "warmup10": lambda t, T: steps_from(START, END, T // 10, t) if t < T // 10 else END,
    "warmup50": lambda t, T: steps_from(START, END, T // 2, t) if t < T // 2 else END,
    "cosine": lambda t, T: min(0.999, 1 - cosine_f(t + 1, T) / cosine_f(t, T)),
    "sigmoid": lambda t, T: START + (END - START) * (1 + math.tanh(steps_from(-3, 3, T, t))) / 2,
}


@lengths
@names
def test_betas_follow_the_closed_form(name, T):
    expected = np.array([BETA[name](t, T) for t in range(T)])
    np.testing.assert_allclose(make_schedule(name, T=T).betas, expected, rtol=1e-9, atol=1e-15)


@lengths
@names
def test_every_table_follows_from_the_betas(name, T):
    schedule = make_schedule(name, T=T)
    signal, before = 1.0, 1.0  # the products of 1 - beta up to t and up to t - 1
    noise, noise_before = 0.0, 0.0  # 1 - signal, by its own recursion
    for t in range(T):
        beta = float(schedule.betas[t])
        before, noise_before = signal, noise
        signal, noise = signal * (1 - beta), noise * (1 - beta) + beta
        posterior = noise_before * beta / noise
        expected = {
            "alphas_cumprod": signal,
            "sqrt_alphas_cumprod": math.sqrt(signal),
            "sqrt_one_minus_alphas_cumprod": math.sqrt(noise),
            "log_one_minus_alphas_cumprod": math.log(noise),
            "sqrt_recip_alphas_cumprod": math.sqrt(1 / signal) if signal else math.inf,
            "sqrt_recipm1_alphas_cumprod": math.sqrt(noise / signal) if signal else math.inf,
            "posterior_variance": posterior,
            "posterior_mean_coef1": math.sqrt(before) * beta / noise,
            "posterior_mean_coef2": math.sqrt(1 - beta) * noise_before / noise,
        }
        if t >= 1:
            expected["posterior_logvar_clipped"] = math.log(posterior)
            expected["fixed_large_logvar"] = math.log(beta)
        for table, value in expected.items():
            actual = getattr(schedule, table)[t]
            assert math.isclose(actual, value, rel_tol=1e-9, abs_tol=1e-12), (table, t, actual, value)


@lengths
@names
def test_tables_are_float64_of_length_T_and_finite(name, T):
    schedule = make_schedule(name, T=T)
    assert schedule.T == T
    for field in dataclasses.fields(schedule):
        table = getattr(schedule, field.name)
        assert table.dtype == np.float64, field.name
        assert table.shape == (T,), field.name
        if "recip" in field.name:  # 1 / alphas_cumprod, where that is not 0
            table = table[schedule.alphas_cumprod > 0]
        assert np.all(np.isfinite(table)), field.name


@lengths
@names
def test_logs_stay_finite_in_float32(name, T):
    schedule = make_schedule(name, T=T)
    for table in ("log_one_minus_alphas_cumprod", "posterior_logvar_clipped", "fixed_large_logvar"):
        assert np.all(np.isfinite(getattr(schedule, table).astype(np.float32))), table


@lengths
@names
def test_t_0_has_no_predecessor(name, T):
    schedule = make_schedule(name, T=T)
    assert schedule.posterior_variance[0] == 0  # an index of t - 1 would wrap to the last alpha-bar
    assert schedule.posterior_mean_coef1[0] == pytest.approx(1, rel=1e-9)
    assert schedule.posterior_mean_coef2[0] == 0


@lengths
@names
def test_both_logvars_take_t_1s_posterior_variance_at_t_0(name, T):
    schedule = make_schedule(name, T=T)
    expected = math.log(schedule.posterior_variance[1])
    assert schedule.posterior_logvar_clipped[0] == pytest.approx(expected, rel=1e-12)
    assert schedule.fixed_large_logvar[0] == pytest.approx(expected, rel=1e-12)


@lengths
@names
def test_signal_falls_at_every_step(name, T):
    schedule = make_schedule(name, T=T)
    assert np.all(np.diff(schedule.alphas_cumprod) < 0)
    assert schedule.alphas_cumprod[0] < 1
    assert np.all(schedule.posterior_variance <= schedule.betas)
    expected = schedule.alphas_cumprod / schedule.sqrt_one_minus_alphas_cumprod**2
    np.testing.assert_allclose(snr(schedule), expected, rtol=1e-9)


def test_the_default_is_the_papers_schedule():
    schedule = make_schedule("linear")
    assert schedule.T == 1000
    assert schedule.betas[0] == 1e-4
    assert schedule.betas[-1] == 0.02
    assert schedule.alphas_cumprod[-1] == pytest.approx(4.0358e-05, rel=2e-5)
    # Second step, by hand: beta_2 = 1e-4 + 0.0199 / 999, posterior variance beta_2 * beta_1 / (beta_1 + beta_2 - both).
    beta_2 = 1e-4 + 0.0199 / 999
    expected = beta_2 * 1e-4 / (1e-4 + beta_2 - 1e-4 * beta_2)
    assert schedule.posterior_variance[1] == pytest.approx(expected, rel=1e-9)


@lengths
def test_jsd_loses_the_signal_linearly_and_all_of_it(T):
    schedule = make_schedule("jsd", T=T)
    np.testing.assert_allclose(schedule.alphas_cumprod, 1 - np.arange(1, T + 1) / T, rtol=1e-9, atol=0)
    assert schedule.betas[-1] == 1
    assert schedule.alphas_cumprod[-1] == 0


@lengths
def test_cosine_signal_is_f_where_beta_is_not_capped(T):
    schedule = make_schedule("cosine", T=T)
    expected = [cosine_f(t + 1, T) / cosine_f(0, T) for t in range(T - 1)]
    np.testing.assert_allclose(schedule.alphas_cumprod[:-1], expected, rtol=1e-9)
    assert np.all(schedule.betas[:-1] < 0.999)
    assert schedule.betas[-1] == 0.999


def test_end_points_are_options():
    for name in ("linear", "quad", "warmup50"):
        schedule = make_schedule(name, T=20, beta_start=0.01, beta_end=0.3)
        assert schedule.betas[0] == pytest.approx(0.01, rel=1e-12)
        assert schedule.betas[-1] == pytest.approx(0.3, rel=1e-12)


def test_own_betas_give_own_tables():
    schedule = schedule_from_betas([0.5, 0.25])
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.5, 0.375])
    np.testing.assert_allclose(schedule.posterior_variance, [0, 0.5 * 0.25 / 0.625])


@pytest.mark.parametrize("beta", [1e-10, 1e-17, 1e-200])
def test_betas_near_0_keep_every_log_finite(beta):
    schedule = schedule_from_betas([beta, beta, beta])
    # To first order 1 - alpha-bar is t beta, and 1 - alpha-bar rounds to 0 if taken as a difference.
    np.testing.assert_allclose(schedule.log_one_minus_alphas_cumprod, np.log([1, 2, 3]) + math.log(beta), rtol=1e-9)
    np.testing.assert_allclose(schedule.posterior_variance[1:] / beta, [1 / 2, 2 / 3], rtol=1e-9)
    np.testing.assert_allclose(snr(schedule) * beta, [1, 1 / 2, 1 / 3], rtol=1e-9)


def test_schedule_is_a_pytree():
    schedule = make_schedule("linear", T=10)
    assert len(jax.tree.leaves(schedule)) == len(dataclasses.fields(schedule))
    assert jax.tree.map(lambda table: table[:4], schedule).T == 4
    doubled = jax.jit(lambda s: jax.tree.map(lambda table: 2 * table, s))(schedule)
    np.testing.assert_allclose(doubled.betas, 2 * schedule.betas, rtol=1e-6)


def refuses(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_unknown_name_is_refused_with_the_known_ones():
    with refuses(f"got schedule 'linaer', expected one of {', '.join(BETAS)}"):
        make_schedule("linaer")


@pytest.mark.parametrize("T", [-1, 0, 1])
def test_fewer_than_2_steps_are_refused(T):
    with refuses(f"got T = {T}, expected at least 2 diffusion steps"):
        make_schedule("linear", T=T)


@names
@pytest.mark.parametrize("option", ["beta_start", "beta_end"])
@pytest.mark.parametrize("value", [-0.1, 0.0, 1.5, math.nan])
def test_end_points_outside_0_to_1_are_refused(name, option, value):
    with refuses(f"got {option} = {value:g}, expected above 0 and at most 1"):
        make_schedule(name, T=10, **{option: value})


@pytest.mark.parametrize("beta", [-0.1, 0.0, 1.5])
def test_betas_outside_0_to_1_are_refused(beta):
    low, high = min(beta, 0.1), max(beta, 0.1)
    with refuses(f"got betas from {low:g} to {high:g}, expected each above 0 and at most 1"):
        schedule_from_betas([0.1, beta])


@pytest.mark.parametrize("betas", [[0.1], [[0.1, 0.2]]])
def test_betas_that_are_no_vector_of_2_are_refused(betas):
    with refuses(f"got betas of shape {np.shape(betas)}, expected a vector of at least 2"):
        schedule_from_betas(betas)
