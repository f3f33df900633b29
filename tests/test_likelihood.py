"""The bound's terms against scipy, and the whole bound against data whose best network is known in closed form."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from ddpm_jax.diffusion.bound import (
    bits_per_dim,
    bound_term,
    discretized_gaussian_log_likelihood,
    mean_bits,
    normal_kl,
    prior_bits,
)
from ddpm_jax.diffusion.process import Prediction, Process, q_sample
from ddpm_jax.diffusion.schedules import make_schedule

LN2 = math.log(2)
PIXELS = np.arange(256) / 127.5 - 1
T = 6
term = jax.jit(bound_term, static_argnames="clip")
fixed = pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])


def short():
    return make_schedule("linear", T=T, beta_start=0.01, beta_end=0.5)


def kl(mean1, variance1, mean2, variance2):
    """KL of two Gaussians in nats, from their means and variances."""
    return np.log(np.sqrt(variance2 / variance1)) + (variance1 + (mean1 - mean2) ** 2) / (2 * variance2) - 0.5


def decoder(x_0, mean, sigma):
    """log of the probability of each x_0's bin in nats, by scipy in float64; the smaller tail is the exact one."""
    low = np.where(x_0 < -0.999, -np.inf, (x_0 - 1 / 255 - mean) / sigma)
    high = np.where(x_0 > 0.999, np.inf, (x_0 + 1 / 255 - mean) / sigma)
    by_cdf = stats.norm.cdf(high) - stats.norm.cdf(low)
    by_sf = stats.norm.sf(low) - stats.norm.sf(high)
    return np.log(np.maximum(np.where(low + high > 0, by_sf, by_cdf), 1e-12))


# ---- KL


def test_kl_matches_quadrature(x64):
    for mean1, logvar1, mean2, logvar2 in [(0.3, -1.0, -0.2, 0.5), (0, 0, 0, 0), (1, 2, -3, 1), (0.01, -9, 0, -8.5)]:
        p, q = (stats.norm(m, math.exp(lv / 2)) for m, lv in ((mean1, logvar1), (mean2, logvar2)))
        low, high = p.mean() - 12 * p.std(), p.mean() + 12 * p.std()
        expected, _ = integrate.quad(
            lambda x, p=p, q=q: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), low, high, epsabs=1e-12
        )
        actual = normal_kl(*(jnp.asarray(a, jnp.float64) for a in (mean1, logvar1, mean2, logvar2)))
        assert float(actual) == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_kl_of_nearly_equal_variances_survives_float32():
    # KL of N(0, exp(d)) from N(0, 1) is d^2 / 4 for small d, here down to 1e-13 where 1 + d would round.
    for d in (1e-2, 4e-5, 1e-6):
        expected = (math.expm1(d) - d) / 2
        assert float(normal_kl(*map(jnp.float32, (0, d, 0, 0)))) == pytest.approx(expected, rel=1e-2)
    assert float(normal_kl(*map(jnp.float32, (0.5, -4, 0.5, -4)))) == 0


# ---- The discretised decoder


@jax.jit
def log_p_of_pixels(mean, sigma):
    """The decoder's log-probability of each of the 256 values."""
    logvar = jnp.full(256, 2 * jnp.log(sigma))
    return discretized_gaussian_log_likelihood(jnp.asarray(PIXELS), jnp.full(256, mean), logvar)


