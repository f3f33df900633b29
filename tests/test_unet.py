import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.core.rng import random_bits
from ddpm_jax.models.unet import (
    AttentionBlock,
    GroupNorm,
    ResidualBlock,
    UNet,
    dropout,
    timestep_embedding,
    upsample,
)

PAPER_256 = {"ch": 128, "ch_mult": (1, 1, 2, 2, 4, 4), "num_res_blocks": 2, "attn_resolutions": (16,)}

# Small networks that differ in all that a network can differ in: levels, blocks, attention, channels, image shape.
SMALL = UNet(ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), groups=4)
DEEP = UNet(ch=12, ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(4, 8), groups=3, out_channels=2)
TINY = UNet(ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), groups=4)
NETWORKS = [(SMALL, (8, 8, 3)), (DEEP, (16, 8, 1))]
NETWORK_NAMES = ["small", "deep"]


# Compiling is what takes the time here, and without LLVM's optimisations it takes a third of it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def by_path(tree):
    """The leaves of a nested dictionary, as {"layer/sublayer/kernel": leaf}."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def abstract_params(module, *args):
    """The parameters' shapes and dtypes, without computing anything."""
    return jax.eval_shape(module.init, jax.random.key(0), *args)["params"]


def shapes(net, size, channels=3):
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    return by_path(abstract_params(net, x, jax.ShapeDtypeStruct((1,), jnp.int32)))


