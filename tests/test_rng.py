"""The randomness contract: which key every draw comes from, and that no layout changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ddpm_jax.core.rng import Purpose, image_keys, image_normal, root_key, step_key, stream

PINNED = {"INIT": 0, "T": 1, "EPS": 2, "DROPOUT": 3, "FLIP": 4, "SAMPLE": 5, "BOUND": 6, "FLIP_UD": 8, "TURN": 9}
SHAPE = (4, 4, 3)
purposes = pytest.mark.parametrize("purpose", Purpose)


def words(keys):
    """The two 32-bit words of each key."""
    return np.asarray(jax.random.key_data(keys)).tolist()


def fold(key, *data):
    for value in data:
        key = jax.random.fold_in(key, value)
    return key


def test_purposes_are_never_renumbered():
    numbers = {name: int(purpose) for name, purpose in Purpose.__members__.items()}
    assert PINNED.items() <= numbers.items()
    assert len(set(numbers.values())) == len(numbers)  # no two purposes share a stream


# ---- Derivation


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("x64_on", [False, True])
def test_root_key_is_the_seeds_threefry_key(seed, x64_on):
    with jax.enable_x64(x64_on):
        assert words(root_key(seed)) == [0, seed]
        assert words(root_key(seed)) == words(jax.random.key(seed, impl="threefry2x32"))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_seeds_that_would_wrap_are_refused(seed):
    with pytest.raises(ValueError, match=rf"got seed {seed}, expected .* from 0 to 4294967295; choose another"):
        root_key(seed)


@purposes
def test_streams_and_steps_are_folded_in_in_this_order(purpose):
    root = root_key(42)
    assert words(stream(root, purpose)) == words(fold(root, purpose.value))
    assert words(step_key(root, purpose, 7)) == words(fold(root, purpose.value, 7))


def test_image_keys_are_the_indices_folded_in():
    key, indices = root_key(42), [0, 3, 49_999]
    assert words(image_keys(key, jnp.array(indices))) == [words(fold(key, i)) for i in indices]


@pytest.mark.parametrize("k", [0, 1, 1000])
def test_image_normal_draws_from_the_reverse_steps_key(k):
    key = root_key(42)
    draws = image_normal(image_keys(key, jnp.array([5, 0])), k, SHAPE)
    assert draws.dtype == jnp.float32
    for draw, index in zip(draws, (5, 0), strict=True):
        np.testing.assert_array_equal(draw, jax.random.normal(fold(key, index, k), SHAPE))


def test_step_may_be_traced():
    root = root_key(3)
    keys = jax.lax.map(lambda step: step_key(root, Purpose.EPS, step), jnp.arange(4))
    assert words(keys) == [words(step_key(root, Purpose.EPS, step)) for step in range(4)]


# ---- Golden values: they change only if the contract does, and then every published seed means another run


def test_golden_keys():
    root = root_key(42)
    assert words(stream(root, Purpose.SAMPLE)) == [2765691542, 824333390]
    assert words(step_key(root, Purpose.EPS, 1000)) == [2450833668, 4263818178]
    of_images = image_keys(stream(root, Purpose.SAMPLE), jnp.array([0, 123]))
    assert words(of_images) == [[1918441747, 408286057], [938255769, 83748347]]


def test_golden_draws():
    root = root_key(42)
    x_T = image_normal(image_keys(stream(root, Purpose.SAMPLE), jnp.array([123, 0])), 0, SHAPE)
    np.testing.assert_allclose(x_T[0].ravel()[:4], [0.449276119, -0.553534508, 0.418230593, 0.551164448], rtol=1e-6)


# ---- No draw repeats, none depends on the layout


def test_no_step_purpose_or_seed_repeats_a_key():
    keys = [
        tuple(words(step_key(root_key(seed), purpose, step)))
        for seed in (0, 1)
        for purpose in Purpose
        for step in (0, 1, 799_999)
    ]
    assert len(set(keys)) == len(keys)


def test_no_image_or_reverse_step_repeats_a_draw():
    keys = image_keys(root_key(0), jnp.arange(2))
    draws = np.concatenate([image_normal(keys, k, SHAPE) for k in range(3)]).reshape(6, -1)
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 5 / np.sqrt(draws.shape[1])


def test_draws_are_standard_normal():
    keys = image_keys(root_key(0), jnp.arange(2))
    draws = np.array([image_normal(keys, k, SHAPE) for k in range(200)], np.float64)
    assert draws.mean() == pytest.approx(0, abs=5 / np.sqrt(draws.size))
    assert (draws**2).mean() == pytest.approx(1, abs=5 * np.sqrt(2 / draws.size))


@jax.jit
def draw_images(key, indices):
    return image_normal(image_keys(key, indices), 3, SHAPE)


@jax.jit
def draw_batch(key):
    return jax.random.normal(key, (96,))


def test_image_i_does_not_depend_on_its_batch():
    key = root_key(9)
    together = draw_images(key, jnp.arange(8))
    for indices in ([6], [7, 2], [0, 1]):
        np.testing.assert_array_equal(draw_images(key, jnp.array(indices)), together[jnp.array(indices)])


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_draws_do_not_depend_on_the_number_of_devices(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    split, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    root, indices = root_key(9), jnp.arange(8)

    # Image by image, as samples are drawn, and for the global batch at once, as training draws.
    images = jax.jit(draw_images, in_shardings=(whole, split), out_shardings=split)(root, indices)
    batch = jax.jit(draw_batch, out_shardings=split)(fold(root, 1))

    assert len(images.sharding.device_set) == len(batch.sharding.device_set) == devices
    np.testing.assert_array_equal(images, draw_images(root, indices))
    np.testing.assert_array_equal(batch, draw_batch(fold(root, 1)))
