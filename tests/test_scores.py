"""Scores of features against torch-fidelity, scipy and closed forms."""

import numpy as np
import pytest
from fidelity import fidelity
from scipy import linalg
from scipy.spatial.distance import cdist

from ddpm_jax.core.errors import UsageError
from ddpm_jax.evaluation import scores
from ddpm_jax.evaluation.scores import from_covariance

RELATIVE = 1e-6


def features(seed, n, D=24):
    """Random features, correlated, positive like Inception's, float32."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).normal(size=(D, D)) / np.sqrt(D)
    return np.abs(generator.normal(size=(n, D)) @ mixing + 0.1 * seed).astype(np.float32)


def to_torch(array):
    import torch

    return torch.from_numpy(np.array(array))


# ---- Fréchet distance


def test_frechet_distance_is_torch_fidelitys():
    metric = fidelity("metric_fid")
    a, b = features(1, 400).astype(np.float64), features(2, 300).astype(np.float64)
    ours = [metric.fid_features_to_statistics(to_torch(x)) for x in (a, b)]
    expected = metric.fid_statistics_to_metric(*ours, verbose=False)["frechet_inception_distance"]
    assert scores.frechet_distance(scores.statistics(a), scores.statistics(b)) == pytest.approx(expected, rel=RELATIVE)


def test_frechet_distance_matches_scipys_matrix_root():
    a, b = scores.statistics(features(1, 400)), scores.statistics(features(2, 300))
    of_a, of_b = a.root @ a.root.T, b.root @ b.root.T
    root = linalg.sqrtm(of_a @ of_b)  # pytorch-fid's formula
    expected = np.sum((a.mu - b.mu) ** 2) + np.trace(of_a + of_b - 2 * root.real)
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=RELATIVE)


def test_frechet_distance_of_commuting_covariances_is_known_in_closed_form():
    """The same eigenvectors: the distance is that of the standard deviations along them."""
    vectors = linalg.qr(np.random.default_rng(0).normal(size=(30, 30)))[0]
    first, second = np.linspace(0.1, 4, 30), np.linspace(9, 0.5, 30)
    a, b = (from_covariance(np.full(30, m), (vectors * v) @ vectors.T) for m, v in ((0.5, first), (0.25, second)))
    expected = 30 * 0.25**2 + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2)
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [0, 1, 20])
def test_frechet_distance_is_exact_for_singular_covariances(rank):
    """Variances in a few directions only, in other directions for each: most eigenvalues are 0, where roots are unstable."""
    vectors = linalg.qr(np.random.default_rng(1).normal(size=(100, 100)))[0]
    variances = 1e4 * (np.arange(100) < rank), np.where(np.arange(100) < rank // 2, 2.5e3, 0.0)
    a, b = (from_covariance(np.zeros(100), (vectors * v) @ vectors.T) for v in variances)
    expected = np.sum((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2)
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_frechet_distance_of_fewer_images_than_features_to_themselves_is_0():
    a = scores.statistics(features(1, 10, D=64))
    assert abs(scores.frechet_distance(a, a)) < 1e-9 * np.trace(a.root @ a.root.T)


@pytest.mark.parametrize(("N", "M"), [(20, 30), (20, 800), (800, 30)])
def test_frechet_distance_of_few_images_is_that_of_their_covariances(N, M):
    """Fewer images than features, on either side or both: the covariance is never formed, and the distance is the same."""
    a, b = features(1, N, D=300).astype(np.float64), features(2, M, D=300).astype(np.float64)
    dense = (from_covariance(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (a, b))
    assert scores.frechet_distance(scores.statistics(a), scores.statistics(b)) == pytest.approx(
        scores.frechet_distance(*dense), rel=1e-9
    )


def test_frechet_distance_of_few_images_takes_any_number_of_features(monkeypatch):
    """64x64 pixels in colour: 12,288 features, whose covariance takes 1.1 GiB and minutes to factor. |mu| is 2 apart."""
    monkeypatch.setattr(scores, "from_covariance", None)
    x = np.random.default_rng(0).normal(size=(50, 12_288))
    reference = scores.statistics(x)
    distance = scores.frechet_distance(scores.statistics(x + 2 / np.sqrt(12_288)), reference)
    assert distance == pytest.approx(4.0, rel=1e-9)


def test_statistics_are_float64_whatever_the_features_are():
    x = features(1, 50) + np.float32(1000)
    exact = x.astype(np.float64)
    got = scores.statistics(x)
    np.testing.assert_allclose(got.mu, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(got.root @ got.root.T, np.cov(exact, rowvar=False), rtol=1e-9)


def test_bootstrap_error_is_the_standard_error_of_a_mean():
    x = np.random.default_rng(0).normal(3.0, 2.0, size=(400, 1))
    error = scores.bootstrap_error(lambda drawn: drawn.mean(), x, repeats=400)
    assert error == pytest.approx(2.0 / np.sqrt(400), rel=0.15)
    assert error == scores.bootstrap_error(lambda drawn: drawn.mean(), x, repeats=400)  # pinned


# ---- Inception score, KID


def test_inception_score_is_torch_fidelitys():
    logits = np.random.default_rng(0).normal(size=(523, 40)).astype(np.float32) * 3
    expected = fidelity("metric_isc").isc_features_to_metric(to_torch(logits))
    score = scores.inception_score(logits)
    assert score.value == pytest.approx(expected["inception_score_mean"], rel=RELATIVE)
    assert score.error == pytest.approx(expected["inception_score_std"], rel=RELATIVE)


def test_inception_score_of_sure_and_even_predictions_is_the_number_of_classes():
    logits = 100.0 * np.eye(5)[np.arange(5000) % 5]
    assert scores.inception_score(logits).value == pytest.approx(5, rel=1e-2)
    assert scores.inception_score(np.zeros((100, 5))).value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("subsets", "size"), [(3, 200), (10, 50)])
def test_kernel_distance_is_torch_fidelitys(subsets, size):
    a, b = features(1, 400).astype(np.float64), features(2, 300).astype(np.float64)
    metric = fidelity("metric_kid").kid_features_to_metric
    expected = metric(to_torch(a), to_torch(b), kid_subsets=subsets, kid_subset_size=size, verbose=False)
    distance = scores.kernel_distance(a, b, subsets=subsets, subset_size=size)
    assert distance.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=RELATIVE)
    assert distance.error == pytest.approx(expected["kernel_inception_distance_std"], rel=RELATIVE)


def test_kernel_distance_is_unbiased():
    """Of two sets of one distribution it is 0 on average, unlike the biased estimate, which never is below 0."""
    generator = np.random.default_rng(0)
    values = [
        scores.kernel_distance(*generator.normal(size=(2, 30, 3)), subsets=1, subset_size=30).value for _ in range(300)
    ]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(300)
    assert min(values) < 0


def test_kernel_distance_of_small_sets_tells_a_spread_like_that_of_other_sets():
    """Their subsets were the sets themselves, whose spread is none."""
    generator = np.random.default_rng(0)
    found = [scores.kernel_distance(*generator.normal(size=(2, 64, 3)), subset_size=64) for _ in range(50)]
    assert 0.5 < np.mean([distance.error for distance in found]) / np.std([distance.value for distance in found]) < 3


# ---- Precision, recall, density, coverage, nearest


def test_precision_and_recall_are_torch_fidelitys():
    generated, real = features(1, 250).astype(np.float64), features(2, 300).astype(np.float64)
    expected = fidelity("metric_prc").prc_features_to_metric(to_torch(generated), to_torch(real), verbose=False)
    shares = scores.neighbourhoods(generated, real)
    assert 0.1 < shares.precision.value < 0.9  # a case that says something
    assert shares.precision.value == pytest.approx(expected["precision"], rel=RELATIVE)
    assert shares.recall.value == pytest.approx(expected["recall"], rel=RELATIVE)


def brute_force(generated, real, k):
    """All four by their definitions, from whole matrices of distances."""
    between = cdist(generated, real)
    radii, generated_radii = (np.sort(cdist(x, x), axis=1)[:, k] for x in (real, generated))
    inside = between <= radii
    recall = (between <= generated_radii[:, None]).any(axis=0)
    return inside.any(axis=1).mean(), recall.mean(), inside.sum() / k / len(generated), inside.any(axis=0).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_shares_match_their_definitions_over_blocks_of_memory(k, monkeypatch):
    import sklearn

    generated, real = features(1, 260), features(2, 300)
    with sklearn.config_context(working_memory=0.05):  # MiB: about twenty rows at a time
        shares = scores.neighbourhoods(generated, real, neighbour=k)
    for share, expected in zip(shares, brute_force(generated, real, k), strict=True):
        assert share.value == pytest.approx(expected, rel=1e-12)


def test_errors_of_shares_are_standard_errors():
    shares = scores.neighbourhoods(features(1, 250), features(2, 300))
    p = shares.precision.value
    assert shares.precision.error == pytest.approx(np.sqrt(p * (1 - p) / 249), rel=1e-9)


def test_nearest_finds_the_same_places_in_blocks():
    queries, real = features(1, 5), features(2, 100)
    distances = cdist(queries, real)
    expected = np.argsort(distances, axis=1)[:, :4]
    places, found = scores.nearest(queries, (real[i : i + 7] for i in range(0, 100, 7)), count=4)
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(found, np.take_along_axis(distances, expected, axis=1), rtol=1e-6)


# ---- Refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: scores.statistics(features(1, 1)),
            "got 1 image(s), but a covariance needs at least 2; take more images",
        ),
        (
            lambda: scores.statistics(np.where(np.arange(9)[:, None] == 4, np.nan, features(1, 9))),
            "the features of image 4 are not finite; look at that image",
        ),
        (lambda: scores.inception_score(features(1, 9)), "got 9 images, but the Inception score takes 10 parts"),
        (
            lambda: scores.kernel_distance(features(1, 1), features(1, 9)),
            "got 1 and 9 image(s), but the kernel distance",
        ),
        (
            lambda: scores.neighbourhoods(features(1, 3), features(1, 9)),
            "got 3 generated and 9 real images, but neighbour 3",
        ),
        (
            lambda: scores.frechet_distance(scores.statistics(features(1, 9)), scores.statistics(features(1, 9, D=5))),
            "got statistics of 24 and of 5 features, expected as many",
        ),
    ],
)
def test_too_few_images_or_features_of_another_kind_are_refused(call, message):
    with pytest.raises(UsageError) as error:
        call()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("D", [4, 25, 50, 60], ids="{} features of 50 images".format)
def test_statistics_of_parts_are_those_of_the_whole(D):
    features = np.random.default_rng(0).normal(5, 2, (50, D)) @ np.random.default_rng(1).normal(size=(D, D))
    got = scores.statistics_of_parts([features[:1], features[1:20], features[20:]])
    np.testing.assert_allclose(got.mu, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(got.root @ got.root.T, np.cov(features, rowvar=False), rtol=1e-12, atol=1e-10)


def test_more_images_of_more_features_than_can_be_factored_are_refused():
    """As soon as they are read; either alone is not too many."""
    scores.check_rank(4096, 10**6)
    scores.check_rank(10**6, 4096)
    parts = (np.zeros((100, 5000)) for _ in iter(int, 1))
    with pytest.raises(UsageError, match=r"4,100 images of 5,000 features.* take at most 4,096 images"):
        scores.statistics_of_parts(parts)