def drawn_params(module, *args, seed=0):
    """Parameters of order one in every layer, also where initialisation gives "zero" layers and zero biases."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        fan_in = math.prod(leaf.shape[:-1])
        return {"kernel": values / math.sqrt(fan_in), "bias": 0.1 * values, "scale": 1 + 0.1 * values}[path[-1].key]

    return jax.tree_util.tree_map_with_path(draw, abstract_params(module, *args))


def inputs(batch, shape, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, *shape)).astype(np.float32), rng.integers(0, 1000, batch).astype(np.int32)


@functools.cache
def compiled(net):
    return jit(lambda params, x, t, keys=None: net.apply({"params": params}, x, t, keys))


@functools.cache
def compiled_with_intermediates(net):
    """(output, the input of every block's second convolution by the block's name)."""

    def run(params, x, t, keys=None):
        seen = {}

        def watch(call, args, kwargs, context):
            if context.module.name == "conv2":
                seen[context.module.path[0]] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(watch):
            output = net.apply({"params": params}, x, t, keys)
        return output, seen

    return jit(run)


# The paper's appendix B once more, in float64 NumPy. ---------------------------------------------------------------------


def np_swish(x):
    return x / (1 + np.exp(-x))


def np_dense(p, x):
    return x @ p["kernel"] + p["bias"]


def np_conv(p, x, stride=1):
    """3x3; with stride 2 the images are padded at the bottom and right only."""
    _, H, W, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)) if stride == 1 else ((0, 0), (0, 1), (0, 1), (0, 0)))
    out = p["bias"]
    for i in range(3):
        for j in range(3):
            out = out + padded[:, i : i + H : stride, j : j + W : stride] @ p["kernel"][i, j]
    return out


def np_group_norm(p, x, groups):
    h = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, variance = h.mean(axis=(1, 3), keepdims=True), h.var(axis=(1, 3), keepdims=True)
    return ((h - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


def np_residual_block(p, x, temb, groups, mask=1.0):
    h = np_conv(p["conv1"], np_swish(np_group_norm(p["norm1"], x, groups)))
    h = h + np_dense(p["temb_proj"], np_swish(temb))[:, None, None, :]
    h = np_conv(p["conv2"], np_swish(np_group_norm(p["norm2"], h, groups)) * mask)
    return h + (np_dense(p["nin_shortcut"], x) if "nin_shortcut" in p else x)


def np_attention_block(p, x, groups):
    B, H, W, C = x.shape
    h = np_group_norm(p["norm"], x, groups).reshape(B, H * W, C)
    q, k, v = (np_dense(p[name], h) for name in "qkv")
    scores = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(C))
    h = np_dense(p["proj_out"], scores / scores.sum(axis=-1, keepdims=True) @ v)
    return x + h.reshape(x.shape)


def np_timestep_embedding(t, dim):
    frequencies = np.exp(-np.log(10000) * np.arange(dim // 2) / (dim // 2 - 1))
    return np.concatenate([np.sin(t[:, None] * frequencies), np.cos(t[:, None] * frequencies)], axis=1)


def np_unet(net, p, x, t):
    p = jax.tree.map(np.float64, p)
    temb = np_dense(p["temb_dense1"], np_swish(np_dense(p["temb_dense0"], np_timestep_embedding(t, net.ch))))
    levels = range(len(net.ch_mult))

    def block_and_attention(h, way, i, j):
        h = np_residual_block(p[f"{way}_{i}_block_{j}"], h, temb, net.groups)
        attends = min(h.shape[1:3]) in net.attn_resolutions  # by the shorter side
        return np_attention_block(p[f"{way}_{i}_attn_{j}"], h, net.groups) if attends else h

    h = np_conv(p["conv_in"], x.astype(np.float64))
    skips = [h]
    for i in levels:
        for j in range(net.num_res_blocks):
            h = block_and_attention(h, "down", i, j)
            skips.append(h)
        if i < levels[-1]:
            h = np_conv(p[f"down_{i}_downsample"], h, stride=2)
            skips.append(h)
    h = np_residual_block(p["mid_block_1"], h, temb, net.groups)
    h = np_attention_block(p["mid_attn_1"], h, net.groups)
    h = np_residual_block(p["mid_block_2"], h, temb, net.groups)
    for i in levels[::-1]:
        for j in range(net.num_res_blocks + 1):
            h = block_and_attention(np.concatenate([h, skips.pop()], axis=-1), "up", i, j)
        if i > 0:
            h = np_conv(p[f"up_{i}_upsample"], h.repeat(2, axis=1).repeat(2, axis=2))
    assert not skips
    return np_conv(p["conv_out"], np_swish(np_group_norm(p["norm_out"], h, net.groups)))


# The whole network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "size", "count"),
    [
        (UNet(), 32, 35_746_307),
        (UNet(**PAPER_256), 256, 113_673_219),
        (UNet(**PAPER_256 | {"ch": 192}), 256, 255_677_955),
    ],
    ids=["cifar10", "256", "256_large"],
)
def test_parameter_counts_are_the_papers(net, size, count):
    assert sum(math.prod(leaf.shape) for leaf in shapes(net, size).values()) == count


@pytest.mark.parametrize(("net", "shape"), NETWORKS, ids=NETWORK_NAMES)
def test_network_matches_numpy(net, shape):
    x, t = inputs(3, shape)
    params = drawn_params(net, x, t)
    np.testing.assert_allclose(compiled(net)(params, x, t), np_unet(net, params, x, t), rtol=0, atol=5e-5)


def test_layers_of_the_cifar10_network():
    names = {path.split("/")[0] for path in shapes(UNet(), 32)}
    levels = range(4)
    expected = {"temb_dense0", "temb_dense1", "conv_in", "norm_out", "conv_out"}
    expected |= {"mid_block_1", "mid_attn_1", "mid_block_2"}
    expected |= {f"down_{i}_block_{j}" for i in levels for j in range(2)} | {
        f"down_{i}_downsample" for i in levels[:-1]
    }
    expected |= {f"up_{i}_block_{j}" for i in levels for j in range(3)} | {f"up_{i}_upsample" for i in levels[1:]}
    # 16x16 is level 1: attention after each of its blocks, down and up
    expected |= {"down_1_attn_0", "down_1_attn_1", "up_1_attn_0", "up_1_attn_1", "up_1_attn_2"}
    assert names == expected


def test_layers_of_the_256_network():
    names = {path.split("/")[0] for path in shapes(UNet(**PAPER_256), 256)}
    attention = {name for name in names if "attn" in name}
    assert attention == {f"down_4_attn_{j}" for j in range(2)} | {"mid_attn_1"} | {f"up_4_attn_{j}" for j in range(3)}
    assert {name for name in names if "sample" in name} == {
        name for i in range(5) for name in (f"down_{i}_downsample", f"up_{i + 1}_upsample")
    }


def test_shortcuts_only_where_channels_change_and_one_pixel_wide():
    kernels = {path: leaf.shape for path, leaf in shapes(UNet(), 32).items() if path.endswith("nin_shortcut/kernel")}
    down = {"down_1_block_0/nin_shortcut/kernel": (128, 256)}
    up = {f"up_{i}_block_{j}/nin_shortcut/kernel" for i in range(4) for j in range(3)}  # where a skip is always joined
    assert kernels.keys() == down.keys() | up
    assert all(len(shape) == 2 for shape in kernels.values())
    assert kernels["down_1_block_0/nin_shortcut/kernel"] == (128, 256)
    assert kernels["up_1_block_2/nin_shortcut/kernel"] == (256 + 128, 256)
    assert kernels["up_0_block_0/nin_shortcut/kernel"] == (256 + 128, 128)


@pytest.mark.parametrize("out_channels", [3, 6])
def test_learned_variance_doubles_the_output_channels(out_channels):
    net = dataclasses.replace(TINY, out_channels=out_channels)
    x, t = inputs(2, (4, 4, 3))
    params = abstract_params(net, x, t)
    assert jax.eval_shape(net.apply, {"params": params}, x, t).shape == (2, 4, 4, out_channels)


def test_image_size_that_does_not_halve_is_refused():
    x, t = inputs(1, (8, 10, 3))
    with pytest.raises(ValueError, match=r"got images of 8x10, expected multiples of 4 for ch_mult=\(1, 2, 2\)"):
        abstract_params(DEEP, x, t)


# Random bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (3, 4, 6), (2, 1, 3, 7)])
def test_random_bits_are_those_of_jax(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    got = random_bits(keys, shape)
    assert got.dtype == jnp.uint32
    np.testing.assert_array_equal(got, jax.vmap(lambda key: jax.random.bits(key, shape))(keys))


def test_keys_of_another_generator_are_refused():
    with pytest.raises(ValueError, match="got keys of 4 words, expected the 2 words of threefry2x32"):
        random_bits(jax.random.split(jax.random.key(0, impl="rbg"), 2), (3,))


# Initialisation ----------------------------------------------------------------------------------------------------------


@functools.cache
def initialised():
    net = dataclasses.replace(TINY, ch=32)
    x, t = inputs(1, (4, 4, 3))
    return net, jit(net.init)(jax.random.key(0), x, t)["params"]


def test_kernels_start_uniform_in_the_fan_avg_range_and_zero_layers_near_zero():
    seen = set()
    for path, kernel in by_path(initialised()[1]).items():
        if not path.endswith("kernel"):
            continue
        *_, layer, _ = path.split("/")
        zero = layer in ("conv2", "proj_out", "conv_out")
        seen.add((layer, zero))
        *window, fan_in, fan_out = kernel.shape
        limit = math.sqrt((1e-10 if zero else 1.0) * 3 / (math.prod(window) * (fan_in + fan_out) / 2))
        assert abs(kernel).max() <= limit * (1 + 1e-6), path
        assert abs(kernel).max() >= 0.97 * limit, path
        assert kernel.std() == pytest.approx(limit / math.sqrt(3), rel=0.06), path
        assert abs(kernel.mean()) <= 0.1 * limit, path
    assert {layer for layer, zero in seen if zero} == {"conv2", "proj_out", "conv_out"}


def test_biases_start_at_zero_and_norm_scales_at_one():
    kinds = {"bias": [], "scale": [], "kernel": []}
    for path, leaf in by_path(initialised()[1]).items():
        kinds[path.split("/")[-1]].append(leaf)
    assert len(kinds["bias"]) == len(kinds["kernel"]) + len(kinds["scale"])  # every layer has one
    assert all((leaf == 0).all() for leaf in kinds["bias"])
    assert all((leaf == 1).all() for leaf in kinds["scale"])


def test_fresh_network_predicts_almost_nothing():
    net, params = initialised()
    x, t = inputs(1, (4, 4, 3))
    assert 0 < abs(compiled(net)(params, x, t)).max() < 1e-3


# GroupNorm ---------------------------------------------------------------------------------------------------------------


def norm_params(channels, seed=3):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(1, 0.3, channels).astype(np.float32) for name in ("scale", "bias")}


@pytest.mark.parametrize("std", [1.0, 1e-3])  # at 1e-3 the variance is as large as eps, so that eps shows
def test_group_norm_matches_numpy_with_eps_1e_6(std):
    x = np.random.default_rng(2).normal(0.5 * std, std, (2, 4, 6, 12)).astype(np.float32)
    p = norm_params(12)
    got = GroupNorm(3).apply({"params": p}, x)
    np.testing.assert_allclose(got, np_group_norm(p, x.astype(np.float64), 3), rtol=0, atol=1e-5)


def test_group_norm_of_bfloat16_has_float32_statistics():
    x = jnp.asarray(np.random.default_rng(2).normal(20, 1, (2, 16, 16, 8)), jnp.bfloat16)
    p = norm_params(8)
    got = GroupNorm(2).apply({"params": p}, x)
    assert got.dtype == jnp.bfloat16
    expected = np_group_norm(p, np.asarray(x, np.float64), 2)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=1e-3)


def test_the_default_is_32_groups():
    assert UNet().groups == 32


# Time embedding ----------------------------------------------------------------------------------------------------------


def test_timestep_embedding_is_sines_then_cosines_of_frequencies_1_to_1e_4():
    t = np.array([0, 1, 17, 999], np.int32)
    got = timestep_embedding(t, 10)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np_timestep_embedding(t, 10), rtol=0, atol=1e-4)  # sin(999) in float32: 6e-5
    np.testing.assert_array_equal(got[0], [0] * 5 + [1] * 5)
    np.testing.assert_allclose(got[1, [0, 4]], np.sin([1, 1e-4]), rtol=1e-5)  # the first and the last frequency


# Blocks ------------------------------------------------------------------------------------------------------------------


def test_upsample_repeats_each_pixel():
    x, _ = inputs(2, (3, 2, 4))
    np.testing.assert_array_equal(upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))


def test_attention_block_matches_numpy_and_has_one_head():
    x, _ = inputs(2, (2, 3, 8))
    block = AttentionBlock(groups=2, dtype=jnp.float32)
    params = drawn_params(block, x)
    expected = np_attention_block(jax.tree.map(np.float64, params), x.astype(np.float64), 2)
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, rtol=0, atol=1e-5)


def test_attention_softmax_is_float32_in_bfloat16():
    x = jnp.zeros((1, 2, 2, 8), jnp.bfloat16)
    block = AttentionBlock(groups=2, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(block.apply)({"params": abstract_params(block, x)}, x)

    def exponentials(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "exp":
                yield equation.outvars[0].aval.dtype
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from exponentials(inner)

    assert list(exponentials(jaxpr.jaxpr)) == [jnp.float32]


def test_residual_block_matches_numpy_with_dropout_after_the_second_swish():
    x, _ = inputs(2, (4, 4, 8))
    temb = np.random.default_rng(4).normal(size=(2, 16)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), 2)
    block = ResidualBlock(features=12, groups=4, dropout=0.3, dtype=jnp.float32)
    params = drawn_params(block, x, temb, None)
    mask = np.asarray(dropout(jnp.ones((2, 4, 4, 12)), keys, 0.3), np.float64)
    got = block.apply({"params": params}, x, temb, keys)
    expected = np_residual_block(
        jax.tree.map(np.float64, params), x.astype(np.float64), temb.astype(np.float64), 4, mask
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


# Dropout -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("channels", [128, 7])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate, channels):
    keys = jax.random.split(jax.random.key(0), 4)
    y = np.asarray(dropout(jnp.ones((4, 32, 32, channels)), keys, rate))
    kept = y != 0
    n = kept.size
    assert abs(kept.mean() - (1 - rate)) < 5 * math.sqrt(rate * (1 - rate) / n)
    np.testing.assert_allclose(y[kept], 1 / (1 - rate), rtol=2e-5)


def test_dropout_entries_are_independent_of_their_neighbours():
    keys = jax.random.split(jax.random.key(0), 4)
    kept = np.asarray(dropout(jnp.ones((4, 32, 32, 64)), keys, 0.5)) != 0
    for axis in range(4):
        for distance in (1, 2, 32):
            if distance < kept.shape[axis]:
                first = kept.take(range(kept.shape[axis] - distance), axis)
                second = kept.take(range(distance, kept.shape[axis]), axis)
                assert abs((first == second).mean() - 0.5) < 5 * 0.5 / math.sqrt(first.size), (axis, distance)


def test_dropout_gradient_has_the_same_mask():
    keys = jax.random.split(jax.random.key(0), 2)
    x, _ = inputs(2, (4, 4, 6))
    y, pullback = jax.vjp(lambda x: dropout(x, keys, 0.4), x)
    np.testing.assert_allclose(y, x * pullback(jnp.ones_like(y))[0], rtol=1e-6)


def test_dropout_of_an_image_does_not_depend_on_its_batch():
    keys = jax.random.split(jax.random.key(0), 6)
    x, _ = inputs(6, (4, 4, 6))
    whole = dropout(x, keys, 0.4)
    chosen = np.array([4, 1])
    np.testing.assert_array_equal(dropout(x[chosen], keys[chosen], 0.4), whole[chosen])
    np.testing.assert_array_equal(dropout(x[2:3], keys[2:3], 0.4), whole[2:3])


def test_dropout_over_devices_draws_the_same_without_communication():
    keys = jax.random.split(jax.random.key(0), 8)
    x, _ = inputs(8, (4, 4, 6))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put((x, keys), jax.NamedSharding(mesh, jax.P("data")))
    run = jax.jit(lambda x, keys: dropout(x, keys, 0.4))
    np.testing.assert_array_equal(run(*sharded), run(x, keys))
    text = run.lower(*sharded).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective", "partition-id"))


DROPPING = dataclasses.replace(SMALL, dropout=0.25)


@functools.cache
def dropped():
    """Of the small network with dropout: the inputs, and what each block's second convolution saw, with keys and without."""
    x, t = inputs(4, (8, 8, 3))
    params = drawn_params(DROPPING, x, t)
    keys = jax.random.split(jax.random.key(9), 4)
    run = compiled_with_intermediates(DROPPING)
    return params, x, t, keys, run(params, x, t, keys), run(params, x, t)


