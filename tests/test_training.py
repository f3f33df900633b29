"""The training step: what it computes, and what may not change it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from spy import seen_by_the_loss
from tiny import experiment, tiny

from ddpm_jax.benchmark.programs import image_shapes
from ddpm_jax.benchmark.topology import collectives
from ddpm_jax.core import sharding
from ddpm_jax.core.rng import Purpose
from ddpm_jax.data import make_feed, open_source
from ddpm_jax.generation.generator import make_generator
from ddpm_jax.training import step as training


def run(config, steps, *, mesh=None, dispatch=None, state=None):
    """The state after `steps` steps and every step's metrics, `dispatch` steps in one call."""
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    dispatch = dispatch or config.train.steps_per_dispatch
    state = state or training.init_sharded_state(experiment(config), mesh)
    feed = make_feed(config, open_source(config.data), mesh)
    step, metrics = training.make_train_step(experiment(config), mesh=mesh), []
    for first in range(0, steps, dispatch):
        state, m = step(state, *feed(first, dispatch))
        metrics.append(jax.device_get(m))
    return jax.device_get(state), {k: np.concatenate([m[k] for m in metrics]) for k in metrics[0]}


def assert_metrics_agree(actual, expected):
    """Losses, and gradient norms, which would tell of a wrong scale that clipping and Adam hide."""
    np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(actual["grad_norm"], expected["grad_norm"], rtol=1e-4)


def equal(a, b):
    """Whether two pytrees are the same bit for bit."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True)
    )


# Compiling a step is what these tests cost, so they share as few programs as they can.
STEPS = 6
ONE_LEVEL = {"ch_mult": (1,), "attn_resolutions": (8,)}
SMALL = tiny(model=ONE_LEVEL, data={"cache": "device"})


@pytest.fixture(scope="module")
def reference():
    return run(SMALL, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", [1, 3])
def test_scans_of_any_length_agree_bit_for_bit(dispatch, reference):
    assert equal(run(SMALL, STEPS, dispatch=dispatch), reference)


def test_a_run_is_repeatable_bit_for_bit(reference):
    assert equal(run(SMALL, STEPS), reference)


@pytest.mark.slow
def test_where_the_data_are_cached_changes_no_bit(reference):
    assert equal(run(tiny(model=ONE_LEVEL, data={"cache": "host"}), STEPS), reference)


@pytest.mark.slow
def test_accumulation_changes_memory_only(reference):
    _, metrics = run(tiny(model=ONE_LEVEL, train={"accumulation": 4}), STEPS)
    assert_metrics_agree(metrics, reference[1])


@pytest.mark.slow
def test_rematerialisation_changes_memory_only(reference):
    _, metrics = run(tiny(model=ONE_LEVEL | {"remat": True}), STEPS)
    assert_metrics_agree(metrics, reference[1])


def test_the_paper_learning_rate_is_zero_at_step_0_and_reached_at_the_last_warmup_step():
    lr = experiment(tiny(train={"lr": 2e-4, "warmup_steps": 5000})).learning_rate
    assert float(lr(0)) == 0.0
    np.testing.assert_allclose([lr(2500), lr(5000), lr(800_000)], [1e-4, 2e-4, 2e-4], rtol=1e-6)
    assert float(experiment(tiny(train={"lr": 2e-4, "warmup_steps": 0})).learning_rate(0)) == pytest.approx(2e-4)


def test_the_state_starts_with_a_copy_as_ema_and_the_first_step_moves_nothing():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    start = training.init_sharded_state(experiment(SMALL), mesh)
    assert equal(start.params, start.ema_params)
    fresh = jax.device_get(start.params)
    one, _ = run(SMALL, 1, dispatch=1, state=start)
    assert equal(one.params, fresh)  # the learning rate is 0 at step 0
    assert one.step == 1


def adam_in_numpy(gradients, config):
    """The parameters' path from 0 under clipping, Adam, warm-up and EMA, written out in float64."""
    train = config.train
    p = ema = m = v = 0.0
    for i, g in enumerate(gradients):
        g = np.asarray(g, np.float64)
        g = g * min(1.0, train.grad_clip / np.sqrt((g**2).sum()))
        m = train.adam_b1 * m + (1 - train.adam_b1) * g
        v = train.adam_b2 * v + (1 - train.adam_b2) * g**2
        step = m / (1 - train.adam_b1 ** (i + 1)) / (np.sqrt(v / (1 - train.adam_b2 ** (i + 1))) + train.adam_eps)
        p = p - train.lr * min(i / train.warmup_steps, 1.0) * step
        ema = train.ema_decay * ema + (1 - train.ema_decay) * p
    return p, ema


def test_optimizer_is_clip_adam_warmup_and_flat_ema():
    config = tiny(train={"grad_clip": 1.0, "ema_decay": 0.9})
    gradients = np.random.default_rng(0).normal(size=(20, 5)) * np.array([[0.1], [10.0]] * 10)
    optimizer = experiment(config).optimizer
    params = ema = jnp.zeros(5)
    state = optimizer.init(params)
    for g in gradients:
        updates, state = optimizer.update(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        ema = optax.incremental_update(params, ema, 1.0 - config.train.ema_decay)
    expected, expected_ema = adam_in_numpy(gradients, config)
    np.testing.assert_allclose(params, expected, rtol=1e-4)
    np.testing.assert_allclose(ema, expected_ema, rtol=1e-4)


@pytest.mark.slow
def test_ema_of_the_step_is_the_flat_average_of_the_parameters():
    five, _ = run(SMALL, 5, dispatch=1)
    six, _ = run(SMALL, 6, dispatch=1)
    expected = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, five.ema_params, six.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), six.ema_params, expected)
    assert not equal(six.ema_params, six.params)


