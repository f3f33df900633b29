"""Guidance: what it computes in closed form, for every prediction, and where it costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import model_of

from ddpm_jax.diffusion.process import Process, predict_x_0
from ddpm_jax.diffusion.schedules import make_schedule
from ddpm_jax.sampling import make_sampler, sample_loop
from ddpm_jax.sampling.guidance import guide

SCHEDULE = make_schedule("linear", T=50, beta_start=2e-3, beta_end=0.4)
MEANS, STD = (-0.5, 0.4), 0.2  # of two classes of Gaussian data
x_t = jax.random.normal(jax.random.key(0), (6, 4, 4, 2))
t = jnp.array([0, 3, 10, 25, 40, 49])


def at(table):
    return jnp.asarray(table, jnp.float32)[t][:, None, None, None]


def of_class(mean):
    """E[x_0 | x_t, class] for data N(mean, STD^2)."""

    def x_0(schedule, x_t, t):
        signal, noise = (
            jnp.asarray(a, x_t.dtype)[t][:, None, None, None]
            for a in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )
        return mean + signal * STD**2 / (signal**2 * STD**2 + noise**2) * (x_t - signal * mean)

    return x_0


def of_no_class(schedule, x_t, t):
    """E[x_0 | x_t] for the classes in equal parts: the mean of theirs by p(class | x_t), over all pixels of an image."""
    signal, noise = (
        jnp.asarray(a, x_t.dtype)[t][:, None, None, None]
        for a in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )
    variance = signal**2 * STD**2 + noise**2
    logits = jnp.stack([-((x_t - signal * mean) ** 2 / (2 * variance)).sum((1, 2, 3)) for mean in MEANS])
    weights = jax.nn.softmax(logits, axis=0)[..., None, None, None]
    return sum(w * of_class(mean)(schedule, x_t, t) for w, mean in zip(weights, MEANS, strict=True))


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.0])
def test_guided_eps_is_the_closed_form(scale):
    """eps + (scale - 1) (eps - eps of no class), with eps = -sqrt(1 - alpha-bar) times the score: Ho & Salimans' Eq. (6)."""
    guided = guide(model_of(of_class(MEANS[1]), SCHEDULE), model_of(of_no_class, SCHEDULE), scale)(x_t, t)
    signal, noise = at(SCHEDULE.sqrt_alphas_cumprod), at(SCHEDULE.sqrt_one_minus_alphas_cumprod)
    variance = signal**2 * STD**2 + noise**2

    def log_density(x, mean):
        return (-((x - signal * mean) ** 2) / (2 * variance)).sum((1, 2, 3))

    of_one = jax.grad(lambda x: log_density(x, MEANS[1]).sum())(x_t)
    of_both = jax.grad(lambda x: jnp.logaddexp(*(log_density(x, mean) for mean in MEANS)).sum())(x_t)
    expected = -noise * (of_one + (scale - 1) * (of_one - of_both))
    np.testing.assert_allclose(guided, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", "x_prev"])
def test_every_prediction_is_guided_to_the_same_x_0(prediction):
    process, later = Process(SCHEDULE, prediction), jnp.maximum(t, 3)
    guided = guide(model_of(of_class(MEANS[1]), SCHEDULE, prediction), model_of(of_no_class, SCHEDULE, prediction), 3.0)
    x_0 = predict_x_0(process, guided(x_t, later), x_t, later)
    one, none = (f(SCHEDULE, x_t, later) for f in (of_class(MEANS[1]), of_no_class))
    np.testing.assert_allclose(x_0, none + 3 * (one - none), rtol=1e-3, atol=1e-3)


def test_scales_1_and_0_are_the_models_themselves():
    one, none = model_of(of_class(0.1), SCHEDULE), model_of(of_no_class, SCHEDULE)
    assert guide(one, none, 1.0, interval=(3, 5), rescale=0.5) is one
    assert guide(one, none, 0.0) is none


def test_variance_channels_are_the_models_own():
    one, none = model_of(of_class(0.1), SCHEDULE, spread=0.7), model_of(of_no_class, SCHEDULE, spread=0.2)
    guided = guide(one, none, 4.0)(x_t, t)
    assert guided.shape == (6, 4, 4, 4)
    np.testing.assert_array_equal(guided[..., 2:], np.float32(0.7))
    np.testing.assert_allclose(
        guided[..., :2], 4 * one(x_t, t)[..., :2] - 3 * none(x_t, t)[..., :2], rtol=1e-4, atol=1e-5
    )


def test_interval_guides_inside_of_it_alone():
    one, none = model_of(of_class(0.1), SCHEDULE), model_of(of_no_class, SCHEDULE)
    limited, everywhere = guide(one, none, 4.0, interval=(3, 25))(x_t, t), guide(one, none, 4.0)(x_t, t)
    inside = np.array([False, True, True, True, False, False])
    np.testing.assert_allclose(limited[inside], everywhere[inside], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(limited[~inside], one(x_t, t)[~inside], rtol=1e-5, atol=1e-5)


def test_null_model_is_not_evaluated_outside_of_the_interval():
    counted = []

    def none(x_t, t):
        jax.debug.callback(lambda t: counted.append(int(t[0])), t)
        return jnp.zeros_like(x_t)

    sampler = make_sampler(Process(SCHEDULE), "ddim", steps=50)
    guided = guide(model_of(of_class(0.1), SCHEDULE), none, 2.0, interval=(10, 19))
    jax.block_until_ready(sample_loop(sampler, guided, jax.random.key(0), jnp.arange(2), image_shape=(4, 4, 1)))
    jax.effects_barrier()
    assert sorted(counted) == list(range(10, 20))


def test_rescale_brings_back_the_deviation():
    one, none = model_of(of_class(0.1), SCHEDULE), model_of(of_no_class, SCHEDULE)
    guided, half, whole = (guide(one, none, 6.0, rescale=phi)(x_t, t) for phi in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(whole.std((1, 2, 3)), one(x_t, t).std((1, 2, 3)), rtol=1e-4)
    np.testing.assert_allclose(half, (guided + whole) / 2, rtol=1e-4, atol=1e-5)


def test_both_is_asked_instead_of_the_two():
    def never(x_t, t):
        raise AssertionError

    guided = guide(never, never, 3.0, both=lambda x_t, t: (x_t + 2, x_t))
    np.testing.assert_allclose(guided(x_t, t), x_t + 6, rtol=1e-6)


def test_wrong_options_are_refused():
    one = model_of(of_class(0.1), SCHEDULE)
    with pytest.raises(ValueError, match=r"rescale 1\.5"):
        guide(one, one, 2.0, rescale=1.5)
    with pytest.raises(ValueError, match="interval 5 to 3"):
        guide(one, one, 2.0, interval=(5, 3))


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpm++2m", "heun"])
def test_samples_at_scale_1_are_of_the_class(name):
    """Mean and deviation of Gaussian data to 4 standard errors, with the paper's 1000 steps; the mixture's are far off."""
    N, schedule = 4000, make_schedule("linear")
    guided = guide(model_of(of_class(MEANS[1]), schedule), model_of(of_no_class, schedule), 1.0)
    sampler = make_sampler(Process(schedule, variance="fixed_small"), name, clip=False)
    draw = jax.jit(lambda: sample_loop(sampler, guided, jax.random.key(1), jnp.arange(N), image_shape=(1, 1, 1)))
    x = np.asarray(draw()).reshape(-1)
    assert abs(x.mean() - MEANS[1]) < 4 * STD / np.sqrt(N)
    assert abs(x.std() - STD) < 4 * STD / np.sqrt(2 * N)
