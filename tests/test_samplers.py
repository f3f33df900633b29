"""Every sampler: the right distribution, the theoretical order, the paper's special cases, and one compiled loop."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import MEAN, MEANS, SHAPE, SPREAD, STD, WEIGHTS, gaussian_x_0, mixture_x_0, model_of
from scipy import stats

from ddpm_jax import make_schedule
from ddpm_jax.diffusion.process import Process, clip_x_0
from ddpm_jax.diffusion.schedules import respace
from ddpm_jax.sampling import (
    SAMPLERS,
    SPACINGS,
    choose_steps,
    ddim_encode,
    make_sampler,
    reverse,
    sample,
    sample_loop,
)
from ddpm_jax.sampling.ancestral import ancestral
from ddpm_jax.sampling.ddim import ddim
from ddpm_jax.sampling.dpm_solver import dpm_solver

# What the entries of the table say of themselves.
ENTRIES = {name: make_sampler(Process(make_schedule("linear", T=100)), name) for name in SAMPLERS}
DETERMINISTIC = sorted(name for name, sampler in ENTRIES.items() if sampler.order is not None)


def pixels(sampler, model, count=2000):
    draw = jax.jit(lambda key: sample_loop(sampler, model, key, jnp.arange(count), image_shape=SHAPE))
    return np.asarray(draw(jax.random.key(1)), np.float64).reshape(-1)


def linear_chain_variance(sampler, schedule):
    """The exact variance of x after all rows, with the exact x_0 of Gaussian data: the same recursion on 2nd moments.

    All is linear: x and the remembered x_0's have a joint covariance, which the rows' coefficients carry on, in float64.
    """
    rows, memory = sampler.rows, sampler.memory
    cov = np.zeros((1 + memory, 1 + memory))
    cov[0, 0] = 1.0
    for k, t in enumerate(rows["t"]):
        signal, noise = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
        gain = signal * STD**2 / (signal**2 * STD**2 + noise**2)
        go_on = np.zeros_like(cov)
        go_on[0, 0] = rows["x"][k] + rows["x_0"][k, 0] * gain
        go_on[0, 1:] = rows["x_0"][k, 1:]
        if memory:
            go_on[1, 0] = gain
            go_on[2:, 1:-1] = np.eye(memory - 1)
        cov = go_on @ cov @ go_on.T
        cov[0, 0] += rows["noise"][k] ** 2 if "noise" in rows else 0.0
    return cov[0, 0]


def ancestral_chain_variance(schedule, variance):
    v = 1.0
    for t in reversed(range(schedule.T)):
        alpha_bar = schedule.alphas_cumprod[t]
        gain = np.sqrt(alpha_bar) * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
        slope = schedule.posterior_mean_coef1[t] * gain + schedule.posterior_mean_coef2[t]
        small, large = schedule.posterior_logvar_clipped[t], np.log(schedule.betas[t])
        added = {"fixed_small": small, "fixed_large": large, "learned_range": (small + large) / 2}[variance]
        v = slope**2 * v + (np.exp(added) if t > 0 else 0.0)
    return v


def assert_moments(x, variance):
    assert abs(x.mean() - MEAN) < 4 * STD / np.sqrt(x.size)
    assert abs(x.var() - variance) < 4 * variance * np.sqrt(2 / x.size)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_papers_chain_samples_gaussian_data_with_the_right_mean_and_variance(variance):
    """Within four standard errors, T = 1000, where the chain's exact variance is the data's to some percent."""
    schedule = make_schedule("linear", T=1000)
    model = model_of(gaussian_x_0, schedule, spread=0.0 if variance == "learned_range" else None)
    x = pixels(make_sampler(Process(schedule, variance=variance), clip=False), model)
    expected = ancestral_chain_variance(schedule, variance)
    assert_moments(x, expected)
    assert abs(expected - STD**2) < 0.08 * STD**2


@pytest.mark.parametrize(
    ("prediction", "spread"), [("eps", None), ("eps", 0.0), ("x_0", None), ("x_prev", None), ("v", None)]
)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_any_network_output_feeds_any_sampler(name, prediction, spread):
    """Gaussian data again, T = 100, within four standard errors of the chain's exact moments."""
    schedule = make_schedule("linear", T=100, beta_start=1e-3, beta_end=0.2)
    variance = "fixed_large" if spread is None else "learned_range"
    model = model_of(gaussian_x_0, schedule, prediction, spread)
    steps = 40 if name in DETERMINISTIC else ()
    sampler = make_sampler(Process(schedule, prediction=prediction, variance=variance), name, steps=steps, clip=False)
    if "x_0" in sampler.rows:  # a table of coefficients
        expected = linear_chain_variance(sampler, schedule)
    else:
        expected = ancestral_chain_variance(schedule, variance)
    assert_moments(pixels(sampler, model, count=1000), expected)
    assert abs(expected - STD**2) < 0.3 * STD**2


