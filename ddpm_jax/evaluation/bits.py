"""Bits/dim of a set of images, its parts, and the rate-distortion table of section 4.3 (Figure 5).

L_0 and L_T are computed for every image. The T - 1 terms between them are divided into strata of neighbouring t. Each image
draws one t from each stratum, weighted by the stratum's size. The estimate is unbiased for any number of strata, and it is the
exact bound if each stratum is a single t.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from ddpm_jax.core import rng, sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.rng import Purpose
from ddpm_jax.diffusion.bound import bound_terms, prior_bits
from ddpm_jax.training.experiment import Experiment


def bound_key(seed: int) -> Key[Array, ""]:
    """The key of a seed's bounds: its BOUND stream. Image i draws x_t from k = t, and its times from k = T."""
    return rng.stream(rng.root_key(seed), Purpose.BOUND)


def strata(T: int, terms: int) -> Int[np.ndarray, " S1"]:
    """Edges, from 1 to T, of `terms` strata of the times 1 .. T-1, whose sizes differ by at most one.

    Raises UsageError unless 1 <= terms <= T - 1.
    """
    if not 1 <= terms <= T - 1:
        raise UsageError(f"got {terms} terms of the bound, expected 1 to {T - 1}; 0 stands for all")
    return 1 + np.arange(terms + 1) * (T - 1) // terms


def draw_times(
    key: Key[Array, ""], indices: Int[Array, " B"], edges: Int[np.ndarray, " S1"], T: int
) -> Int[Array, "B S1"]:
    """The times at which each image's terms are computed: 0, and one of each stratum."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rng.image_keys(key, indices), T)
    low, high = jnp.asarray(edges[:-1], jnp.int32), jnp.asarray(edges[1:], jnp.int32)
    drawn = jax.vmap(lambda key: jax.random.randint(key, low.shape, low, high))(keys)
    return jnp.pad(drawn, ((0, 0), (1, 0)))


class Drawn(NamedTuple):
    """Terms of N images, float32: L_T, and at t = 0 and one t of each stratum L_t and the squared error of x_0.

    L_T and L_t are in bits/dim, the squared error in squared pixels of [-1, 1].
    """

    L_T: np.ndarray  # (N,)
    bits: np.ndarray  # (N, 1 + strata)
    mse: np.ndarray  # (N, 1 + strata)


def make_bound(experiment: Experiment, mesh: Mesh, edges: Int[np.ndarray, " S1"]) -> Callable[..., dict[str, Array]]:
    """Compiles (params, key, images, indices, labels) -> the arrays of `Drawn` by name: terms of the bound of each image.

    Args:
        experiment: The experiment of the parameters.
        mesh: The devices that the batch is split over.
        edges: Edges of the strata of t (`strata`).

    Returns:
        The compiled function: uint8 rows of a source (B, H, W, C), their indices (B,) and, with classes, their labels (B,), B a
        multiple of the mesh's devices, to arrays replicated on every device. With labels or conditions the bound is that of
        p(x_0 given them). An image's draws depend on (key, its index) alone.
    """
    process = experiment.process

    def bound(params, key, images, indices, labels=None):
        images, indices = jax.lax.with_sharding_constraint((images, indices), sharding.split(mesh))
        x_0, condition = experiment.split(images)
        model = experiment.model(params, labels=labels, condition=condition)
        ts = draw_times(key, indices, edges, process.schedule.T)
        terms = bound_terms(process, model, key, x_0, indices, ts, clip=True)
        return {"L_T": prior_bits(process.schedule, x_0), "bits": terms.bits, "mse": terms.mse}

    return sharding.jit_replicated(bound, mesh)


def mean_and_error(values: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """The mean over images and its standard error; None for a single image."""
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
    return {"value": float(values.mean()), "standard_error": error}


def summarize_bound(drawn: Drawn, edges: Int[np.ndarray, " S1"]) -> dict[str, Any]:
    """Bits/dim of the images and its parts: total = L_T + rate + L_0 for each image.

    Each number has its standard error over images, which includes the draws of t and x_t. `L_t` lists the strata from t = 1 up:
    the first and last t, and the mean of L_t. `rate` sums L_t over t >= 1 (section 4.3 adds L_T). Raises UsageError if a term is
    not finite.
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
    """The rate and distortion of the progressive code (section 4.3), from t = T - 1 down to 0.

    The rate of x_t is L_T plus L_s for all s > t, in bits/dim. The distortion is the root mean squared error of the x_0
    predicted from x_t, over images and pixels, on the scale 0..255. Each stratum gives one row: t and the rate are those of its
    last t, and the distortion is that of a t drawn from it. The last row is t = 0, without L_0.
    """
    sizes, mean_bits = np.diff(edges), drawn.bits.astype(np.float64).mean(axis=0)
    rmse = 127.5 * np.sqrt(drawn.mse.astype(np.float64).mean(axis=0))
    cost = sizes * mean_bits[1:]
    before = drawn.L_T.astype(np.float64).mean() + np.cumsum(cost[::-1])[::-1] - cost  # of the noisier strata
    rows = [
        {"t": int(end) - 1, "rate": float(rate), "distortion": float(error)}
        for end, rate, error in zip(edges[1:], before, rmse[1:], strict=True)
    ]
    return [*rows[::-1], {"t": 0, "rate": float(before[0] + cost[0]), "distortion": float(rmse[0])}]


def progressive_table(rows: list[dict[str, float]], T: int) -> list[dict[str, float]]:
    """The rows nearest to reverse time T - t = T/10, 2T/10, ..., T, as in the paper's appendix."""
    wanted = (T - T * k / 10 for k in range(1, 11))
    chosen = {row["t"]: row for t in wanted for row in [min(rows, key=lambda row: abs(row["t"] - t))]}
    return [{"reverse_time": T - t, **row} for t, row in chosen.items()]
