"""Scores of generated digits that need no neural network: python -m ddpm_jax.evaluation.digits images.npz

confidence: the mean confidence of a calibrated support vector classifier fitted on half of the real digits. The other half
scores about 0.92, and uniform noise 0.88, so it says little alone.
precision: the share of images inside the k-nearest-neighbour balls of half of the real digits (Kynkäänniemi et al. 2019, on
pixels, k = 3). The other half scores about 0.91, and a Gaussian fitted to the pixels 0.22.
agreement, of images with labels: the share that the classifier takes for the digit that was asked for. Of the other half of
the real digits it is about 0.98.
distance: the Fréchet distance of pixels in [-1, 1] between 512 samples and 512 real digits, compared with the mean distance
between disjoint 512-subsets of the real digits.
"""

import sys

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy.spatial.distance import cdist
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from ddpm_jax.evaluation.scores import frechet_distance, statistics

MIN_CONFIDENCE = 0.80
MIN_PRECISION = 0.50
MAX_DISTANCE = 2.0
MIN_AGREEMENT = 0.90


def probabilities(images: UInt8[np.ndarray, "N 8 8 1"]) -> Float[np.ndarray, "N 10"]:
    """The classifier's probabilities of each digit."""
    data = load_digits()
    half = np.random.default_rng(0).permutation(len(data.data))[: len(data.data) // 2]
    classifier = CalibratedClassifierCV(SVC(), ensemble=False).fit(_pixels(data.data[half], 16), data.target[half])
    return classifier.predict_proba(_pixels(images, 255))


def agreement(images: UInt8[np.ndarray, "N 8 8 1"], labels: Int[np.ndarray, " N"]) -> float:
    """The share of images that the classifier takes for the digit of their label."""
    return float((probabilities(images).argmax(axis=1) == labels).mean())


def precision(images: UInt8[np.ndarray, "N 8 8 1"], *, neighbour: int = 3) -> float:
    """The share of images inside the balls around half of the real digits; a ball's radius is the k-th neighbour's distance."""
    real = _pixels(load_digits().data, 16)
    half = real[np.random.default_rng(0).permutation(len(real))[: len(real) // 2]]
    radii = np.sort(cdist(half, half), axis=1)[:, neighbour]
    return float((cdist(_pixels(images, 255), half) <= radii).any(axis=1).mean())


def relative_distance(images: UInt8[np.ndarray, "512 8 8 1"], *, repeats: int = 20) -> tuple[float, float]:
    """Mean Fréchet distances: 512 samples to 512 real digits, and between disjoint 512-subsets of the real digits."""
    real = _pixels(load_digits().data, 16)
    generator = np.random.default_rng(0)
    samples, to_real, among_real = statistics(_pixels(images, 255)), [], []
    for _ in range(repeats):
        order = generator.permutation(len(real))
        some, others = statistics(real[order[:512]]), statistics(real[order[512:1024]])
        to_real.append(frechet_distance(samples, some))
        among_real.append(frechet_distance(some, others))
    return float(np.mean(to_real)), float(np.mean(among_real))


def _pixels(images: np.ndarray, largest: int) -> np.ndarray:
    return images.reshape(len(images), -1) * (2 / largest) - 1.0


def main() -> None:
    """Prints the scores of an .npz of at least 512 images; exit code 1 if one misses its threshold."""
    with np.load(sys.argv[1], allow_pickle=False) as arrays:
        images, labels = arrays["images"][:512], arrays["labels"][:512] if "labels" in arrays else None
    of_digits, near = probabilities(images), precision(images)
    sure, classes = of_digits.max(axis=1).mean(), np.bincount(of_digits.argmax(axis=1), minlength=10)
    distance, real = relative_distance(images)
    print(f"classifier's mean confidence {sure:.3f} (at least {MIN_CONFIDENCE}; real digits about 0.92)")
    print(f"precision {near:.3f} (at least {MIN_PRECISION}; real digits about 0.91)")
    print(f"images of each digit 0-9: {classes.tolist()} (all present)")
    print(
        f"Fréchet distance of pixels {distance:.2f} (at most {MAX_DISTANCE * real:.2f}; among real digits {real:.2f})"
    )
    agreed = 1.0 if labels is None else agreement(images, labels)
    if labels is not None:
        print(f"agreement with the labels {agreed:.3f} (at least {MIN_AGREEMENT}; real digits about 0.98)")
    if (
        agreed < MIN_AGREEMENT
        or sure < MIN_CONFIDENCE
        or near < MIN_PRECISION
        or min(classes) == 0
        or distance > MAX_DISTANCE * real
    ):
        raise SystemExit("the digits are not good enough: train longer, or guide less")


if __name__ == "__main__":
    main()