@pytest.mark.parametrize("steps", [100, (20, 30, 50)])
@pytest.mark.parametrize("prediction", ["eps", "x_prev"])
def test_respaced_ancestral_sampling_keeps_the_distribution(steps, prediction):
    schedule = make_schedule("linear", T=1000)
    sampler = make_sampler(Process(schedule, prediction=prediction, variance="fixed_small"), steps=steps, clip=False)
    assert len(sampler) == 100
    x = pixels(sampler, model_of(gaussian_x_0, schedule, prediction))
    visited = respace(schedule, choose_steps(schedule, steps))
    expected = ancestral_chain_variance(visited, "fixed_small")
    assert_moments(x, expected)
    assert 0.6 * STD**2 < expected < STD**2  # fixed_small is too small for long steps


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_mixture_is_sampled_with_the_right_distribution(name):
    """Kolmogorov-Smirnov against the mixture's exact distribution function, 8,000 pixels."""
    schedule = make_schedule("linear", T=1000)
    steps = {None: (), 1: 400}.get(ENTRIES[name].order, 100)
    sampler = make_sampler(Process(schedule, variance="fixed_small"), name, steps=steps, spacing="logsnr", clip=False)
    x = pixels(sampler, model_of(mixture_x_0, schedule))

    def cdf(values):
        return sum(w * stats.norm.cdf(values, m, SPREAD) for w, m in zip(WEIGHTS, MEANS, strict=True))

    assert stats.kstest(x, cdf).statistic < 1.95 / np.sqrt(x.size) + 0.004  # the 0.1 % point, and the chain's own error


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_converge_at_their_order(name, x64):
    """The slope of the error against the exact solution of the flow of Gaussian data, whose length scales as its spread."""
    schedule = make_schedule("linear", T=20_000, beta_start=1e-7, beta_end=1.2e-3)
    model = model_of(gaussian_x_0, schedule)
    signal, noise = schedule.sqrt_alphas_cumprod[-1], schedule.sqrt_one_minus_alphas_cumprod[-1]
    x_T = np.full((1, 1, 1, 1), 1.3)
    exact = MEAN + STD * (x_T - signal * MEAN) / np.sqrt(signal**2 * STD**2 + noise**2)
    order = ENTRIES[name].order
    counts = (80, 160, 320) if order < 3 else (40, 60, 80)
    errors = []
    for n in counts:
        sampler = make_sampler(Process(schedule), name, steps=n, spacing="logsnr", clip=False)
        x, _ = reverse(sampler, model, jax.random.key(0), jnp.arange(1), jnp.asarray(x_T))
        errors.append(abs(float((x - exact).max())))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope > order - 0.2
    assert slope < order + 0.2 or order == 3  # of which a straight line's error is of fourth order here


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_draws_noise_unless_it_is_deterministic(name):
    """From one x_T, two keys end in one image or in two."""
    schedule = make_schedule("linear", T=100)
    x_T = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    sampler = make_sampler(Process(schedule), name, clip=False)
    ends = [
        reverse(sampler, model_of(mixture_x_0, schedule), jax.random.key(key), jnp.arange(2), x_T)[0] for key in (1, 2)
    ]
    assert np.array_equal(*ends) == (sampler.order is not None)


def test_ddim_that_draws_noise_is_not_deterministic():
    sampler = make_sampler(Process(make_schedule("linear")), "ddim", steps=10, eta=0.5)
    assert sampler.order is None


def test_ddim_with_eta_1_is_ancestral_sampling_with_fixed_small(x64):
    """Given the same noise, to rounding: over all steps, at every one of them."""
    schedule = make_schedule("linear", T=50, beta_start=1e-3, beta_end=0.3)
    steps, model = np.arange(50), model_of(mixture_x_0, schedule)
    key, indices = jax.random.key(3), jnp.arange(5)
    x_T = jax.random.normal(jax.random.key(4), (5, *SHAPE))
    for clip in (True, False):
        for other, one in zip(
            reverse(
                ancestral(Process(schedule, variance="fixed_small"), steps, clip=clip),
                model,
                key,
                indices,
                x_T,
                watch=steps,
            )[1],
            reverse(ddim(Process(schedule), steps, eta=1.0, clip=clip), model, key, indices, x_T, watch=steps)[1],
            strict=True,
        ):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-11)


