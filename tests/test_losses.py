"""Losses against NumPy, the gradients that tell them apart, and the two ways to choose t."""

import functools
import inspect
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ddpm_jax.core.rng import Purpose, root_key, step_key
from ddpm_jax.diffusion.bound import bound_term
from ddpm_jax.diffusion.losses import (
    LOSSES,
    LossHistory,
    importance_sample_t,
    init_loss_history,
    min_snr_weights,
    sample_t,
    simple_loss,
    t_probabilities,
    update_loss_history,
)
from ddpm_jax.diffusion.process import Prediction, Process
from ddpm_jax.diffusion.schedules import BETAS, make_schedule

T = 8
SHAPE = (T, 2, 2, 3)  # one image for every t
t_all = np.arange(T, dtype=np.int32)
predictions = pytest.mark.parametrize("prediction", get_args(Prediction))
losses = pytest.mark.parametrize("name", LOSSES)
hybrids = [name for name in LOSSES if "hybrid" in name]


def short():
    return make_schedule("linear", T=T, beta_start=0.01, beta_end=0.4)


def column(values):
    return np.asarray(values, np.float64).reshape(T, 1, 1, 1)


def draw(seed, channels=3):
    return np.random.default_rng(seed).standard_normal((*SHAPE[:-1], channels))


X_0, EPS, OUTPUT = 0.5 * draw(0), draw(1), draw(2, 6)  # the output: three channels of mean, three of variance


def x_t():
    """x_t of each t, Eq. (4), from the betas alone."""
    signal = column(np.cumprod(1 - short().betas))
    return np.sqrt(signal) * X_0 + np.sqrt(1 - signal) * EPS


def targets():
    """What a network should put out, for each prediction, from the betas alone."""
    betas = short().betas
    signal, before = column(np.cumprod(1 - betas)), column([1, *np.cumprod(1 - betas)[:-1]])
    # x_{t-1}'s mean given x_t and x_0: both tell something, in proportion to their precisions (none but x_0 at t = 0).
    by_x_0 = np.sqrt(before) * column(betas) * X_0
    by_x_t = np.sqrt(1 - column(betas)) * (1 - before) * x_t()
    return {
        "eps": EPS,
        "x_0": X_0,
        "x_prev": (by_x_0 + by_x_t) / (column(betas) * 1 + (1 - column(betas)) * (1 - before)),
        "v": np.sqrt(signal) * EPS - np.sqrt(1 - signal) * X_0,
    }


def simple(prediction, output):
    """Mean squared error of each image in NumPy."""
    return ((output[..., :3] - targets()[prediction]) ** 2).reshape(T, -1).sum(axis=1) / 12


def bound(prediction, variance, output):
    """The bound's terms (themselves tested against scipy), unclipped."""
    args = map(jnp.asarray, (output, X_0, x_t(), t_all))
    return bound_term(Process(short(), prediction=prediction, variance=variance), *args, clip=False).bits


# A loss's expected value in terms of L_simple and the bound's term.
COMBINATION = {
    "simple": lambda mse, vb: mse,
    "vb": lambda mse, vb: vb,
    "rescaled_vb": lambda mse, vb: T * vb,
    "hybrid": lambda mse, vb: mse + vb,
    "rescaled_hybrid": lambda mse, vb: mse + 0.001 * T * vb,
}


def call(loss, output, prediction, variance, t=t_all):
    """The loss of a network that puts out `output`, whatever it sees."""
    args = map(jnp.asarray, (X_0, t, EPS))
    seen = jnp.asarray(output)
    return loss(Process(short(), prediction=prediction, variance=variance), lambda x_t, t: seen, *args)


# ---- Values


@losses
@predictions
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_losses_have_their_closed_form(name, prediction, variance, x64):
    if not fits(name, variance):
        return
    output = OUTPUT[..., :3] if variance == "fixed_small" else OUTPUT
    expected = COMBINATION[name](simple(prediction, output), bound(prediction, variance, output))
    np.testing.assert_allclose(call(LOSSES[name], output, prediction, variance), expected, rtol=1e-9)


def test_the_network_sees_x_t_and_t(x64):
    seen = []

    def model(x, t):
        seen.append((np.asarray(x), np.asarray(t)))
        return x

    simple_loss(Process(short()), model, *map(jnp.asarray, (X_0, t_all, EPS)))
    ((x, t),) = seen  # once
    np.testing.assert_allclose(x, x_t(), rtol=1e-9)
    np.testing.assert_array_equal(t, t_all)


@losses
def test_an_images_loss_is_its_own(name, x64):
    before = call(LOSSES[name], OUTPUT, "eps", "learned_range")
    changed = OUTPUT.copy()
    changed[3] *= 2
    after = call(LOSSES[name], changed, "eps", "learned_range")
    assert before.shape == (T,)
    np.testing.assert_array_equal(np.flatnonzero(before != after), [3])


