"""Our samplers against diffusers' schedulers: the same network function, the same noise, step by step in float64.


Their tables, which are float32, are replaced by ours. What differs and is not compared: of DDIM with clipping diffusers keeps
the raw eps unless `use_clipped_model_output` is set, which is what we do; its DPM-Solver++ 3M halves the quadratic term (see
`dpm_solver`), so that the third order is compared with predictions on a straight line, where that term is 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import SHAPE

from ddpm_jax import make_schedule
from ddpm_jax.core import rng
from ddpm_jax.diffusion.process import Process
from ddpm_jax.sampling import choose_steps, reverse
from ddpm_jax.sampling.ancestral import ancestral
from ddpm_jax.sampling.ddim import ddim
from ddpm_jax.sampling.dpm_solver import dpm_solver

torch = pytest.importorskip("torch", reason="needs the extra `parity`: pip install -e .[parity]")
diffusers = pytest.importorskip("diffusers", reason="needs the extra `parity`: pip install -e .[parity]")

# diffusers 0.42 turns tensors into arrays in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KEY, INDICES = jax.random.key(7), jnp.arange(3)
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def eps(x, t):
    """A network that is no exact one: smooth, bounded, and far enough off that x_0 is clipped now and then."""
    tanh = torch.tanh if isinstance(x, torch.Tensor) else jnp.tanh
    return 0.8 * tanh(x + 0.3) + 0.1 * x + t / 5000


def model(x, t):
    return eps(x, t.astype(x.dtype)[:, None, None, None])


def ours(sampler, x_T):
    _, seen = reverse(sampler, model, KEY, INDICES, jnp.asarray(x_T), watch=np.arange(len(sampler)))
    return np.asarray(seen.x)


def noise(k):
    keys = rng.image_keys(KEY, INDICES)
    return torch.tensor(np.asarray(rng.image_normal(keys, k, SHAPE, jnp.float64)))


def in_float64(scheduler):
    """The scheduler with float64 tables."""
    alphas_cumprod = torch.tensor(make_schedule("linear").alphas_cumprod)
    scheduler.betas = torch.tensor(make_schedule("linear").betas)
    scheduler.alphas_cumprod, scheduler.alphas = alphas_cumprod, 1 - scheduler.betas
    return scheduler


def theirs(scheduler, x_T, **options):
    x, trajectory = torch.tensor(x_T), []
    for k, t in enumerate(scheduler.timesteps):
        extra = {name: value(k + 1) for name, value in options.items()}
        x = scheduler.step(eps(x, int(t)), t, x, **extra).prev_sample
        trajectory.append(x.numpy())
    return np.stack(trajectory)


@pytest.fixture
def x_T():
    return np.random.default_rng(0).normal(size=(3, *SHAPE))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("n", "clip", "variance"),
    [(1000, True, "fixed_large"), (50, True, "fixed_small"), (50, False, "fixed_small"), (50, False, "fixed_large")],
)
def test_ancestral_sampling_is_diffusers_ddpm(n, clip, variance, x_T, x64, monkeypatch):
    scheduler = in_float64(diffusers.DDPMScheduler(**BETAS, variance_type=variance, clip_sample=clip))
    scheduler.set_timesteps(n)
    step = iter(range(1, n + 1))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise(next(step)))
    sampler = ancestral(
        Process(make_schedule("linear"), variance=variance), scheduler.timesteps.numpy()[::-1], clip=clip
    )
    assert_close(ours(sampler, x_T), theirs(scheduler, x_T))


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_is_diffusers_ddim(spacing, clip, eta, x_T, x64):
    scheduler = in_float64(diffusers.DDIMScheduler(**BETAS, clip_sample=clip, timestep_spacing=spacing))
    scheduler.set_timesteps(50)
    sampler = ddim(Process(make_schedule("linear")), scheduler.timesteps.numpy()[::-1], eta=eta, clip=clip)
    options = {"eta": lambda k: eta, "use_clipped_model_output": lambda k: clip}
    if eta:
        options["variance_noise"] = noise
    assert_close(ours(sampler, x_T), theirs(scheduler, x_T, **options))


@pytest.mark.parametrize("n", [10, 30])
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_is_diffusers_multistep(order, n, x_T, x64):
    scheduler = in_float64(diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=order))
    scheduler.set_timesteps(n)
    sampler = dpm_solver(Process(make_schedule("linear")), scheduler.timesteps.numpy()[::-1], order=order, clip=False)
    assert_close(ours(sampler, x_T), theirs(scheduler, x_T))


def test_dpm_solver_of_third_order_is_diffusers_but_for_the_quadratic_term(x_T, x64):
    """The linear parts of the coefficients agree: for predictions on a straight line in lambda both do the same."""
    schedule = make_schedule("linear")
    scheduler = in_float64(diffusers.DPMSolverMultistepScheduler(**BETAS, solver_order=3))
    scheduler.set_timesteps(30)
    steps = scheduler.timesteps.numpy()[::-1].copy()
    lambdas = np.log(schedule.sqrt_alphas_cumprod / schedule.sqrt_one_minus_alphas_cumprod)
    scheduler.config.prediction_type = "sample"
    x, trajectory = torch.tensor(x_T), []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.full_like(x, 0.1 * lambdas[int(t)]), t, x).prev_sample
        trajectory.append(x.numpy())

    def on_a_line(x, t):
        return jnp.broadcast_to(0.1 * jnp.asarray(lambdas)[t][:, None, None, None], x.shape)

    sampler = dpm_solver(Process(schedule, prediction="x_0"), steps, order=3, clip=False)
    _, seen = reverse(sampler, on_a_line, KEY, INDICES, jnp.asarray(x_T), watch=np.arange(30))
    assert_close(np.asarray(seen.x)[2:], np.stack(trajectory)[2:])


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [7, 50, 333])
def test_spacings_are_diffusers(spacing, n):
    scheduler = in_float64(diffusers.DDIMScheduler(**BETAS, timestep_spacing=spacing))
    scheduler.set_timesteps(n)
    ours = choose_steps(make_schedule("linear"), n, spacing)
    assert np.abs(ours - scheduler.timesteps.numpy()[::-1]).max() <= (spacing == "trailing")  # halves round either way