@pytest.mark.parametrize("mean", [-1.3, -1.0, -0.2, 0.5, 1.0, 1.01])
@pytest.mark.parametrize("sigma", [1e-5, 0.0074, 0.1, 3.0])
def test_decoder_matches_the_normal_cdf(mean, sigma, x64):
    np.testing.assert_allclose(log_p_of_pixels(mean, sigma), decoder(PIXELS, mean, sigma), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean", [-2.0, -0.5, 0.0, 0.999, 5.0])
@pytest.mark.parametrize("sigma", [0.0074, 0.05, 1.0])
def test_decoder_is_a_distribution_over_the_256_values(mean, sigma, x64):
    # The bins meet and the outer two are open, so the clipping at 1e-12 is all that is added.
    assert np.exp(log_p_of_pixels(mean, sigma)).sum() == pytest.approx(1, abs=256e-12 + 1e-12)


def test_decoders_ends_are_open(x64):
    # All the mass lies beyond the end.
    assert float(log_p_of_pixels(-10.0, 1.0)[0]) == pytest.approx(0, abs=1e-9)
    assert float(log_p_of_pixels(10.0, 1.0)[255]) == pytest.approx(0, abs=1e-9)


def test_decoder_clips_at_1e_12(x64):
    np.testing.assert_allclose(log_p_of_pixels(0.9, 0.01)[:200], math.log(1e-12), rtol=1e-12)


def test_decoder_keeps_its_precision_in_float32_tails():
    x_0 = np.tile(PIXELS.astype(np.float32), (4, 1))
    sigma = np.array([0.0074, 0.01, 0.05, 0.3], np.float32)[:, None]
    for offset in (-6, -3, 0, 0.4, 3, 6):
        mean = x_0 - np.float32(offset) * sigma
        expected = decoder(x_0.astype(np.float64), mean.astype(np.float64), sigma.astype(np.float64))
        logvar = np.broadcast_to(2 * np.log(sigma), x_0.shape)
        actual = jax.jit(discretized_gaussian_log_likelihood)(x_0, mean, logvar)
        np.testing.assert_allclose(actual, expected, atol=2e-3)


GRADIENT = jax.jit(jax.grad(lambda *args: discretized_gaussian_log_likelihood(*args).sum(), argnums=(1, 2)))


def test_decoder_gradients_match_finite_differences(x64):
    x_0, mean = map(np.ravel, np.meshgrid(PIXELS[[0, 1, 90, 128, 254, 255]], [-1.02, -0.3, 0.02, 0.98]))
    logvar, h = np.full(x_0.shape, 2 * math.log(0.3)), 1e-5
    by_mean, by_logvar = GRADIENT(*map(jnp.asarray, (x_0, mean, logvar)))
    differences = (decoder(x_0, mean + h, 0.3) - decoder(x_0, mean - h, 0.3)) / (2 * h)
    np.testing.assert_allclose(by_mean, differences, rtol=1e-6, atol=1e-6)
    up, down = (decoder(x_0, mean, 0.3 * math.exp(sign * h / 2)) for sign in (1, -1))
    np.testing.assert_allclose(by_logvar, (up - down) / (2 * h), rtol=1e-6, atol=1e-6)


def test_decoder_gradients_are_finite_everywhere_in_float32():
    means = [-1e3, -3, -1, -0.4, 0, 0.00392, 1, 3, 1e3]
    logvars = [-46, -30, -9.8, -2, 0, 10]  # log 1e-20 (the authors' smallest) and far beyond any beta
    grid = (jnp.asarray(a.ravel(), jnp.float32) for a in np.meshgrid(PIXELS[::15], means, logvars))
    for gradient in GRADIENT(*grid):
        assert np.all(np.isfinite(gradient))


# ---- L_T, units


@pytest.mark.parametrize("x64_on", [True, False])
def test_prior_term_of_the_papers_schedule_is_about_1e_5_bits(x64_on):
    with jax.enable_x64(x64_on):
        x_0 = np.random.default_rng(0).choice(PIXELS, (4, 8, 8, 3)) * np.linspace(0.3, 1, 4).reshape(4, 1, 1, 1)
        actual = jax.jit(prior_bits)(make_schedule("linear"), x_0)
        signal = math.prod(1 - np.linspace(1e-4, 0.02, 1000))
        expected = kl(math.sqrt(signal) * x_0, 1 - signal, 0, 1).mean(axis=(1, 2, 3)) / LN2
        np.testing.assert_allclose(actual, expected, rtol=1e-9 if x64_on else 1e-4)
        assert np.all((actual > 1e-7) & (actual < 2e-5))


def test_bits_are_nats_per_dimension_over_ln_2(x64):
    nats = np.random.default_rng(0).random((2, 3, 4, 5))
    np.testing.assert_allclose(mean_bits(jnp.asarray(nats)), nats.reshape(2, 60).sum(1) / 60 / LN2, rtol=1e-12)


# ---- Gaussian data N(m, s^2), whose best eps is known in closed form

M, S = 0.2, 0.15


def exact_eps(schedule):
    """E[eps | x_t] for data N(M, S^2)."""
    signal = jnp.asarray(np.cumprod(1 - schedule.betas))

    def model(x_t, t):
        a = signal[t][:, None, None, None].astype(x_t.dtype)
        return jnp.sqrt(1 - a) * (x_t - jnp.sqrt(a) * M) / (a * S**2 + 1 - a)

    return model


class Chain:
    """Means and variances of x_{t-1} for that data at one t, by conditioning jointly Gaussian variables in NumPy."""

    def __init__(self, betas, t):
        self.beta = betas[t]
        before, after = math.prod(1 - betas[:t]), math.prod(1 - betas[: t + 1])
        self.factor, self.noise = math.sqrt(after), 1 - after  # of x_t given x_0
        self.factor_before, self.noise_before = math.sqrt(before), 1 - before  # of x_{t-1} given x_0

    def condition(self, mean, variance, x_t):
        """x_{t-1} ~ N(mean, variance), seen through one step that gave x_t."""
        a = math.sqrt(1 - self.beta)
        gain = a * variance / (a**2 * variance + self.beta)
        return mean + gain * (x_t - a * mean), variance * (1 - gain * a)

    def posterior(self, x_0, x_t):
        """q(x_{t-1} | x_t, x_0)."""
        return self.condition(self.factor_before * x_0, self.noise_before, x_t)

    def marginal(self, x_t):
        """q(x_{t-1} | x_t): what the best network's mean is."""
        return self.condition(self.factor_before * M, self.factor_before**2 * S**2 + self.noise_before, x_t)


def sigma2(betas, t, variance):
    """The fixed variance of p(x_{t-1} | x_t)."""
    if variance == "fixed_large" and t > 0:
        return betas[t]
    return Chain(betas, max(t, 1)).posterior(0, 0)[1]


def gauss_hermite(n):
    """Nodes and weights of an expectation over N(0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / weights.sum()


def as_images(values):
    return jnp.asarray(np.ravel(values).reshape(-1, 1, 1, 1))


def term_of_pixels(schedule, x_0, x_t, t, variance):
    """The bound's term of one-pixel images under the exact network."""
    x_0, x_t = as_images(x_0), as_images(x_t)
    ts = jnp.full(x_0.shape[0], t, jnp.int32)
    return term(Process(schedule, variance=variance), exact_eps(schedule)(x_t, ts), x_0, x_t, ts, clip=False).bits


@fixed
@pytest.mark.parametrize("t", range(1, T))
def test_term_of_gaussian_data_is_the_closed_form_kl(t, variance, x64):
    schedule = short()
    betas, chain = schedule.betas, Chain(schedule.betas, t)
    # The quadrature's nodes for x_0 and eps are the images, so that nothing is random.
    nodes, weights = gauss_hermite(8)
    x_0, eps = np.meshgrid(M + S * nodes, nodes)
    x_t = chain.factor * x_0 + math.sqrt(chain.noise) * eps
    bits = term_of_pixels(schedule, x_0, x_t, t, variance)

    q_mean, q_variance = chain.posterior(x_0, x_t)
    p_mean, p_variance = chain.marginal(x_t)
    p_sigma2 = sigma2(betas, t, variance)
    np.testing.assert_allclose(bits, (kl(q_mean, q_variance, p_mean, p_sigma2) / LN2).ravel(), rtol=1e-9, atol=1e-12)

    # Total variance: the squared distance of the means is, on average, what knowing x_0 takes off the variance.
    expected = kl(0, q_variance, math.sqrt(p_variance - q_variance), p_sigma2) / LN2
    assert float(bits @ np.outer(weights, weights).ravel()) == pytest.approx(expected, abs=1e-9)


@fixed
def test_decoder_term_of_gaussian_data_matches_quadrature(variance, x64):
    schedule = short()
    betas, chain = schedule.betas, Chain(schedule.betas, 0)
    sigma = math.sqrt(sigma2(betas, 0, variance))
    nodes, weights = gauss_hermite(64)

    def nats(eps, x_0):
        x_t = chain.factor * x_0 + math.sqrt(chain.noise) * eps
        mean, _ = chain.condition(M, S**2, x_t)
        return -decoder(np.asarray(x_0), mean, sigma)

    for x_0 in PIXELS[[0, 1, 100, 254, 255]]:
        x_t = chain.factor * x_0 + math.sqrt(chain.noise) * nodes
        bits = term_of_pixels(schedule, np.full(64, x_0), x_t, 0, variance)
        np.testing.assert_allclose(bits, nats(nodes, x_0) / LN2, rtol=1e-9)
        expected, _ = integrate.quad(lambda e, x=x_0: stats.norm.pdf(e) * nats(e, x), -8, 8, epsabs=1e-10, limit=200)
        assert float(bits @ weights) == pytest.approx(expected / LN2, abs=1e-6)


# ---- The whole bound

SIDE = 64
KEY = 3
INDICES = (7, 1, 9)


def gaussian_pictures():
    """Three pictures of independent pixels N(M, S^2), float64: none near -1 or 1, where x_0 would be clipped."""
    return jnp.asarray(M + S * np.random.default_rng(7).standard_normal((3, SIDE, SIDE, 1)))


@jax.jit
def bits_of(x_0, indices):
    return bits_per_dim(Process(short()), exact_eps(short()), jax.random.key(KEY), x_0, indices)


def test_bound_of_gaussian_data_has_the_expected_terms(x64):
    betas, x_0 = short().betas, gaussian_pictures()
    bits = bits_of(x_0, jnp.array(INDICES))
    for t in range(1, T):
        chain = Chain(betas, t)
        q_variance, p_variance = chain.posterior(0, 0)[1], chain.marginal(0)[1]
        expected = kl(0, q_variance, math.sqrt(p_variance - q_variance), betas[t]) / LN2
        # The mean of n squared Gaussians of variance V strays by V sqrt(2 / n).
        stray = (p_variance - q_variance) / (2 * betas[t] * LN2) * math.sqrt(2 / x_0.size)
        assert float(bits.L_t[:, t].mean()) == pytest.approx(expected, abs=5 * stray)
        # The best guess of x_0 misses by the variance that x_t leaves it.
        missing = 1 / (1 / S**2 + chain.factor**2 / chain.noise)
        assert float(bits.mse[:, t].mean()) == pytest.approx(missing, rel=5 * math.sqrt(2 / x_0.size))


def test_total_is_the_sum_of_its_parts(x64):
    x_0 = gaussian_pictures()
    bits = bits_of(x_0, jnp.array(INDICES))
    assert bits.L_t.shape == bits.mse.shape == (3, T)
    np.testing.assert_allclose(bits.L_T, prior_bits(short(), x_0), rtol=1e-9)
    np.testing.assert_allclose(bits.total, bits.L_T + sum(bits.L_t[:, t] for t in range(T)), rtol=1e-12)


def test_each_term_is_formed_at_its_own_documented_draw(x64):
    schedule, x_0 = short(), gaussian_pictures()
    bits = bits_of(x_0, jnp.array(INDICES))
    draw = jax.jit(lambda i, t: jax.random.normal(fold(i, t), (SIDE * SIDE,), jnp.float64).reshape(SIDE, SIDE, 1))
    for t in range(T):
        ts = jnp.full(3, t, jnp.int32)
        x_t = q_sample(schedule, x_0, ts, jnp.stack([draw(i, t) for i in INDICES]))
        expected = term(Process(schedule), exact_eps(schedule)(x_t, ts), x_0, x_t, ts, clip=True)
        np.testing.assert_allclose(bits.L_t[:, t], expected.bits, rtol=1e-9)
        np.testing.assert_allclose(bits.mse[:, t], np.mean((expected.x_0 - x_0) ** 2, axis=(1, 2, 3)), rtol=1e-9)


def fold(index, t):
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(KEY), index), t)


