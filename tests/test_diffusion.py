"""q(x_t | x_0), its posterior, the four predictions and p(x_{t-1} | x_t), against Gaussian algebra in float64 NumPy."""

import inspect
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion.process import (
    Prediction,
    Process,
    Variance,
    at,
    p_mean_logvar,
    predict_from_x_0,
    predict_x_0,
    q_mean_logvar,
    q_posterior,
    q_sample,
    split_output,
    target,
)
from ddpm_jax.diffusion.schedules import BETAS, make_schedule

T = 12
SHAPE = (T, 2, 2, 3)  # one image for every t
t_all = np.arange(T, dtype=np.int32)

names = pytest.mark.parametrize("name", BETAS)
predictions = pytest.mark.parametrize("prediction", get_args(Prediction))
variances = pytest.mark.parametrize("variance", get_args(Variance))


def short(name="linear"):
    return make_schedule(name, T=T, beta_start=0.01, beta_end=0.4)


def column(values):
    """A value for each t, shaped to meet images of SHAPE."""
    return np.asarray(values, np.float64).reshape(T, 1, 1, 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape or SHAPE)


def forward_moments(betas):
    """Factor of x_0 and variance of q(x_t | x_0) for each t, by composing Eq. (2) step after step."""
    factor, variance, moments = 1.0, 0.0, []
    for beta in betas:
        factor, variance = factor * np.sqrt(1 - beta), variance * (1 - beta) + beta
        moments.append((factor, variance))
    return map(column, zip(*moments, strict=True))


def bayes_posterior(betas, x_0, x_t):
    """Mean and variance of x_{t-1} given x_t and x_0: q(x_{t-1} | x_0) times the likelihood q(x_t | x_{t-1}).

    A product of Gaussians adds precisions. Written with variances, so that t = 0 (no noise before it) is no special case.
    """
    factor, variance = forward_moments(betas)
    prior_mean = np.concatenate([np.ones((1, 1, 1, 1)), factor[:-1]]) * x_0
    prior_variance = np.concatenate([np.zeros((1, 1, 1, 1)), variance[:-1]])
    beta = column(betas)
    gain = prior_variance * np.sqrt(1 - beta) / (prior_variance * (1 - beta) + beta)  # Kalman's
    return prior_mean + gain * (x_t - np.sqrt(1 - beta) * prior_mean), prior_variance * (1 - gain * np.sqrt(1 - beta))


def outputs_for(betas, x_0, eps):
    """What stands for (x_0, eps) in each prediction."""
    factor, variance = forward_moments(betas)
    x_t = factor * x_0 + np.sqrt(variance) * eps
    return {
        "eps": eps,
        "x_0": x_0,
        "x_prev": bayes_posterior(betas, x_0, x_t)[0],
        "v": factor * eps - np.sqrt(variance) * x_0,
    }


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(np.broadcast_to(actual, np.shape(expected)), expected, rtol=tolerance, atol=tolerance)


def images(*arrays):
    return tuple(jnp.asarray(array) for array in arrays)


# ---- q(x_t | x_0)


@names
def test_q_has_the_moments_of_the_steps_composed(name, x64):
    schedule = short(name)
    factor, variance = forward_moments(schedule.betas)
    x_0, eps = images(draw(0), draw(1))
    q = q_mean_logvar(schedule, x_0, jnp.asarray(t_all))
    close(q.mean, factor * x_0)
    close(q.logvar, np.log(variance))
    close(q_sample(schedule, x_0, jnp.asarray(t_all), eps), factor * x_0 + np.sqrt(variance) * eps)


def test_q_sample_is_distributed_as_the_chain_walked_step_by_step():
    schedule, n = short(), 40_000
    walk, generator = np.full(n, 0.7), np.random.default_rng(2)
    eps = jax.random.normal(jax.random.key(3), (n, 1, 1, 1))
    x_0 = jnp.full((n, 1, 1, 1), 0.7)
    for t, beta in enumerate(schedule.betas):
        walk = np.sqrt(1 - beta) * walk + np.sqrt(beta) * generator.standard_normal(n)
        if t in (0, 5, T - 1):
            x_t = np.asarray(q_sample(schedule, x_0, jnp.full(n, t), eps), np.float64)
            std = walk.std()
            assert x_t.mean() == pytest.approx(walk.mean(), abs=5 * std * np.sqrt(2 / n))
            assert x_t.std() == pytest.approx(std, rel=5 / np.sqrt(n))


def test_variance_keeps_its_precision_where_the_schedule_is_an_argument():
    schedule = make_schedule("linear")
    x_0, t = jnp.zeros((2, 1, 1, 1)), jnp.array([0, 1])
    q = jax.jit(q_mean_logvar)(schedule, x_0, t)  # the tables are float32 inside
    beta_1, beta_2 = 1e-4, 1e-4 + 0.0199 / 999
    np.testing.assert_allclose(np.exp(q.logvar.ravel()), [beta_1, beta_1 + beta_2 - beta_1 * beta_2], rtol=1e-6)


