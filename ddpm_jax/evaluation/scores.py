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
MOST_RANK = 4096  # of a covariance in a Fréchet distance: its singular values take a minute, and grow with the cube
MIN_COMPARABLE = 10_000  # with fewer images the FID's bias exceeds the differences that papers compare


class Statistics(NamedTuple):
    """Mean and covariance of features, float64: the input of the Fréchet distance.

    root: any matrix with root @ root.T = the covariance. That of N images is of rank N - 1, so with fewer images than features
    their centred features are one, and the covariance is never formed.
    """

    mu: Float[np.ndarray, " D"]
    root: Float[np.ndarray, "D r"]


class Estimate(NamedTuple):
    """A number and its spread; each function documents its `error`."""

    value: float
    error: float


def from_covariance(mu: Float[np.ndarray, " D"], sigma: Float[np.ndarray, "D D"]) -> Statistics:
    """Statistics of a covariance; its eigenvalues below the rounding error of the largest are dropped."""
    values, vectors = np.linalg.eigh(sigma)
    kept = values > np.abs(values).max() * len(values) * np.finfo(np.float64).eps
    return Statistics(mu, vectors[:, kept] * np.sqrt(values[kept]))


def check_rank(images: int, features: int) -> None:
    """Raises UsageError if the covariance's rank would be above MOST_RANK."""
    if min(images, features) > MOST_RANK:
        raise UsageError(
            f"got {images:,} images of {features:,} features, whose Fréchet distance would take hours; take at most "
            f"{MOST_RANK:,} images (--num-images, --num-real), or Inception's features"
        )


def statistics(features: Float[np.ndarray, "N D"]) -> Statistics:
    """Mean and unbiased covariance of features. Raises as `statistics_of_parts`."""
    return statistics_of_parts([features])


def statistics_of_parts(parts: Iterable[Float[np.ndarray, "n D"]]) -> Statistics:
    """Mean and unbiased covariance of features in parts, holding about as many rows as there are features (Chan et al. 1983).

    Raises UsageError for fewer than 2 images, features that are not finite, or as `check_rank`.
    """
    count, mu, scatter = 0, np.zeros(()), np.zeros(())  # of the rows that are no longer held
    seen, held = 0, []
    for part in parts:
        part = np.asarray(part, np.float64)
        if not np.isfinite(part).all():
            raise UsageError(
                f"the features of image {seen + np.argmin(np.isfinite(part).all(axis=1))} are not finite; look at that "
                "image and the feature function"
            )
        held.append(part)
        seen += len(part)
        check_rank(seen, part.shape[1])
        if seen - count >= part.shape[1]:
            mu, scatter = _merge(count, mu, scatter, held)
            count, held = seen, []
    if seen < 2:
        raise UsageError(f"got {seen} image(s), but a covariance needs at least 2; take more images")
    if not count:
        rows = np.concatenate(held)
        mu = rows.mean(axis=0)
        return Statistics(mu, (rows - mu).T / np.sqrt(seen - 1))
    if held:
        mu, scatter = _merge(count, mu, scatter, held)
    return from_covariance(mu, scatter / (seen - 1))


def _merge(
    count: int, mu: np.ndarray, scatter: np.ndarray, parts: list[np.ndarray]
) -> tuple[Float[np.ndarray, " D"], Float[np.ndarray, "D D"]]:
    """Mean and scatter matrix of `count` rows, of which both are known, and of those of the parts."""
    rows = np.concatenate(parts)
    mean, n = rows.mean(axis=0), len(rows)
    centred, away, total = rows - mean, mean - mu, count + n
    return mu + away * (n / total), scatter + centred.T @ centred + np.outer(away, away) * (count * n / total)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + trace(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2)): the FID, if the features are Inception's.

    The trace of the root is the sum of the singular values of root_a^T root_b. It is real, and accurate even for singular
    covariances. Raises UsageError if the sizes differ.
    """
    if a.mu.shape != b.mu.shape:
        raise UsageError(
            f"got statistics of {len(a.mu)} and of {len(b.mu)} features, expected as many; take both from the same function"
        )
    root_trace = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    traces = np.linalg.norm(a.root) ** 2 + np.linalg.norm(b.root) ** 2
    return float(np.sum((a.mu - b.mu) ** 2) + traces - 2 * root_trace)


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

    Mean and standard deviation over fixed random subsets of both sets, drawn without replacement. Where a set has no more images
    than a subset, subsets have half of them: of subsets that are the whole set the spread would be none. Raises UsageError for
    fewer than 2 images.
    """
    fewest = min(len(a), len(b))
    size = subset_size if fewest > subset_size else max(fewest // 2, 2)
    if fewest < 2:
        raise UsageError(
            f"got {len(a)} and {len(b)} image(s), but the kernel distance needs at least 2; take more images"
        )
    # Of few images, all kernels are computed once: each subset would compute most of them again.
    whole = _kernels(a, b) if max(len(a), len(b)) <= 5 * subset_size else None
    generator, values = np.random.RandomState(SEED), []
    for _ in range(subsets):
        i, j = (generator.choice(len(images), size, replace=False) for images in (a, b))
        if whole is None:
            xx, yy, xy = _kernels(a[i], b[j])
        else:
            xx, yy, xy = whole[0][np.ix_(i, i)], whole[1][np.ix_(j, j)], whole[2][np.ix_(i, j)]
        within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (size * (size - 1))
        values.append(within - 2 * xy.mean())
    return Estimate(float(np.mean(values)), float(np.std(values)))


def _kernels(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> list[np.ndarray]:
    """The kernel between the rows of x, between those of y, and between both."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return [(u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]


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
