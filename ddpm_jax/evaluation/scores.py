"""Scores of generated images from their features: FID, IS, KID, precision, recall, density, coverage; float64 on the host.

Features are arrays (N, D), one row for each image. Only those of Inception-v3 give numbers that compare with published ones.
Subsets and permutations come from NumPy's frozen legacy generator with torch-fidelity's seed, so the numbers equal that
package's.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import log_softmax

from ddpm_jax.core.errors import UsageError, import_extra

SEED = 2020
MOST_FEATURES = 2**14  # 2 GiB of covariance
MIN_COMPARABLE = 10_000  # with fewer images the FID's bias exceeds the differences that papers compare


class Statistics(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, float64: the input of the Fréchet distance."""

    mu: Float[np.ndarray, " D"]
    sigma: Float[np.ndarray, "D D"]


class Estimate(NamedTuple):
    """A number and its spread; each function documents its `error`."""

    value: float
    error: float


def statistics(features: Float[np.ndarray, "N D"]) -> Statistics:
    """Mean and unbiased covariance of features. Raises as `statistics_of_parts`."""
    return statistics_of_parts([features])


def statistics_of_parts(parts: Iterable[Float[np.ndarray, "n D"]]) -> Statistics:
    """Mean and unbiased covariance of features in parts, holding one part at a time (Chan et al. 1983).

    Raises UsageError for fewer than 2 images, features that are not finite, or more than MOST_FEATURES features.
    """
    count, mu, scatter = 0, np.zeros(()), np.zeros(())
    for part in parts:
        part = np.asarray(part, np.float64)
        n, D = part.shape
        if D > MOST_FEATURES:
            raise UsageError(f"got {D:,} features, whose covariance is too large; take at most {MOST_FEATURES:,}")
        if not np.isfinite(part).all():
            raise UsageError(
                f"the features of image {count + np.argmin(np.isfinite(part).all(axis=1))} are not finite; look at that "
                "image and the feature function"
            )
        mean = part.mean(axis=0)
        centred, away, total = part - mean, mean - mu, count + n
        scatter = scatter + centred.T @ centred + np.outer(away, away) * (count * n / total)
        mu, count = mu + away * (n / total), total
    if count < 2:
        raise UsageError(f"got {count} image(s), but a covariance needs at least 2; take more images")
    return Statistics(mu, scatter / (count - 1))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + trace(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)): the FID, if the features are Inception's.

    With sigma_a = A A^T and sigma_b = B B^T, the trace of the root is the sum of the singular values of A^T B. It is real, and
    accurate even for singular covariances. Raises UsageError if the sizes differ.
    """
    if a.mu.shape != b.mu.shape:
        raise UsageError(
            f"got statistics of {len(a.mu)} and of {len(b.mu)} features, expected as many; take both from the same function"
        )
    root_trace = np.linalg.svd(_factor(a.sigma).T @ _factor(b.sigma), compute_uv=False).sum()
    return float(np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root_trace)


def _factor(sigma: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D r"]:
    """A with A A^T = sigma; eigenvalues below the rounding error of the largest are dropped."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > np.abs(values).max() * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: Float[np.ndarray, "N K"], *, splits: int = 10) -> Estimate:
    """exp E[KL(p(y | x) || p(y))]: mean and standard deviation over `splits` parts of the images, in a fixed random order.

    Raises UsageError for fewer images than parts.
    """
    if len(logits) < splits:
        raise UsageError(f"got {len(logits)} images, but the Inception score takes {splits} parts; take more images")
    log_p = log_softmax(np.asarray(logits, np.float64), axis=1)
    log_p = log_p[np.random.RandomState(SEED).permutation(len(log_p))]
    scores = []
    for i in range(splits):
        part = log_p[i * len(log_p) // splits : (i + 1) * len(log_p) // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(axis=0)))).sum(axis=1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def kernel_distance(
    a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"], *, subsets: int = 100, subset_size: int = 1000
) -> Estimate:
    """KID: the unbiased squared maximum mean discrepancy of features with the kernel (x.y / D + 1)^3.

    Mean and standard deviation over fixed random subsets of both sets, drawn without replacement. Raises UsageError for fewer
    than 2 images.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise UsageError(
            f"got {len(a)} and {len(b)} image(s), but the kernel distance needs at least 2; take more images"
        )
    generator = np.random.RandomState(SEED)
    values = []
    for _ in range(subsets):
        x = np.asarray(a[generator.choice(len(a), size, replace=False)], np.float64)
        y = np.asarray(b[generator.choice(len(b), size, replace=False)], np.float64)
        values.append(_squared_discrepancy(x, y))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _squared_discrepancy(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "n D"]) -> float:
    n, D = x.shape
    xx, yy, xy = ((u @ v.T / D + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * xy.mean())


class Neighbourhoods(NamedTuple):
    """Shares of images inside balls, where an image's ball reaches to its k-th neighbour in its own set.

    precision: generated images inside a real image's ball; recall: real images inside a generated image's ball (Kynkäänniemi
    et al. 2019). density: the mean number of real balls around a generated image, over k; coverage: real balls that hold a
    generated image (Naeem et al. 2020). Each error is the standard error over images, with the other set fixed.
    """

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def neighbourhoods(
    generated: Float[np.ndarray, "N D"], real: Float[np.ndarray, "M D"], *, neighbour: int = 3
) -> Neighbourhoods:
    """Precision, recall, density and coverage of features. Raises UsageError for a set without a k-th neighbour."""
    if min(len(generated), len(real)) <= neighbour:
        raise UsageError(
            f"got {len(generated)} generated and {len(real)} real images, but neighbour {neighbour} of each is needed; "
            "take more images"
        )
    generated, real = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    radii, generated_radii = _radii(real, neighbour), _radii(generated, neighbour)
    balls = []  # of real images, around each generated one
    recalled, covered = np.zeros(len(real), bool), np.zeros(len(real), bool)

    def count(block, start):
        inside = block <= radii
        recalled[:] |= (block <= generated_radii[start : start + len(block), None]).any(axis=0)
        covered[:] |= inside.any(axis=0)
        balls.append(inside.sum(axis=1))
        return balls[-1]

    for _ in _metrics().pairwise_distances_chunked(generated, real, reduce_func=count):
        pass
    around = np.concatenate(balls)
    return Neighbourhoods(_mean(around > 0), _mean(recalled), _mean(around / neighbour), _mean(covered))


def _metrics() -> Any:
    return import_extra("sklearn.metrics", "evaluation", "comparing features one by one")


def _radii(features: Float[np.ndarray, "N D"], neighbour: int) -> Float[np.ndarray, " N"]:
    def to_kth(block, start):
        return np.partition(block, neighbour, axis=1)[:, neighbour]  # place 0 is the image itself

    return np.concatenate(list(_metrics().pairwise_distances_chunked(features, reduce_func=to_kth)))


def _mean(values: np.ndarray) -> Estimate:
    values = np.asarray(values, np.float64)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def bootstrap_error(
    score: Callable[[Float[np.ndarray, "N D"]], float], features: Float[np.ndarray, "N D"], *, repeats: int
) -> float:
    """The bootstrap standard error of a score: its standard deviation over `repeats` sets drawn with replacement.

    The resampled scores themselves are biased, since images repeat, so only their spread is returned.
    """
    generator = np.random.RandomState(SEED)
    draws = (generator.randint(len(features), size=len(features)) for _ in range(repeats))
    return float(np.std([score(features[draw]) for draw in draws], ddof=1))


def nearest(
    queries: Float[np.ndarray, "n D"], blocks: Iterable[Float[np.ndarray, "m D"]], *, count: int
) -> tuple[Int[np.ndarray, "n k"], Float[np.ndarray, "n k"]]:
    """The `count` rows of all blocks nearest to each query: their indices, nearest first, and their distances."""
    places: np.ndarray = np.empty((len(queries), 0), np.int64)
    distances: np.ndarray = np.empty((len(queries), 0))
    start = 0
    queries = np.asarray(queries, np.float64)
    for block in blocks:
        here = np.broadcast_to(np.arange(start, start + len(block)), (len(queries), len(block)))
        distances = np.concatenate(
            [distances, _metrics().pairwise_distances(queries, np.asarray(block, np.float64))], axis=1
        )
        places, start = np.concatenate([places, here], axis=1), start + len(block)
        order = np.argsort(distances, axis=1, kind="stable")[:, :count]
        places, distances = (np.take_along_axis(a, order, axis=1) for a in (places, distances))
    return places, distances