def test_tables_are_cast_to_the_images_dtype():
    table = short().betas
    for dtype in (jnp.float32, jnp.bfloat16):
        entry = at(table, jnp.array([0, 3]), jnp.zeros((2, 4, 4, 1), dtype))
        assert entry.dtype == dtype
        assert entry.shape == (2, 1, 1, 1)


# ---- The posterior


@names
def test_posterior_matches_bayes_rule(name, x64):
    schedule = short(name)
    x_0, x_t = images(draw(0), draw(1))
    mean, variance = bayes_posterior(schedule.betas, x_0, x_t)
    q = q_posterior(schedule, x_0, x_t, jnp.asarray(t_all))
    close(q.mean, mean)
    close(q.logvar[1:], np.log(variance[1:]))
    close(q.logvar[:1], np.log(variance[1:2]))


def test_posterior_of_t_0_is_x_0(x64):
    x_0, x_t = images(draw(0, 2, 2, 2, 1), draw(1, 2, 2, 2, 1))
    q = q_posterior(make_schedule("linear"), x_0, x_t, jnp.zeros(2, jnp.int32))
    close(q.mean, x_0)


# ---- Predictions


@names
@predictions
def test_output_stands_for_x_0(name, prediction, x64):
    schedule = short(name)
    x_0, eps, t = images(draw(0), draw(1), t_all)
    x_t = q_sample(schedule, x_0, t, eps)
    output = jnp.asarray(outputs_for(schedule.betas, x_0, eps)[prediction])
    possible = slice(None)
    if prediction == "eps":
        possible = schedule.alphas_cumprod > 0  # jsd's last x_t holds no x_0, and eps alone cannot give it back
    x_0_hat = predict_x_0(Process(schedule, prediction=prediction), output[possible], x_t[possible], t[possible])
    close(x_0_hat, x_0[possible])
    close(predict_from_x_0(Process(schedule, prediction=prediction), x_0, x_t, t), output)


@predictions
def test_conversions_round_trip_for_any_output(prediction, x64):
    schedule = short()
    output, x_t, t = images(draw(0), draw(1), t_all)
    x_0 = predict_x_0(Process(schedule, prediction=prediction), output, x_t, t)
    close(predict_from_x_0(Process(schedule, prediction=prediction), x_0, x_t, t), output)


@predictions
def test_target_is_what_a_perfect_network_puts_out(prediction, x64):
    schedule = short()
    x_0, eps, t = images(draw(0), draw(1), t_all)
    x_t = q_sample(schedule, x_0, t, eps)
    expected = outputs_for(schedule.betas, x_0, eps)[prediction]
    close(target(Process(schedule, prediction=prediction), x_0, x_t, t, eps), expected)


def test_targets_stay_finite_where_no_signal_is_left():
    schedule = make_schedule("jsd", T=4)
    x_0, eps = images(draw(0, 1, 2, 2, 1).astype(np.float32), draw(1, 1, 2, 2, 1).astype(np.float32))
    t = jnp.array([3])
    for prediction in get_args(Prediction):
        assert np.all(np.isfinite(target(Process(schedule, prediction=prediction), x_0, eps, t, eps))), prediction
        assert np.all(np.isfinite(predict_from_x_0(Process(schedule, prediction=prediction), x_0, eps, t))), prediction
    close(predict_x_0(Process(schedule, prediction="v"), -x_0, eps, t), x_0)


# ---- p(x_{t-1} | x_t)


def expected_logvar(schedule, variance, var_part):
    _, posterior = bayes_posterior(schedule.betas, 0, 0)
    small = np.log(np.concatenate([posterior[1:2], posterior[1:]]))
    beta = np.log(column(schedule.betas))
    return {
        "fixed_small": small,
        "fixed_large": np.concatenate([small[:1], beta[1:]]),
        "learned": var_part,
        "learned_range": (1 - var_part) / 2 * small + (1 + var_part) / 2 * beta,
    }[variance]


@predictions
@variances
@pytest.mark.parametrize("clip", [False, True])
def test_p_mean_logvar_follows_from_the_x_0_that_the_output_stands_for(prediction, variance, clip, x64):
    schedule = short()
    x_0, eps, var_part = 1.5 * draw(0), draw(1), draw(2)  # many pixels lie outside [-1, 1]
    assert (np.abs(x_0) > 1).mean() > 0.3
    x_t = np.asarray(q_sample(schedule, *images(x_0, t_all, eps)))
    mean_part = outputs_for(schedule.betas, x_0, eps)[prediction]
    output = mean_part if "fixed" in variance else np.concatenate([mean_part, var_part], axis=-1)

    p = p_mean_logvar(
        Process(schedule, prediction=prediction, variance=variance), *images(output, x_t, t_all), clip=clip
    )

    x_0_hat = np.clip(x_0, -1, 1) if clip else x_0
    close(p.x_0, x_0_hat)
    # x_prev is the mean as it comes. For the others x_0 is clipped first, then the mean is formed from it.
    close(p.mean, mean_part if prediction == "x_prev" else bayes_posterior(schedule.betas, x_0_hat, x_t)[0])
    close(p.logvar, expected_logvar(schedule, variance, var_part))