def test_image_is_bits_do_not_depend_on_the_batch(x64):
    x_0 = gaussian_pictures()
    together = bits_of(x_0, jnp.array(INDICES))
    turned = bits_of(x_0[::-1], jnp.array(INDICES[::-1]))
    among_others = bits_of(jnp.stack([x_0[1], 0 * x_0[0], x_0[1]]), jnp.array([INDICES[1], 100, INDICES[1]]))
    alone = bits_of(x_0[1:2], jnp.array(INDICES[1:2]))
    for a, b, c, d in zip(together, turned, among_others, alone, strict=True):
        np.testing.assert_allclose(b[::-1], a, rtol=1e-12)
        np.testing.assert_allclose(c[::2], np.stack([a[1], a[1]]), rtol=1e-12)
        np.testing.assert_allclose(d, a[1:2], rtol=1e-12)
    other_place = bits_of(x_0, jnp.array((7, 2, 9)))
    assert abs(float(other_place.total[1] - together.total[1])) > 1e-4


def test_bits_per_dim_clips_x_0_unless_told_otherwise(x64):
    x_0 = jnp.asarray(np.full((3, SIDE, SIDE, 1), 3.0))  # at t = 0 the network sees as much
    np.testing.assert_allclose(bits_of(x_0, jnp.array(INDICES)).mse[:, 0], np.full(3, (3.0 - 1.0) ** 2), rtol=1e-9)


