"""The likelihood by the probability-flow ODE, against the closed form of Gaussian data."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax import make_schedule
from ddpm_jax.core.errors import UsageError
from ddpm_jax.diffusion.ode import OdeLikelihood, ode_bits_per_dim, ode_log_density
from ddpm_jax.diffusion.process import Process

pytest.importorskip("diffrax", reason="needs the extra `ode`: pip install -e .[ode]")

SCHEDULE = make_schedule("linear", T=1000)
TABLE = np.log(SCHEDULE.sqrt_one_minus_alphas_cumprod / SCHEDULE.sqrt_alphas_cumprod)
VARIANCES = np.array(
    [0.02, 0.3]
)  # along the sum and the difference of two pixels, so that the Jacobian is not diagonal
ROTATION = np.array([[1, 1], [1, -1]]) / np.sqrt(2)


def model(prediction):
    """The exact output at any t for pixels whose sum and difference are independent Gaussians of these variances."""

    def model(x_t, t):
        minus_lambda = jnp.interp(t[0], jnp.arange(1000.0), jnp.asarray(TABLE, x_t.dtype))
        signal, noise = jnp.sqrt(jax.nn.sigmoid(-2 * minus_lambda)), jnp.sqrt(jax.nn.sigmoid(2 * minus_lambda))
        y = x_t[:, :, 0, 0] @ jnp.asarray(ROTATION, x_t.dtype)
        variances = jnp.asarray(VARIANCES, x_t.dtype)[None, :]
        eps = (noise * y / (signal**2 * variances + noise**2) @ jnp.asarray(ROTATION, x_t.dtype))[:, :, None, None]
        x_0 = (x_t - noise * eps) / signal
        return {"eps": eps, "x_0": x_0, "v": signal * eps - noise * x_0}[prediction]

    return model


def exact(x):
    """log N(x; 0, covariance of x_t at t = 0)."""
    alpha_bar = SCHEDULE.alphas_cumprod[0]
    variances = alpha_bar * VARIANCES + 1 - alpha_bar
    y = np.asarray(x, np.float64)[:, :, 0, 0] @ ROTATION
    return (-(y**2) / (2 * variances) - 0.5 * np.log(2 * np.pi * variances)).sum(-1)


@pytest.fixture(scope="module")
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(400, 2)) * np.sqrt(VARIANCES) @ ROTATION, jnp.float32)[
        :, :, None, None
    ]


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
def test_ode_likelihood_of_gaussian_data_is_the_analytic_value(prediction, x):
    """The mean over images and directions of the trace estimate within four standard errors, and a tolerance of 1e-3 nats."""
    x = jnp.tile(x[:4], (500, 1, 1, 1))
    solve = jax.jit(
        lambda x: ode_log_density(
            Process(SCHEDULE, prediction=prediction), model(prediction), jax.random.key(0), jnp.arange(2000), x
        )
    )
    errors = np.asarray(solve(x).log_density).reshape(500, 4) - exact(x[:4])
    assert (np.abs(errors.mean(0)) < 4 * errors.std(0) / np.sqrt(500) + 1e-3).all()
    assert errors.std() > 1e-3  # the estimate is random here


def test_the_flow_takes_data_to_a_standard_normal(x):
    solve = jax.jit(lambda x: ode_log_density(Process(SCHEDULE), model("eps"), jax.random.key(0), jnp.arange(400), x))
    end = np.asarray(solve(x).x_T)[:, :, 0, 0] @ ROTATION
    alpha_bar, first = SCHEDULE.alphas_cumprod[-1], SCHEDULE.alphas_cumprod[0]
    scale = np.sqrt((alpha_bar * VARIANCES + 1 - alpha_bar) / (first * VARIANCES + 1 - first))
    np.testing.assert_allclose(end, np.asarray(x)[:, :, 0, 0] @ ROTATION * scale, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_smaller_tolerance_takes_more_evaluations_and_image_i_depends_on_its_index(x):
    def solve(indices, x, **options):
        return ode_log_density(Process(SCHEDULE), model("eps"), jax.random.key(0), indices, x, **options)

    rough = solve(jnp.arange(4), x[:4], tolerance=1e-2)
    fine = solve(jnp.arange(4), x[:4], tolerance=1e-5)
    assert fine.evaluations > rough.evaluations > 6
    alone = solve(jnp.arange(2, 3), x[2:3], tolerance=1e-5)
    np.testing.assert_allclose(alone.log_density, fine.log_density[2:3], atol=1e-3)


def test_bits_per_dim_of_a_uniform_density():
    """A density of 1/2 on [-1, 1] in every dimension, cut into bins of 2/255."""
    x_T = jnp.zeros((1, 2, 2, 3))
    np.testing.assert_allclose(
        ode_bits_per_dim(OdeLikelihood(jnp.full(1, -12 * np.log(2)), x_T, 0)), np.log2(255), rtol=1e-6
    )


def test_what_has_no_flow_is_refused(x, monkeypatch):
    draws = jax.random.key(0), jnp.arange(4), x[:4]
    with pytest.raises(ValueError, match="expected eps, x_0 or v"):
        ode_log_density(Process(SCHEDULE, prediction="x_prev"), model("eps"), *draws)
    with pytest.raises(ValueError, match="some signal"):
        ode_log_density(Process(make_schedule("jsd")), model("eps"), *draws)
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(UsageError, match="needs diffrax"):
        ode_log_density(Process(SCHEDULE), model("eps"), *draws)
