"""Bits/dim of a set of images with all their parts, and the rate-distortion table of section 4.3 (Figure 5).

The decoder's term and L_T are computed for every image. The T - 1 terms between are cut into strata of neighbouring t, and each
image is given one t drawn from each stratum, weighted by the stratum's size: an unbiased estimate for any number of strata,
and the whole bound where each stratum is a single t.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from ddpm_jax import rng, sharding
from ddpm_jax.data.pixels import from_uint8
from ddpm_jax.diffusion.bound import bound_terms, prior_bits
from ddpm_jax.errors import UsageError
from ddpm_jax.rng import Purpose
from ddpm_jax.training.experiment import Experiment


def bound_key(seed: int) -> Key[Array, ""]:
    """The key that a seed's bounds are drawn with, its BOUND stream. Image i draws x_t from k = t, and its times from k = T."""
    return rng.stream(rng.root_key(seed), Purpose.BOUND)


def strata(T: int, terms: int) -> Int[np.ndarray, " S1"]:
    """Edges, from 1 to T, of `terms` strata of the times 1 .. T-1, sizes differing by at most one.

    Raises UsageError unless 1 <= terms <= T - 1.
    """
    if not 1 <= terms <= T - 1:
        raise UsageError(f"got {terms} terms of the bound, expected 1 to {T - 1}; 0 stands for all")
    return 1 + np.arange(terms + 1) * (T - 1) // terms


def draw_times(
    key: Key[Array, ""], indices: Int[Array, " B"], edges: Int[np.ndarray, " S1"], T: int
) -> Int[Array, "B S1"]:
    """The times at which each image's terms are computed: 0, the decoder's, and one of each stratum."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng.image_keys(key, indices), T)
    low, high = jnp.asarray(edges[:-1], jnp.int32), jnp.asarray(edges[1:], jnp.int32)
    drawn = jax.vmap(lambda key: jax.random.randint(key, low.shape, low, high))(keys)
    return jnp.pad(drawn, ((0, 0), (1, 0)))


class Drawn(NamedTuple):
    """What is computed of each of N images, float32: L_T, and at t = 0 and one t of each stratum L_t and the squared error
    of x_0, in bits/dim and squared pixels of [-1, 1].
    """

    L_T: np.ndarray  # (N,)
    bits: np.ndarray  # (N, 1 + strata)
    mse: np.ndarray  # (N, 1 + strata)


def make_bound(experiment: Experiment, mesh: Mesh, edges: Int[np.ndarray, " S1"]) -> Callable[..., dict[str, Array]]:
    """Compiles (params, key, images, indices) -> `Drawn`'s arrays by name: terms of the bound of each image.

    Args:
        experiment: Whose network and process.
        mesh: The devices that the work is split over.
        edges: Of the strata of t that each image is given a time from (`strata`).

    Returns:
        The compiled function: uint8 images (B, H, W, C) and their indices (B,), B a multiple of the mesh's devices, to arrays
        that every device has whole. What is drawn for an image depends on (key, its index) alone.
    """
    process = experiment.process

    def bound(params, key, images, indices):
        model = experiment.model(params)
        images, indices = jax.lax.with_sharding_constraint((images, indices), sharding.split(mesh))
        x_0 = from_uint8(images)
        ts = draw_times(key, indices, edges, process.schedule.T)
        terms = bound_terms(process, model, key, x_0, indices, ts, clip=True)
        return {"L_T": prior_bits(process.schedule, x_0), "bits": terms.bits, "mse": terms.mse}

    return jax.jit(bound, out_shardings=sharding.replicated(mesh))


def mean_and_error(values: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """The mean over images and its standard error, which a single image has not."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "standard_error": error}


def summarize_bound(drawn: Drawn, edges: Int[np.ndarray, " S1"]) -> dict[str, Any]:
    """Bits/dim over the images and every part of it; total = L_T + rate + L_0, image by image.

    Each part has its mean and standard error over images, which counts the draws of t and x_t in. `L_t` lists the strata from
    t = 1 up: its first and last t, and the mean of L_t over them; `rate` is the sum of all of these (section 4.3 counts L_T in).
    Raises UsageError where a term is not finite.
    """
    L_T, bits, sizes = drawn.L_T.astype(np.float64), drawn.bits.astype(np.float64), np.diff(edges)
    rate = bits[:, 1:] @ sizes
    if not np.isfinite(rate + bits[:, 0]).all():
        image = np.argmin(np.isfinite(rate + bits[:, 0]))
        raise UsageError(
            f"the bound of image {image} is not finite, so the network's output is not; choose another checkpoint by --step"
        )
    parts = {"L_T": L_T, "rate": rate, "L_0": bits[:, 0]}
    return {
        **mean_and_error(L_T + rate + bits[:, 0]),
        "unit": "bits/dim",
        "parts": {name: mean_and_error(values) for name, values in parts.items()},
        "L_t": [
            {"first_t": int(first), "last_t": int(end) - 1, **mean_and_error(column)}
            for first, end, column in zip(edges[:-1], edges[1:], bits[:, 1:].T, strict=True)
        ],
    }


def rate_distortion(drawn: Drawn, edges: Int[np.ndarray, " S1"]) -> list[dict[str, float]]:
    """The progressive code's rate and distortion after each part of it, from the first bits to the last (section 4.3).

    Knowing x_t has cost rate = L_T and all L_s of s > t, in bits/dim; the x_0 predicted from it is off by distortion, a root
    mean square over images and pixels on the scale 0..255. One row for each stratum (the rate is that of its last t, which the
    row names, the distortion that of a t drawn from it), and for t = 0, where all but the decoder's L_0 is paid.
    """
    sizes, mean_bits = np.diff(edges), drawn.bits.astype(np.float64).mean(axis=0)
    rmse = 127.5 * np.sqrt(drawn.mse.astype(np.float64).mean(axis=0))
    cost = sizes * mean_bits[1:]
    before = drawn.L_T.astype(np.float64).mean() + np.cumsum(cost[::-1])[::-1] - cost  # of strata beyond
    rows = [
        {"t": int(end) - 1, "rate": float(rate), "distortion": float(error)}
        for end, rate, error in zip(edges[1:], before, rmse[1:], strict=True)
    ]
    return [*rows[::-1], {"t": 0, "rate": float(before[0] + cost[0]), "distortion": float(rmse[0])}]


def progressive_table(rows: list[dict[str, float]], T: int) -> list[dict[str, float]]:
    """The rows nearest to tenths of the reverse process, as the paper's appendix has them: reverse time T - t = T/10, ..., T."""
    wanted = (T - T * k / 10 for k in range(1, 11))
    chosen = {row["t"]: row for t in wanted for row in [min(rows, key=lambda row: abs(row["t"] - t))]}
    return [{"reverse_time": T - t, **row} for t, row in chosen.items()]