def test_terms_form_x_0_as_told(x64):
    schedule = short()
    x_0 = np.random.default_rng(7).choice(PIXELS, (T, 4, 4, 3))
    x_t, output = 0.9 * x_0, 1.5 * np.sign(x_0)  # the output is an x_0 outside of [-1, 1], on the right side
    bits = {}
    for clip, x_0_hat in ((True, np.sign(x_0)), (False, output)):
        args = map(jnp.asarray, (output, x_0, x_t, np.arange(T, dtype=np.int32)))
        actual = term(Process(schedule, prediction="x_0"), *args, clip=clip)
        np.testing.assert_allclose(actual.x_0, x_0_hat)
        for t in range(1, T):
            chain = Chain(schedule.betas, t)
            q_mean, q_variance = chain.posterior(x_0[t], x_t[t])
            nats = kl(q_mean, q_variance, chain.posterior(x_0_hat[t], x_t[t])[0], schedule.betas[t])
            assert float(actual.bits[t]) == pytest.approx(nats.mean() / LN2, rel=1e-9)
        bits[clip] = np.asarray(actual.bits)
    assert np.all(bits[True] < bits[False])


@pytest.mark.parametrize(
    ("prediction", "variance"),
    [(prediction, "learned_range") for prediction in get_args(Prediction)]
    + [("eps", variance) for variance in ("fixed_small", "fixed_large", "learned")],
)
def test_terms_gradient_is_finite_at_every_t_in_float32(prediction, variance):
    schedule = make_schedule("linear")
    ts = jnp.array([0, 1, 2, 500, 999])
    x_0, x_t, output = np.random.default_rng(0).standard_normal((3, 5, 2, 2, 2), np.float32)
    if "learned" in variance:
        output = np.concatenate([output, 3 * x_0], axis=-1)

    @jax.jit
    @jax.grad
    def gradient(output):
        process = Process(schedule, prediction=prediction, variance=variance)
        return bound_term(process, output, jnp.asarray(x_0), jnp.asarray(x_t), ts, clip=False).bits.sum()

    for scale in (0.1, 3.0):
        assert np.all(np.isfinite(gradient(jnp.asarray(scale * output))))