def test_every_block_drops_before_its_second_convolution():
    *_, (_, seen), (_, seen_without) = dropped()
    assert len(seen) == 2 + 2 + 4  # down, middle, up
    for name, h in seen.items():
        assert 0.15 < (h == 0).mean() < 0.35, name
        assert (seen_without[name] != 0).all(), name


def test_masks_of_different_layers_are_independent():
    *_, (_, seen), _ = dropped()
    masks = {}
    for name, h in seen.items():
        masks.setdefault(h.shape, []).append((name, np.asarray(h == 0)))
    pairs = [(a, b) for group in masks.values() for i, a in enumerate(group) for b in group[:i]]
    assert len(pairs) >= 6
    agreement = 0.25**2 + 0.75**2
    for (name_a, a), (name_b, b) in pairs:
        assert abs((a == b).mean() - agreement) < 5 * 0.5 / math.sqrt(a.size), (name_a, name_b)


def test_an_image_is_dropped_the_same_in_any_batch():
    params, x, t, keys, (_, seen), _ = dropped()
    order = np.array([2, 0, 1, 3])
    neighbours = x[order].copy()
    neighbours[1:] *= -1.0  # image 2 comes first, among others
    _, again = compiled_with_intermediates(DROPPING)(params, neighbours, t[order], keys[order])
    for name in seen:
        np.testing.assert_array_equal(again[name][0] == 0, seen[name][2] == 0)
        np.testing.assert_allclose(again[name][0], seen[name][2], rtol=0, atol=1e-5)