def test_ddim_with_eta_1_is_the_posterior_where_hardly_any_signal_is_left():
    """alpha-bar falls to 1e-18, where the noise of two levels is 1 to the last digit."""
    schedule = make_schedule("linear", T=4000)
    rows = ddim(Process(schedule), np.arange(4000), eta=1.0).rows
    np.testing.assert_allclose(rows["x"], schedule.posterior_mean_coef2[::-1], rtol=1e-6)
    np.testing.assert_allclose(rows["x_0"][:, 0], schedule.posterior_mean_coef1[::-1], rtol=1e-6)
    np.testing.assert_allclose(rows["noise"] ** 2, schedule.posterior_variance[::-1], rtol=1e-6)
    few = ddim(Process(schedule), np.array([0, 3999]), eta=1.0).rows
    assert all(np.isfinite(few[name]).all() for name in ("x", "x_0", "noise"))


def test_ddim_with_eta_between_draws_noise_and_keeps_the_mean():
    schedule = make_schedule("linear", T=1000)
    sampler = ddim(Process(schedule), choose_steps(schedule, 100), eta=0.5, clip=False)
    x = pixels(sampler, model_of(gaussian_x_0, schedule))
    expected = linear_chain_variance(sampler, schedule)
    assert_moments(x, expected)
    assert sampler.rows["noise"][:-1].min() > 0
    assert sampler.rows["noise"][-1] == 0  # none at the last step


def test_respacing_to_all_steps_changes_nothing():
    for name in ("linear", "cosine", "jsd"):
        schedule = make_schedule(name)
        for a, b in zip(
            jax.tree.leaves(respace(schedule, np.arange(schedule.T))), jax.tree.leaves(schedule), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=0)


def test_respaced_tables_are_those_of_the_visited_steps():
    schedule, steps = make_schedule("linear"), np.array([3, 10, 500, 998])
    visited = respace(schedule, steps)
    np.testing.assert_allclose(visited.alphas_cumprod, schedule.alphas_cumprod[steps], rtol=1e-12)
    np.testing.assert_allclose(
        visited.sqrt_one_minus_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod[steps], rtol=1e-12
    )


def test_encoding_and_ddim_are_inverse_in_the_limit(x64):
    """An image goes to its x_T and back; the way back ends nearer the more steps it has, and x_T is the flow's exact one."""
    schedule = make_schedule("linear", T=5000, beta_start=1e-6, beta_end=4e-3)
    model = model_of(gaussian_x_0, schedule)
    x_0 = jnp.linspace(-0.5, 0.9, 8).reshape(2, *SHAPE)
    signal, noise = schedule.sqrt_alphas_cumprod[-1], schedule.sqrt_one_minus_alphas_cumprod[-1]
    exact = signal * MEAN + (x_0 - MEAN) / STD * np.sqrt(signal**2 * STD**2 + noise**2)
    errors = []
    for n in (250, 1000):
        steps = choose_steps(schedule, n, "logsnr")
        draws = jax.random.key(0), jnp.arange(2)
        x_T, _ = reverse(ddim_encode(Process(schedule), steps), model, *draws, x_0)
        back, _ = reverse(ddim(Process(schedule), steps, clip=False), model, *draws, x_T)
        errors.append([float(jnp.abs(x_T - exact).max()), float(jnp.abs(back - x_0).max())])
    errors = np.array(errors)
    assert (errors[1] < 0.02).all()
    assert (errors[0] / errors[1] > 3).all()


def test_encoding_takes_the_same_from_any_prediction(x64):
    schedule, steps = make_schedule("cosine", T=100), np.arange(0, 100, 7)
    x_0 = jnp.linspace(-0.5, 0.9, 4).reshape(1, *SHAPE)
    ends = []
    for prediction in ("eps", "x_0", "x_prev", "v"):
        encode = ddim_encode(Process(schedule, prediction=prediction), steps)
        model = model_of(mixture_x_0, schedule, prediction)
        ends.append(reverse(encode, model, jax.random.key(0), jnp.arange(1), x_0)[0])
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], rtol=1e-9)