@pytest.mark.parametrize("name", hybrids)
def test_hybrid_losses_need_a_learned_variance(name):
    message = "got variance 'fixed_large' with a hybrid loss, expected learned or learned_range"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(LOSSES[name], OUTPUT[..., :3].astype(np.float32), "eps", "fixed_large", t_all)


# ---- Gradients


def fits(name, variance):
    """Whether the loss can be had with this variance: a hybrid loss needs a learned one."""
    return "hybrid" not in name or "learned" in variance


@functools.cache
def gradients(prediction, variance, dtype):
    """The gradient of every loss (that fits) with respect to the network's output, compiled once."""
    output = OUTPUT if "learned" in variance else OUTPUT[..., :3]

    names = [name for name in LOSSES if fits(name, variance)]

    def totals(output):
        return jnp.stack([call(LOSSES[name], output, prediction, variance).sum() for name in names])

    return dict(zip(names, np.asarray(jax.jit(jax.jacrev(totals))(jnp.asarray(output, dtype))), strict=True))


@losses
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_gradients_are_finite_in_float32(name, variance):
    if fits(name, variance):
        assert np.all(np.isfinite(gradients("eps", variance, "float32")[name]))


@pytest.mark.parametrize("name", hybrids)
def test_hybrids_mean_learns_from_the_simple_loss_only(name, x64):
    gradient = gradients("eps", "learned_range", "float64")
    hybrid, mse, vb = gradient[name], gradient["simple"], gradient["vb"]
    np.testing.assert_allclose(hybrid[..., :3], mse[..., :3], rtol=1e-9)
    assert np.all(mse[..., 3:] == 0)
    weight = {"hybrid": 1, "rescaled_hybrid": 0.001 * T}[name]
    np.testing.assert_allclose(hybrid[..., 3:], weight * vb[..., 3:], rtol=1e-9)
    assert np.all(vb[1:, ..., :3] != 0)  # which the hybrid therefore stopped


def test_the_bound_is_not_clipped_in_training(x64):
    # An x_0 outside of [-1, 1] has the gradient to come back; a clipped one would have none.
    outside = np.abs(OUTPUT[1:, ..., :3]) > 1
    assert outside.any()
    assert np.all(gradients("x_0", "fixed_large", "float64")["vb"][1:][outside] != 0)


@losses
def test_losses_share_their_signature(name):
    parameters = inspect.signature(inspect.unwrap(LOSSES[name])).parameters
    assert list(parameters) == ["process", "model", "x_0", "t", "eps"]


# ---- Min-SNR weights


@pytest.mark.parametrize("name", BETAS)
def test_min_snr_weights_measure_x_0s_error(name):
    schedule, gamma = make_schedule(name, T=100), 5.0
    signal = schedule.alphas_cumprod
    snr = signal / (1 - signal)
    weights = {p: min_snr_weights(Process(schedule, prediction=p), gamma) for p in ("eps", "x_0", "v")}
    np.testing.assert_allclose(weights["x_0"], np.minimum(snr, gamma), rtol=1e-9)
    # eps misses by sqrt(SNR) times what x_0 misses by, and v by sqrt(SNR + 1) times: divide, to weigh the same error.
    np.testing.assert_allclose(weights["eps"][snr > 0], (np.minimum(snr, gamma) / snr.clip(1e-300))[snr > 0], rtol=1e-9)
    np.testing.assert_allclose(weights["eps"][snr == 0], 1)
    np.testing.assert_allclose(weights["v"], np.minimum(snr, gamma) / (snr + 1), rtol=1e-9)
    for weight in weights.values():
        assert weight.dtype == np.float64
        assert np.all(np.isfinite(weight))


def test_min_snr_weighs_every_prediction_of_one_x_0_alike(x64):
    # One network's error in x_0, put as eps, x_0 or v, weighs the same.
    schedule, x_0_hat = short(), X_0 + 0.1 * draw(5)
    signal = column(np.cumprod(1 - schedule.betas))
    eps_hat = (x_t() - np.sqrt(signal) * x_0_hat) / np.sqrt(1 - signal)
    outputs = {"eps": eps_hat, "x_0": x_0_hat, "v": np.sqrt(signal) * eps_hat - np.sqrt(1 - signal) * x_0_hat}
    weighed = [
        min_snr_weights(Process(schedule, prediction=p), 5.0) * call(simple_loss, output, p, "fixed_large")
        for p, output in outputs.items()
    ]
    np.testing.assert_allclose(weighed[0], weighed[1], rtol=1e-9)
    np.testing.assert_allclose(weighed[2], weighed[1], rtol=1e-9)


def test_min_snr_is_not_defined_for_x_prev():
    message = "got min-SNR weights for prediction 'x_prev', expected eps, x_0 or v"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        min_snr_weights(Process(short(), prediction="x_prev"), 5.0)