def test_images_are_dropped_differently():
    *_, (_, seen), _ = dropped()
    for name, h in seen.items():
        assert (np.asarray(h[0] == 0) != np.asarray(h[1] == 0)).any(), name


def test_without_keys_or_with_rate_zero_nothing_is_dropped():
    params, x, t, _, (with_keys, _), (without_keys, _) = dropped()
    np.testing.assert_allclose(without_keys, compiled(SMALL)(params, x, t), rtol=0, atol=1e-5)
    assert abs(with_keys - without_keys).max() > 0.1

    x, t = inputs(2, (4, 4, 3))
    params = drawn_params(TINY, x, t)
    keys = jax.random.split(jax.random.key(9), 2)
    np.testing.assert_array_equal(compiled(TINY)(params, x, t, keys), compiled(TINY)(params, x, t))


# Precision and memory ----------------------------------------------------------------------------------------------------


def test_bfloat16_is_close_with_float32_parameters_and_output():
    half = dataclasses.replace(TINY, dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in shapes(half, 4).values())

    x, t = inputs(2, (4, 4, 3))
    params = drawn_params(half, x, t)
    got, seen = compiled_with_intermediates(half)(params, x, t)
    expected = compiled(TINY)(params, x, t)
    assert got.dtype == expected.dtype == jnp.float32
    assert {h.dtype for h in seen.values()} == {jnp.dtype(jnp.bfloat16)}
    assert (got != got.astype(jnp.bfloat16).astype(jnp.float32)).any()  # the last convolution is computed in float32
    error = np.asarray(got - expected)
    assert 1e-4 < math.sqrt((error**2).mean() / (np.asarray(expected) ** 2).mean()) < 0.03