def test_draws_of_a_step_are_those_of_the_contract():
    config, shape = tiny(), (16, 8, 8, 1)
    draws = training.draw(experiment(config), jnp.int32(7), shape, None)
    root = jax.random.key(config.seed)

    def key(purpose):
        return jax.random.fold_in(jax.random.fold_in(root, int(purpose)), 7)

    np.testing.assert_array_equal(draws.t, jax.random.randint(key(Purpose.T), (16,), 0, 20, jnp.int32))
    np.testing.assert_array_equal(draws.eps, jax.random.normal(key(Purpose.EPS), shape))
    np.testing.assert_array_equal(draws.flip, jax.random.bernoulli(key(Purpose.FLIP), shape=(16,)))
    dropout = jax.vmap(lambda i: jax.random.fold_in(key(Purpose.DROPOUT), i))(jnp.arange(16))
    np.testing.assert_array_equal(jax.random.key_data(draws.dropout_keys), jax.random.key_data(dropout))


def test_flips_hit_about_half_the_images_and_change_between_steps():
    config = tiny()
    flips = np.stack([training.draw(experiment(config), jnp.int32(s), (128, 8, 8, 1), None).flip for s in range(20)])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(flips.size)
    assert all((a != b).any() for a, b in itertools.pairwise(flips))


@pytest.mark.parametrize("flip", [True, False])
def test_flip_mirrors_left_to_right_before_the_noise(flip, monkeypatch):
    """The loss sees images flipped by hand where the draw says so, and as they are without flips; never at load time only."""
    config = tiny(train={"flip": flip})
    images, seen = seen_by_the_loss(config, monkeypatch, step=3)
    drawn = np.asarray(training.draw(experiment(config), jnp.int32(3), images.shape, None).flip) & flip
    assert drawn.any() == flip
    by_hand = np.where(drawn[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_allclose(seen, by_hand.astype(np.float32) / np.float32(127.5) - 1, atol=1e-7)


SMALLER = ONE_LEVEL | {"dropout": 0.0}


@pytest.mark.parametrize(
    "diffusion",
    [
        {"prediction": "v", "loss_weighting": "min_snr"},
        {"variance": "learned_range", "loss": "rescaled_hybrid", "t_sampler": "loss_history"},
        {"variance": "learned", "loss": "vb", "t_sampler": "loss_history", "schedule": "cosine"},
    ],
    ids=lambda d: "-".join(d.values()),
)
@pytest.mark.slow
def test_every_kind_of_loss_trains(diffusion):
    config = tiny(diffusion=diffusion, train={"lr": 3e-3, "warmup_steps": 0, "flip": False}, model=SMALLER)
    state, metrics = run(config, 30, dispatch=10)
    assert np.isfinite(metrics["loss"]).all()
    assert metrics["loss"][-10:].mean() < metrics["loss"][:3].mean()
    if state.loss_history is not None:
        assert state.loss_history.count.sum() == 30 * 16


@pytest.mark.slow
def test_loss_falls_on_digits():
    config = tiny(train={"lr": 3e-3, "flip": False}, model=SMALLER)
    _, metrics = run(config, 60, dispatch=20)
    assert metrics["loss"][-10:].mean() < 0.6 * metrics["loss"][:5].mean()


@pytest.mark.slow
def test_state_is_born_split_over_fsdp_and_the_losses_agree():
    config = tiny(train={"fsdp": 2}, model=SMALLER | {"ch": 64})
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[:2])
    state = training.init_sharded_state(experiment(config), mesh)
    kernel = state.params["up_0_block_0"]["conv1"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size
    _, split = run(config, 4, mesh=mesh)
    _, whole = run(tiny(model=SMALLER | {"ch": 64}), 4)
    assert_metrics_agree(split, whole)


def test_a_split_state_is_gathered_once_a_step_and_no_image_moves():
    """Left to itself, XLA splits convolutions by channels and exchanges images: more memory and traffic than a whole state's."""
    config = tiny(train={"fsdp": 8}, model=SMALLER | {"ch": 64})
    mesh = sharding.make_mesh(fsdp=8)
    state = training.abstract_state(experiment(config), mesh)
    step = training.make_train_step(experiment(config), mesh=mesh)
    found = collectives(step.lower(state, image_shapes(experiment(config), 1), None).compile().as_text())
    divided = [4 * a.size for a in jax.tree.leaves(state.params) if not a.sharding.is_fully_replicated]
    assert len(divided) >= 3
    assert sum(one.bytes for one in found if one.kind == "all-gather") == sum(divided)
    assert {one.kind for one in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    indices, key = jax.ShapeDtypeStruct((8,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    draw = make_generator(experiment(config), mesh).lower(state.params, key, indices).compile()
    drawn = collectives(draw.as_text())  # of a grid: the parameters, and the images at the end
    assert sum(one.bytes for one in drawn if one.kind == "all-gather") == sum(divided) + 8 * 8 * 8
    assert {one.kind for one in drawn} == {"all-gather"}
    summed = 4 * sum(a.size for a in jax.tree.leaves(state.params))
    assert sum(one.bytes for one in found if one.kind == "all-reduce") <= 1.01 * summed + 1000