def test_a_chain_in_two_parts_is_the_same_chain():
    schedule = make_schedule("linear", T=20, beta_start=1e-2, beta_end=0.5)
    sampler, model = make_sampler(Process(schedule)), model_of(mixture_x_0, schedule)
    draws = jax.random.key(0), jnp.arange(3)
    x_T = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    whole, _ = reverse(sampler, model, *draws, x_T)
    half, _ = reverse(sampler, model, *draws, x_T, rows=slice(12))
    np.testing.assert_array_equal(reverse(sampler, model, *draws, half, rows=slice(12, None))[0], whole)
    with pytest.raises(ValueError, match="this sampler looks back: start at row 0"):
        reverse(make_sampler(Process(schedule), "dpm++2m"), model, *draws, half, rows=slice(12, None))


def test_what_is_watched_is_the_chain_and_its_predictions():
    schedule = make_schedule("linear", T=20, beta_start=1e-2, beta_end=0.5)
    sampler, model = make_sampler(Process(schedule)), model_of(mixture_x_0, schedule)
    draws = jax.random.key(0), jnp.arange(3)
    x_T = jax.random.normal(jax.random.key(1), (3, *SHAPE))
    end, seen = reverse(sampler, model, *draws, x_T, watch=[19, 4])
    np.testing.assert_array_equal(seen.x[0], end)
    x_5, _ = reverse(sampler, model, *draws, x_T, rows=slice(5))
    np.testing.assert_allclose(seen.x[1], x_5, rtol=1e-5, atol=1e-6)  # another program, which may round otherwise
    before, _ = reverse(sampler, model, *draws, x_T, rows=slice(4))
    expected = jnp.clip(mixture_x_0(schedule, before, jnp.full(3, 15)), -1, 1)
    np.testing.assert_allclose(seen.x_0[1], expected, atol=1e-5)
    with pytest.raises(ValueError, match="got rows"):
        reverse(sampler, model, *draws, x_T, rows=slice(5), watch=[5])
    with pytest.raises(ValueError, match="each once"):
        reverse(sampler, model, *draws, x_T, watch=[4, 4])


def test_heun_takes_two_evaluations_a_step_and_one_at_the_last():
    schedule = make_schedule("linear")
    sampler = make_sampler(Process(schedule), "heun", steps=10)
    assert len(sampler) == 19
    steps = choose_steps(schedule, 10)[::-1]
    np.testing.assert_array_equal(sampler.rows["t"], np.repeat(steps, 2)[1:])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_compiles_once_and_traces_the_network_once(name):
    """No Python runs per step, and another key or another batch of the same size compiles nothing."""
    schedule, traced = make_schedule("linear"), []

    def model(x, t):
        traced.append(t)
        return jnp.zeros_like(x)

    @jax.jit
    def draw(key, indices):
        return sample(Process(schedule), model, key, indices, image_shape=SHAPE, sampler=name, steps=30)

    draw(jax.random.key(0), jnp.arange(2))
    draw(jax.random.key(1), jnp.arange(2, 4))
    assert len(traced) == 1
    assert draw._cache_size() == 1


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_clipping_keeps_the_prediction_in_range(name):
    """With a network that is far off, the end is the clipped prediction of the last row."""
    schedule = make_schedule("linear", T=100)
    for clip, expected in ((True, 1.0), (0.5, 1.0), (False, 5.0)):
        sampler = make_sampler(Process(schedule, prediction="x_0"), name, steps=10, clip=clip)
        x = sample_loop(
            sampler, lambda x, t: jnp.full_like(x, 5.0), jax.random.key(0), jnp.arange(2), image_shape=SHAPE
        )
        np.testing.assert_allclose(x, expected, rtol=1e-5)


def test_dynamic_thresholding_divides_by_each_images_quantile():
    x_0 = jnp.stack([jnp.linspace(-4, 4, 101), jnp.linspace(-0.5, 0.5, 101)]).reshape(2, 101, 1, 1)
    actual = clip_x_0(x_0, 0.5)
    np.testing.assert_allclose(actual[0], np.clip(x_0[0], -2, 2) / 2, atol=1e-6)
    np.testing.assert_allclose(actual[1], x_0[1])  # within [-1, 1] nothing changes
    with pytest.raises(ValueError, match="quantile"):
        clip_x_0(x_0, 1.5)


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("n", [1, 2, 7, 50, 99, 100])
def test_spacings_give_n_different_steps_in_order(spacing, n):
    schedule = make_schedule("linear", T=100)
    steps = choose_steps(schedule, n, spacing)
    assert len(steps) == n
    assert (np.diff(steps) > 0).all()
    assert steps[0] >= 0
    assert steps[-1] <= 99
    if spacing != "leading":
        assert steps[-1] == 99  # it starts at the noisiest
    if n == 100:
        np.testing.assert_array_equal(steps, np.arange(100))