# ---- Uniform t


N = 100_000


def test_t_is_uniform_on_0_to_T_minus_1():
    t = sample_t(jax.random.key(0), N, 50)
    assert t.dtype == jnp.int32
    assert (t.min(), t.max()) == (0, 49)
    assert stats.chisquare(np.bincount(t, minlength=50)).pvalue > 1e-3


def test_golden_t():
    t = sample_t(step_key(root_key(42), Purpose.T, 5), N, 1000)
    assert t[:4].tolist() == [680, 181, 665, 206]


# ---- Importance sampled t


def full_history(seed=0, n=4):
    values = np.random.default_rng(seed).gamma(1, 1, (T, n)) * np.linspace(3, 0.1, T)[:, None]
    return LossHistory(jnp.asarray(values, jnp.float32), jnp.full(T, n, jnp.int32))


def test_t_is_uniform_until_every_t_has_its_n_losses():
    history = full_history()
    one_missing = history._replace(count=history.count.at[5].set(3))
    for early in (init_loss_history(T), one_missing):
        np.testing.assert_allclose(t_probabilities(early), np.full(T, 1 / T), rtol=1e-6)
    assert np.abs(t_probabilities(history) - 1 / T).max() > 0.05


def test_probabilities_follow_the_root_mean_square_of_the_losses():
    history = full_history()
    rms = np.sqrt((np.asarray(history.losses, np.float64) ** 2).mean(axis=1))
    expected = 0.999 * rms / rms.sum() + 0.001 / T
    np.testing.assert_allclose(t_probabilities(history), expected, rtol=1e-6)
    half = 0.5 * rms / rms.sum() + 0.5 / T
    np.testing.assert_allclose(t_probabilities(history, uniform=0.5), half, rtol=1e-6)


@pytest.mark.parametrize("loss", [0.0, 1e-6])
def test_equal_losses_give_the_uniform_distribution(loss):
    history = LossHistory(jnp.full((T, 4), loss), jnp.full(T, 4, jnp.int32))
    np.testing.assert_allclose(t_probabilities(history), np.full(T, 1 / T), rtol=1e-6)


def test_a_t_without_loss_keeps_the_uniform_share():
    history = full_history()
    p = t_probabilities(history._replace(losses=history.losses.at[2].set(0)))
    assert float(p[2]) == pytest.approx(0.001 / T, rel=1e-4)


def test_importance_weights_keep_the_estimate_unbiased():
    history = full_history()
    p = np.asarray(t_probabilities(history), np.float64)
    t, weights = jax.jit(importance_sample_t, static_argnums=1)(jax.random.key(1), N, history)
    assert t.dtype == jnp.int32
    assert stats.chisquare(np.bincount(t, minlength=T), N * p / p.sum()).pvalue > 1e-3
    weight_of = np.array([np.asarray(weights)[np.asarray(t) == i][0] for i in range(T)])
    np.testing.assert_array_equal(weights, weight_of[np.asarray(t)])
    # Summed exactly over t: E[weight * loss] is the mean loss over uniform t, for any losses.
    for loss in np.random.default_rng(3).random((3, T)):
        assert (p * weight_of * loss).sum() == pytest.approx(loss.mean(), rel=1e-6)


# ---- The history


class PlainHistory:
    """What the history should be, in lists: a ring of the last n losses at each t."""

    def __init__(self, T, n):
        self.losses, self.count = np.zeros((T, n), np.float32), np.zeros(T, np.int64)

    def update(self, ts, losses):
        for t, loss in zip(ts, losses, strict=True):
            self.losses[t, self.count[t] % self.losses.shape[1]] = loss
            self.count[t] += 1


@pytest.mark.parametrize("n", [1, 3])
def test_history_is_a_ring_for_each_t(n):
    generator = np.random.default_rng(n)
    plain, history, update = PlainHistory(5, n), init_loss_history(5, n), jax.jit(update_loss_history)
    batches = [generator.integers(0, 5, 16) for _ in range(6)]  # about 3 of each t, often more than n
    batches += [np.full(16, 2), np.arange(16) % 2]  # 16 and 8 of one t
    for ts in batches:
        losses = generator.random(16).astype(np.float32)
        plain.update(ts, losses)
        history = update(history, jnp.asarray(ts), jnp.asarray(losses))
        np.testing.assert_array_equal(history.losses, plain.losses)
        np.testing.assert_array_equal(history.count, plain.count)
    assert history.losses.dtype == jnp.float32
    assert history.count.dtype == jnp.int32


def test_history_keeps_its_dtypes(x64):
    history = init_loss_history(3, 2)
    after = update_loss_history(history, jnp.array([1, 2]), jnp.ones(2, jnp.float64))
    assert (after.losses.dtype, after.count.dtype) == (jnp.float32, jnp.int32)