def test_eps_mean_is_eq_11(x64):
    schedule = short()
    x_t, eps_hat, t = images(draw(0), draw(1), t_all)
    beta, alphas_cumprod = column(schedule.betas), column(np.cumprod(1 - schedule.betas))
    expected = (x_t - beta / np.sqrt(1 - alphas_cumprod) * eps_hat) / np.sqrt(1 - beta)
    close(p_mean_logvar(Process(schedule), eps_hat, x_t, t, clip=False).mean, expected)


def test_clipping_x_0_is_not_clipping_the_mean(x64):
    schedule = short()
    x_t = jnp.full((1, 1, 1, 1), 5.0)
    output = jnp.full((1, 1, 1, 1), 3.0)
    mean = p_mean_logvar(Process(schedule, prediction="x_0"), output, x_t, jnp.array([T - 1])).mean
    expected = bayes_posterior(schedule.betas, 1.0, 5.0)[0][T - 1]
    assert expected > 1.5  # so a mean clipped afterwards would be 1, and one of an unclipped x_0 larger
    close(mean[0], expected)


@names
def test_learned_range_ends_at_the_posterior_and_at_beta(name, x64):
    schedule = short(name)
    zeros = np.zeros(SHAPE)
    posterior = bayes_posterior(schedule.betas, 0, 0)[1]
    for v, expected in ((-1, np.concatenate([posterior[1:2], posterior[1:]])), (1, column(schedule.betas))):
        output = np.concatenate([zeros, zeros + v], axis=-1)
        p = p_mean_logvar(Process(schedule, prediction="x_0", variance="learned_range"), *images(output, zeros, t_all))
        close(p.logvar, np.broadcast_to(np.log(expected), SHAPE))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_fixed_logvars_of_t_0_are_t_1s_posterior(variance, x64):
    schedule = make_schedule("linear")
    x = jnp.zeros((1, 1, 1, 1))
    p = p_mean_logvar(Process(schedule, variance=variance), x, x, jnp.array([0]))
    beta_1, beta_2 = 1e-4, 1e-4 + 0.0199 / 999
    close(p.logvar.ravel(), [np.log(beta_2 * beta_1 / (beta_1 + beta_2 - beta_1 * beta_2))])


@predictions
def test_process_may_be_an_argument_of_jit(prediction):
    process = Process(short(), prediction=prediction, variance="learned_range")
    output, x_t = draw(0, T, 2, 2, 6).astype(np.float32), draw(1).astype(np.float32)
    traced = jax.jit(p_mean_logvar)(process, output, x_t, t_all)
    eager = p_mean_logvar(process, *images(output, x_t, t_all))
    for a, b in zip(traced, eager, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_words_of_a_process_are_part_of_what_is_compiled():
    """Two processes that differ in a word alone do not share a compiled program; two equal ones do."""
    traced = []

    @jax.jit
    def mean(process, output, x_t, t):
        traced.append(process.prediction)
        return p_mean_logvar(process, output, x_t, t).mean

    arguments = draw(0).astype(np.float32), draw(1).astype(np.float32), t_all
    eps, x_0, again = (mean(Process(short(), prediction=word), *arguments) for word in ("eps", "x_0", "eps"))
    assert traced == ["eps", "x_0"]
    assert np.array_equal(eps, again)
    assert not np.allclose(eps, x_0)


# ---- Outputs and errors


def refuses(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@variances
def test_output_splits_into_mean_and_variance(variance):
    output = jnp.arange(8.0).reshape(1, 1, 2, 4)
    mean_part, var_part = split_output(Process(short(), variance=variance), output)
    if "fixed" in variance:
        assert var_part is None
        np.testing.assert_array_equal(mean_part, output)
    else:
        np.testing.assert_array_equal(mean_part, output[..., :2])
        np.testing.assert_array_equal(var_part, output[..., 2:])


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_odd_channels_hold_no_learned_variance(variance):
    with refuses(f"got 3 output channels, expected an even number for variance {variance!r}"):
        split_output(Process(short(), variance=variance), jnp.zeros((1, 2, 2, 3)))


def test_unknown_words_are_refused_with_the_known_ones():
    process, x, t = Process(short()), jnp.zeros((1, 2, 2, 2)), jnp.array([3])
    object.__setattr__(process, "prediction", "noise")
    object.__setattr__(process, "variance", "fixed")
    # Unwrapped, since the checks of the tests' own would refuse them first.
    for function in map(inspect.unwrap, (predict_x_0, predict_from_x_0)):
        with refuses("got prediction 'noise', expected one of eps, x_0, x_prev, v"):
            function(process, x, x, t)
    with refuses("got variance 'fixed', expected one of fixed_small, fixed_large, learned, learned_range"):
        inspect.unwrap(split_output)(process, x)