def test_each_spacing_is_spaced_as_it_says():
    schedule = make_schedule("linear", T=1000)
    np.testing.assert_array_equal(choose_steps(schedule, 4, "linspace"), [0, 333, 666, 999])
    np.testing.assert_array_equal(choose_steps(schedule, 4, "leading"), [0, 250, 500, 750])
    np.testing.assert_array_equal(choose_steps(schedule, 4, "trailing"), [249, 499, 749, 999])
    np.testing.assert_array_equal(choose_steps(schedule, 4, "quadratic"), [0, 111, 444, 999])
    lambdas = np.log(schedule.sqrt_alphas_cumprod / schedule.sqrt_one_minus_alphas_cumprod)
    gaps = np.diff(lambdas[choose_steps(schedule, 11, "logsnr")])
    np.testing.assert_allclose(gaps, gaps.mean(), rtol=0.15)  # the first t's lie far apart
    np.testing.assert_array_equal(choose_steps(schedule, (2, 3)), [0, 499, 500, 750, 999])


def theirs(T, counts):
    """Nichol & Dhariwal's rounding in exact fractions: no sum of their strides lies near a half but those that are one."""
    size, extra = divmod(T, len(counts))
    steps, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        stride = Fraction(length - 1, count - 1) if count > 1 else Fraction(1)
        steps += [start + round(k * stride) for k in range(count)]  # halves to the even number, as Python rounds
        start += length
    return steps


# Computed by hand: T = 1000 in sections of 334, 333, 333 from 0, 334 and 667 with strides 333/9 = 37, 332/14 = 23.71...
# and 332/24 = 13.83...; T = 11 in sections of 4, 4, 3 from 0, 4 and 8 with strides 3/2, 1 and 2.
SECTIONS = {
    (1000, (10, 15, 25)): [
        *(0, 37, 74, 111, 148, 185, 222, 259, 296, 333),
        *(334, 358, 381, 405, 429, 453, 476, 500, 524, 547, 571, 595, 619, 642, 666),
        *(667, 681, 695, 709, 722, 736, 750, 764, 778, 791, 805, 819, 833),
        *(847, 861, 875, 888, 902, 916, 930, 944, 957, 971, 985, 999),
    ],
    (11, (3, 1, 2)): [0, 2, 3, 4, 8, 10],
}


@pytest.mark.parametrize(("T", "counts"), SECTIONS)
def test_sections_are_nichols_and_dhariwals(T, counts):
    expected = SECTIONS[T, counts]
    assert expected == theirs(T, counts)
    np.testing.assert_array_equal(choose_steps(make_schedule("linear", T=T), counts), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "dddim"}, "got sampler 'dddim', expected one of ancestral, ddim"),
        ({"eta": 0.5}, "for sampler 'ancestral', which has none"),
        ({"name": "ddim", "eta": 1.5}, "got eta = 1.5, expected from 0"),
        ({"spacing": "cubic"}, "got spacing 'cubic', expected one of linspace"),
        ({"steps": 0}, "got 0 steps of the 100 from t = 0 on, expected from 1 to 100"),
        ({"steps": 101}, "got 101 steps of the 100"),
        ({"steps": (10, 51)}, "got 51 steps of the 50 from t = 50 on"),
        ({"steps": (10, 20), "spacing": "trailing"}, "expected linspace for sections"),
        ({"steps": 1}, "got 1 step, expected at least 2 for ancestral"),
        ({"steps": 10, "variance": "learned"}, "with some steps left out"),
    ],
)
def test_what_a_sampler_cannot_do_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(
            Process(make_schedule("linear", T=100), variance=options.pop("variance", "fixed_large")), **options
        )


def test_what_divides_by_the_signal_needs_one_at_the_end():
    for name in DETERMINISTIC:
        with pytest.raises(ValueError, match="use ancestral sampling"):
            make_sampler(Process(make_schedule("jsd", T=100), prediction="x_0"), name)
    with pytest.raises(ValueError, match="use another spacing"):
        choose_steps(make_schedule("jsd", T=100), 10, "logsnr")


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="got order 4"):
        dpm_solver(Process(make_schedule("linear")), np.arange(10), order=4)
