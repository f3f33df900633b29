"""Sampling: Algorithm 2 step by step, and the same image i wherever and beside whatever it is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import experiment, tiny

from ddpm_jax import make_schedule, sample
from ddpm_jax.core import rng, sharding
from ddpm_jax.data.pixels import to_uint8
from ddpm_jax.diffusion.process import Process
from ddpm_jax.generation.generator import batch_ranges, generate_batches, make_generator, sample_key
from ddpm_jax.training import step as training

SHAPE = (2, 2, 1)


def test_the_last_step_adds_no_noise():
    """With T = 2 the result is the mean of the last step, computed by hand from the noise of the contract."""
    schedule = make_schedule("linear", T=2, beta_start=0.1, beta_end=0.5)
    key = jax.random.key(0)
    x = sample(
        Process(schedule, prediction="x_0"), lambda x, t: jnp.zeros_like(x), key, jnp.arange(3), image_shape=SHAPE
    )
    keys = [jax.random.fold_in(jax.random.fold_in(key, i), k) for i in range(3) for k in (0, 1)]
    noise = np.stack([jax.random.normal(k, SHAPE) for k in keys]).reshape(3, 2, *SHAPE)
    x_1 = schedule.posterior_mean_coef2[1] * noise[:, 0] + np.sqrt(0.5) * noise[:, 1]
    np.testing.assert_allclose(x, schedule.posterior_mean_coef2[0] * x_1, rtol=1e-5, atol=1e-7)


def test_x_0_is_clipped_before_the_mean():
    """A prediction far outside gives the mean of a clipped x_0, which lies inside, not a clipped mean."""
    schedule = make_schedule("linear", T=2, beta_start=0.1, beta_end=0.5)
    for clip, expected in ((True, 1.0), (False, 5.0)):
        x = sample(
            Process(schedule, prediction="x_0"),
            lambda x, t: jnp.full_like(x, 5.0),
            jax.random.key(0),
            jnp.arange(1),
            image_shape=SHAPE,
            clip=clip,
        )
        np.testing.assert_allclose(x, expected, rtol=1e-5)  # at t = 0 the posterior mean is x_0 itself


def test_one_network_evaluation_is_traced_and_no_python_runs_per_step():
    calls = []

    def model(x, t):
        calls.append(t)
        return jnp.zeros_like(x)

    draw = jax.jit(lambda key: sample(Process(make_schedule("linear")), model, key, jnp.arange(2), image_shape=SHAPE))
    draw(jax.random.key(0))
    draw(jax.random.key(1))
    assert len(calls) == 1


@pytest.fixture(scope="module")
def trained():
    """The tiny network, its zero layers drawn large enough to matter, and its images 0..15 in one batch."""
    config = tiny(model={"ch_mult": (1,), "attn_resolutions": (8,)})
    params = jax.jit(lambda: training.init_state(experiment(config), jax.random.key(0)).params)()
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(5), len(leaves))
    leaves = [a + 0.05 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    params = jax.device_get(jax.tree.unflatten(structure, leaves))
    return config, params, images(config, params, jax.devices()[:1], np.arange(16))


def images(config, params, devices, indices):
    generator = make_generator(experiment(config), sharding.make_mesh(devices=devices))
    return np.asarray(generator(params, sample_key(3), jnp.asarray(indices, jnp.int32)), int)


@pytest.mark.parametrize("indices", [[11], [3, 0], [15, 2, 7, 4, 1, 0, 9, 8]], ids=len)
def test_image_i_does_not_depend_on_the_batch_it_is_in(trained, indices):
    config, params, all_images = trained
    assert np.abs(images(config, params, jax.devices()[:1], indices) - all_images[indices]).max() <= 1


@pytest.mark.parametrize("count", [2, 4, 8])
def test_image_i_does_not_depend_on_the_number_of_devices(trained, count):
    config, params, all_images = trained
    assert np.abs(images(config, params, jax.devices()[:count], np.arange(16)) - all_images).max() <= 1


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_noise_of_image_i_is_identical_on_any_devices_and_in_any_batch(count):
    split = sharding.split(sharding.make_mesh(devices=jax.devices()[:count]))
    draw = jax.jit(lambda i: rng.image_normal(rng.image_keys(sample_key(3), i), 5, SHAPE), out_shardings=split)
    alone = [jax.random.normal(jax.random.fold_in(jax.random.fold_in(sample_key(3), i), 5), SHAPE) for i in range(8)]
    np.testing.assert_array_equal(draw(jnp.arange(8)), np.stack(alone))


def test_batches_are_fixed_ranges_and_the_padding_is_left_out(trained):
    config, params, all_images = trained
    mesh = sharding.make_mesh(devices=jax.devices()[:2])
    ranges = batch_ranges(range(13), batch_size=7, num_devices=mesh.devices.size)
    assert list(ranges) == [range(8), range(8, 13)]
    batches = list(generate_batches(make_generator(experiment(config), mesh), params, sample_key(3), ranges, size=8))
    assert [part for part, _ in batches] == [range(8), range(8, 13)]
    together = np.concatenate([b for _, b in batches]).astype(int)
    assert np.abs(together - all_images[:13]).max() <= 1


def test_a_batch_is_started_before_the_one_before_it_is_taken():
    seen = []

    def generate(params, key, indices):
        seen.append(("started", indices.tolist()))
        return indices

    for part, images in generate_batches(generate, None, None, [range(3), range(3, 5)], size=3):
        assert images.tolist() == list(part)
        seen.append(("taken", [*part]))
    assert seen == [("started", [0, 1, 2]), ("started", [3, 4, 5]), ("taken", [0, 1, 2]), ("taken", [3, 4])]
    assert not list(generate_batches(generate, None, None, [], size=3))


def test_pixels_are_rounded_and_clipped_to_uint8():
    x = np.array([-2.0, -1.0, -1 + 2 / 255, 0.0, 0.999, 1.0, 3.0], np.float32)
    np.testing.assert_array_equal(to_uint8(x), [0, 0, 1, 128, 255, 255, 255])
    levels = np.arange(256)
    np.testing.assert_array_equal(to_uint8((levels / 127.5 - 1).astype(np.float32)), levels)


def test_another_seed_gives_other_images(trained):
    config, params, all_images = trained
    generator = make_generator(experiment(config), sharding.make_mesh(devices=jax.devices()[:1]))
    assert (np.asarray(generator(params, sample_key(4), jnp.arange(16)), int) != all_images).mean() > 0.2
