"""Bits/dim of sets of images: right for data known in closed form, unbiased from any number of terms, the sum of its parts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluated import CONFIG, random_params
from scipy import integrate, stats
from tiny import experiment

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.diffusion.bound import bits_per_dim, bound_terms, prior_bits
from ddpm_jax.diffusion.process import Process
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.evaluation import bits as likelihood
from ddpm_jax.evaluation.bits import Drawn, draw_times, make_bound, rate_distortion, strata, summarize_bound

LN2 = math.log(2)
MEAN, STD = 0.2, 0.15
T = 50
SCHEDULE = make_schedule("linear", T=T, beta_start=2e-3, beta_end=0.3)


def exact_eps(x_t, t):
    """E[eps | x_t] for data N(MEAN, STD^2), the network that cannot be bettered."""
    a = jnp.asarray(SCHEDULE.alphas_cumprod, x_t.dtype)[t][:, None, None, None]
    return jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)


def exact_bits(x_0, key):
    """L_T and every L_t of Gaussian data under the exact eps, by image, float64, at the contract's draws of x_t: KL terms in
    closed form, the decoder by quadrature of its density over each pixel's bin.
    """
    a, beta = SCHEDULE.alphas_cumprod, SCHEDULE.betas
    before = np.concatenate([[1.0], a[:-1]])
    variance = beta * (1 - before) / (1 - a)  # fixed_small: that of q, so that only means tell q and p apart
    L_t = np.empty((len(x_0), T))
    for t in range(T):
        eps = [jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), t), (8, 8, 1)) for i in range(len(x_0))]
        x_t = np.sqrt(a[t]) * x_0 + np.sqrt(1 - a[t]) * np.asarray(eps, np.float64)
        best = MEAN + np.sqrt(a[t]) * STD**2 / (a[t] * STD**2 + 1 - a[t]) * (x_t - np.sqrt(a[t]) * MEAN)
        if t:
            coef1 = np.sqrt(before[t]) * beta[t] / (1 - a[t])
            L_t[:, t] = (coef1**2 * (x_0 - best) ** 2 / (2 * variance[t])).mean(axis=(1, 2, 3))
        else:
            p = np.vectorize(lambda x, mean: bin_probability(x, mean, np.sqrt(variance[1])))(x_0, best)
            L_t[:, 0] = -np.log(p).mean(axis=(1, 2, 3))
    L_T = (a[-1] * x_0**2 - a[-1] - np.log1p(-a[-1])).mean(axis=(1, 2, 3)) / 2
    return L_T / LN2, L_t / LN2


def bin_probability(x, mean, sigma):
    """The mass of N(mean, sigma) within 1/255 of a pixel that is not at the ends, by quadrature."""
    density = stats.norm(mean, sigma).pdf
    return max(integrate.quad(density, x - 1 / 255, x + 1 / 255, epsabs=1e-14, epsrel=1e-10)[0], 1e-12)


@pytest.fixture(scope="module")
def gaussian():
    """The summary of Gaussian pictures on the grid of 256 values with the exact eps, in float32; and the exact parts."""
    levels = np.round((np.random.default_rng(0).normal(MEAN, STD, (4, 8, 8, 1)) + 1) * 127.5)
    x_0, key, edges = levels / 127.5 - 1, likelihood.bound_key(0), strata(T, T - 1)

    def compute(x_0):
        ts = draw_times(key, jnp.arange(4), edges, T)
        process = Process(SCHEDULE, variance="fixed_small")
        terms = bound_terms(process, exact_eps, key, x_0, jnp.arange(4), ts, clip=False)
        return Drawn(prior_bits(SCHEDULE, x_0), terms.bits, terms.mse)

    drawn = jax.device_get(jax.jit(compute)(jnp.asarray(x_0, jnp.float32)))
    return summarize_bound(drawn, edges), *exact_bits(x_0, key)


def test_bits_per_dim_of_gaussian_data_with_the_exact_eps_are_right_to_1e_4(gaussian):
    summary, L_T, L_t = gaussian
    assert summary["value"] == pytest.approx((L_T + L_t.sum(axis=1)).mean(), abs=1e-4)
    assert summary["value"] > 1  # in units that 1e-4 is small in


def test_every_part_is_right(gaussian):
    summary, L_T, L_t = gaussian
    parts = {name: part["value"] for name, part in summary["parts"].items()}
    assert parts["L_T"] == pytest.approx(L_T.mean(), rel=1e-5)
    assert parts["L_0"] == pytest.approx(L_t[:, 0].mean(), abs=1e-4)
    assert parts["rate"] == pytest.approx(L_t[:, 1:].sum(axis=1).mean(), abs=1e-4)
    for t, row in enumerate(summary["L_t"], start=1):
        assert (row["first_t"], row["last_t"]) == (t, t)
        assert row["value"] == pytest.approx(L_t[:, t].mean(), rel=1e-4)


def test_the_estimate_from_a_random_subset_of_terms_is_unbiased():
    """Over 500 seeds the mean of its difference from the whole bound of the same seed is 0 within four standard errors."""
    few, whole = strata(T, 5), strata(T, T - 1)
    x_0 = jnp.asarray(np.random.default_rng(0).normal(MEAN, 2 * STD, (2, 4, 4, 1)), jnp.float32)

    def compute(key, edges):
        ts = draw_times(key, jnp.arange(2), edges, T)
        return bound_terms(Process(SCHEDULE), exact_eps, key, x_0, jnp.arange(2), ts).bits

    keys = jax.vmap(jax.random.key)(jnp.arange(500))
    totals = []
    for edges in (few, whole):
        bits = np.asarray(jax.jit(jax.vmap(lambda key, e=edges: compute(key, e)))(keys))  # (500, 2, 1 + strata)
        drawn = [Drawn(np.zeros(2, np.float32), b, b) for b in bits]
        totals.append(np.array([summarize_bound(d, edges)["value"] for d in drawn]))
    difference = totals[0] - totals[1]
    error = difference.std(ddof=1) / math.sqrt(len(keys))
    assert abs(difference.mean()) < 4 * error
    assert 0 < error < 0.03 * totals[1].mean()


# ---- Strata and draws


@pytest.mark.parametrize(("T", "terms"), [(10, 9), (10, 1), (1000, 999), (1000, 37), (3, 2)])
def test_strata_cut_all_times_but_0_into_nearly_equal_parts(T, terms):
    edges = strata(T, terms)
    assert (edges[0], edges[-1], len(edges)) == (1, T, terms + 1)
    assert np.diff(edges).min() >= 1
    assert np.ptp(np.diff(edges)) <= 1


@pytest.mark.parametrize("terms", [0, 10, -1])
def test_more_terms_than_times_are_refused(terms):
    with pytest.raises(UsageError, match=f"got {terms} terms of the bound, expected 1 to 9; 0 stands for all"):
        strata(10, terms)


def test_times_are_uniform_within_their_stratum_and_the_images_own():
    edges = strata(1000, 7)
    ts = np.asarray(jax.jit(lambda i: draw_times(jax.random.key(1), i, edges, 1000))(jnp.arange(4000)))
    assert np.all(ts[:, 0] == 0)
    for column, low, high in zip(ts[:, 1:].T, edges[:-1], edges[1:], strict=True):
        assert (column.min(), column.max()) == (low, high - 1)
        assert stats.chisquare(np.bincount((column - low) * 10 // (high - low), minlength=10)).pvalue > 1e-4
    again = draw_times(jax.random.key(1), jnp.array([17, 5]), edges, 1000)
    np.testing.assert_array_equal(again, ts[[17, 5]])


# ---- A network's bound


CONFIG = dataclasses.replace(CONFIG, diffusion=dataclasses.replace(CONFIG.diffusion, T=12))
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
INDICES = np.arange(8, dtype=np.int32)


@pytest.fixture(scope="module")
def network():
    """compute(terms, images, indices) -> Drawn of a small network on four devices, compiled once for each number of terms."""
    params, mesh = random_params(CONFIG), sharding.make_mesh(devices=jax.devices()[:4])
    compiled = {terms: make_bound(experiment(CONFIG), mesh, strata(12, terms)) for terms in (4, 11)}

    def compute(terms, images=IMAGES, indices=INDICES):
        return Drawn(**jax.device_get(compiled[terms](params, likelihood.bound_key(3), images, indices)))

    return compute


def test_all_terms_are_bits_per_dims_and_the_sum_of_the_parts_equals_the_total(network):
    unet, edges = experiment(CONFIG).network, strata(12, 11)
    params = random_params(CONFIG)
    whole = jax.jit(
        lambda images: bits_per_dim(
            Process(experiment(CONFIG).process.schedule, variance=CONFIG.diffusion.variance),
            lambda x_t, t: unet.apply({"params": params}, x_t, t),
            likelihood.bound_key(3),
            images.astype(jnp.float32) / 127.5 - 1,
            jnp.arange(8),
        )
    )(IMAGES)
    drawn = network(11)
    np.testing.assert_allclose(drawn.bits, whole.L_t, rtol=1e-3)
    np.testing.assert_allclose(drawn.mse, whole.mse, rtol=1e-3)
    summary = summarize_bound(drawn, edges)
    assert summary["value"] == pytest.approx(float(whole.total.mean()), rel=1e-4)
    assert summary["value"] == pytest.approx(sum(part["value"] for part in summary["parts"].values()), rel=1e-12)
    rate = sum(row["value"] * (row["last_t"] - row["first_t"] + 1) for row in summary["L_t"])
    assert summary["parts"]["rate"]["value"] == pytest.approx(rate, rel=1e-12)


def test_the_standard_error_is_the_spread_over_sets_of_images():
    """Images are independent draws of one distribution, so the error must be that of means over other sets of them."""
    generator = np.random.default_rng(0)
    edges, summaries = strata(5, 2), []
    for _ in range(300):
        bits = generator.gamma(2.0, size=(50, 3)).astype(np.float32)
        summaries.append(summarize_bound(Drawn(np.zeros(50, np.float32), bits, bits), edges))
    spread = np.std([summary["value"] for summary in summaries])
    assert np.mean([summary["standard_error"] for summary in summaries]) == pytest.approx(spread, rel=0.15)


def test_what_is_drawn_for_an_image_depends_on_its_index_alone(network):
    order = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    moved, kept = network(4, IMAGES[order], INDICES[order]), network(4)
    np.testing.assert_allclose(moved.bits, kept.bits[order], rtol=1e-4)
    others = network(4, IMAGES, INDICES + 8)
    assert np.all(others.bits[:, 1:] != kept.bits[:, 1:])


def test_the_stream_is_the_bounds():
    expected = jax.random.fold_in(jax.random.key(3), 6)
    assert jnp.all(jax.random.key_data(likelihood.bound_key(3)) == jax.random.key_data(expected))


def test_a_bound_that_is_not_finite_is_refused():
    bits = np.ones((4, 3), np.float32)
    bits[2, 1] = np.nan
    with pytest.raises(UsageError, match="the bound of image 2 is not finite, so the network's output is not"):
        summarize_bound(Drawn(np.zeros(4, np.float32), bits, bits), strata(3, 2))


# ---- Rate and distortion


def test_rate_distortion_rows_are_cumulative_from_the_prior_down():
    edges = strata(5, 4)
    bits = np.array([[2.0, 0.4, 0.3, 0.2, 0.1]], np.float32)  # t = 0 .. 4
    mse = np.array([[0.0001, 0.01, 0.04, 0.09, 0.16]], np.float32)
    rows = rate_distortion(Drawn(np.array([0.5], np.float32), bits, mse), edges)
    assert [row["t"] for row in rows] == [4, 3, 2, 1, 0]
    np.testing.assert_allclose([row["rate"] for row in rows], [0.5, 0.6, 0.8, 1.1, 1.5], rtol=1e-6)
    np.testing.assert_allclose([row["distortion"] for row in rows], 127.5 * np.sqrt(mse[0, ::-1]), rtol=1e-6)


def test_rate_distortion_of_strata_agrees_with_all_terms(network):
    """Both ends are the same draws; between them the rate rises."""
    whole, some = (rate_distortion(network(terms), strata(12, terms)) for terms in (11, 4))
    assert whole[0]["rate"] == some[0]["rate"]  # L_T
    assert whole[-1]["distortion"] == pytest.approx(some[-1]["distortion"], rel=1e-5)
    assert len(some) == 5
    assert [row["rate"] for row in some] == sorted(row["rate"] for row in some)


def test_the_progressive_table_has_the_papers_ten_rows():
    rows = [{"t": t, "rate": 0.0, "distortion": 0.0} for t in reversed(range(1000))]
    table = likelihood.progressive_table(rows, 1000)
    assert [row["reverse_time"] for row in table] == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    assert [row["t"] for row in table] == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]


def test_the_progressive_table_of_few_rows_repeats_none():
    rows = [{"t": t, "rate": 0.0, "distortion": 0.0} for t in (9, 4, 0)]
    assert [row["t"] for row in likelihood.progressive_table(rows, 10)] == [9, 4, 0]


def test_prior_term_of_real_pictures_under_the_linear_schedule_is_about_1e_5():
    from sklearn.datasets import load_sample_images

    pictures = np.stack([image[:256, :256] for image in load_sample_images().images]) / np.float32(127.5) - 1
    L_T = np.asarray(jax.jit(lambda x: prior_bits(make_schedule("linear"), x))(pictures))
    assert np.all((L_T > 0.2e-5) & (L_T < 2e-5))