@pytest.mark.slow
def test_remat_stores_less_and_computes_the_same():
    plain = dataclasses.replace(TINY, dropout=0.25)
    x, t = inputs(2, (4, 4, 3))
    params = drawn_params(plain, x, t)
    keys = jax.random.split(jax.random.key(9), 2)

    def loss(net, params):
        output = net.apply({"params": params}, x, t, keys)
        return (output**2).mean(), output

    def stored(net):
        pullback = jax.eval_shape(lambda params: jax.vjp(lambda params: loss(net, params)[0], params)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    def gradients(net):
        return jit(jax.grad(functools.partial(loss, net), has_aux=True))(params)

    remat = dataclasses.replace(plain, remat=True)
    assert stored(remat) < 0.7 * stored(plain)
    expected, expected_output = gradients(plain)
    got, got_output = gradients(remat)
    np.testing.assert_allclose(got_output, expected_output, rtol=0, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * (1 + abs(b).max())), got, expected)


@pytest.mark.slow
def test_forward_mode_derivatives_can_be_taken_outside_of_training():
    """`jax.jvp` of the network agrees with reverse mode; in training the convolutions know reverse mode only."""
    unet = UNet(ch=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(4,), out_channels=1, groups=2)
    x, v = np.random.default_rng(0).normal(size=(2, 2, 4, 4, 1)).astype(np.float32)
    t = jnp.array([1, 5])
    params = jit(unet.init)(jax.random.key(0), x, t)["params"]
    params = jax.tree.map(lambda a: a + 0.1, params)

    def output(x):
        return unet.apply({"params": params}, x, t)

    value, tangent = jit(lambda x, v: jax.jvp(output, (x,), (v,)))(x, v)
    pulled = jit(lambda x, g: jax.vjp(output, x)[1](g)[0])(x, value)
    np.testing.assert_allclose(jnp.vdot(tangent, value), jnp.vdot(pulled, v), rtol=1e-3)
