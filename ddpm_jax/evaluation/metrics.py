"""The metrics of a run, each a function of an `Evaluation`, and the files of their results.

WORKDIR/evaluation/METRIC-STEP-DIGEST.json   a result, its definition and its SHA-256; each definition has its own file
"""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import digest, write_text
from ddpm_jax.evaluation import bits, scores
from ddpm_jax.evaluation.evaluation import Evaluation
from ddpm_jax.evaluation.features import PIXELS, pixel_features
from ddpm_jax.evaluation.inception_weights import INCEPTION
from ddpm_jax.evaluation.parts import progress

NEAREST = 8
BLOCK_BYTES = 2**24  # of real images compared at a time


def _estimate(estimate: scores.Estimate, spread: str) -> dict[str, float]:
    return {"value": estimate.value, spread: estimate.error}


def fid(e: Evaluation) -> dict[str, Any]:
    """The Fréchet distance between the features of samples and real images."""
    reference, features = e.real_statistics(), e.generated()["features"]
    repeats = e.options.bootstrap
    with progress("Fréchet distance", 1 + repeats, unit="set", leave=False) as bar:

        def distance(drawn: np.ndarray) -> float:
            value = scores.frechet_distance(scores.statistics(drawn), reference)
            bar.update()
            return value

        result: dict[str, Any] = {"value": distance(features)}
        if repeats:
            result["standard_error"] = scores.bootstrap_error(distance, features, repeats=repeats)
    fewest = len(features) if e.options.statistics else min(len(features), e.num_real)
    reasons = _not_comparable(e, fewest)
    if fewest <= features.shape[1]:
        reasons.append(f"{fewest:,} images leave the covariance of {features.shape[1]:,} features singular")
    if reasons:
        result["not_comparable"] = "not comparable with published FIDs: " + "; ".join(reasons)
    definition = e.definition("sampling", "features", "statistics") | {"bootstrap": e.options.bootstrap}
    return result | {"definition": definition}


def _not_comparable(e: Evaluation, images: int) -> list[str]:
    """Why a number of so many images cannot be compared with published ones."""
    reasons = []
    if images < scores.MIN_COMPARABLE:
        reasons.append(f"it is of {images:,} images, and below {scores.MIN_COMPARABLE:,} its bias is large")
    if not e.features.name.startswith(INCEPTION):
        reasons.append(f"its features are {e.features.name}, not Inception's")
    return reasons


def inception_score(e: Evaluation) -> dict[str, Any]:
    """The Inception score of the samples."""
    if "logits" not in e.generated():
        raise UsageError(f"the metric is needs logits, which --features {e.features.name} does not have; use inception")
    score = scores.inception_score(e.generated()["logits"])
    result: dict[str, Any] = _estimate(score, "deviation_over_splits")
    result["definition"] = e.definition("sampling", "features")
    if reasons := _not_comparable(e, e.num_images):
        result["not_comparable"] = "not comparable with published scores: " + "; ".join(reasons)
    return result


def kid(e: Evaluation) -> dict[str, Any]:
    """The kernel distance between the features of samples and real images."""
    distance = scores.kernel_distance(e.generated()["features"], e.real()["features"])
    definition = e.definition("sampling", "features", "reference")
    return _estimate(distance, "deviation_over_subsets") | {"definition": definition}


def prdc(e: Evaluation) -> dict[str, Any]:
    """Precision, recall, density and coverage.

    Precision is the share of samples that lie among the real images, recall the share of real images that lie among the samples.
    Density is the mean number of real images' neighbourhoods that a sample lies in, over 3; coverage is the share of real images
    with a sample in their neighbourhood, which reaches to their third neighbour.
    """
    shares = scores.neighbourhoods(e.generated()["features"], e.real()["features"])
    values = {name: _estimate(estimate, "standard_error") for name, estimate in shares._asdict().items()}
    return values | {"neighbour": 3, "definition": e.definition("sampling", "features", "reference")}


def nll(e: Evaluation) -> dict[str, Any]:
    """Bits/dim, the variational bound, and its parts."""
    return bits.summarize_bound(e.drawn(), e.edges) | {"definition": e.definition("bound", "reference")}


def losses(e: Evaluation) -> dict[str, Any]:
    """The training loss of the real images, over all t and for each quarter of t."""
    values = e.losses().astype(np.float64)
    quarters = {f"quarter_{i}": bits.mean_and_error(values[:, i - 1]) for i in range(1, values.shape[1] + 1)}
    mean = bits.mean_and_error(values.mean(axis=1))
    return {**mean, "quarters": quarters, "definition": e.definition("losses", "reference")}


def ode_nll(e: Evaluation) -> dict[str, Any]:
    """Bits/dim by the probability-flow ODE, an upper bound since the 8 bits are dequantised by uniform noise."""
    found = e.flow()
    return {
        **bits.mean_and_error(found["bits"].astype(np.float64)),
        "unit": "bits/dim",
        "evaluations": float(found["evaluations"].mean()),
        "definition": e.definition("flow", "reference"),
    }


def _psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """10 log10 of the squared range over the mean squared error of each image. Both in [-1, 1]."""
    mse = ((images - others) ** 2).mean(axis=(1, 2, 3), dtype=np.float64)
    return 10 * np.log10(4 / np.maximum(mse, 1e-10))  # at most 106 dB, for equal images


def psnr(e: Evaluation) -> dict[str, Any]:
    """The peak signal-to-noise ratio, in dB, of samples to the real images whose conditions they are drawn of.

    The mean of several samples of an image is nearer to it than each of them: its ratio is given too where there are as many
    samples as several times the images. So is that of the condition, brought to the image's size, where it has its channels.
    """
    experiment, conditioning = e.experiment, e.experiment.conditioning
    if conditioning is None:
        raise UsageError(
            "psnr compares samples with the images of their conditions, and this run has none; leave it out"
        )

    def network(stored: Any) -> np.ndarray:
        return np.asarray(experiment.pixels.to_network(stored))

    total = np.zeros((e.num_real, *experiment.image_shape))
    ratio, count = np.zeros(e.num_real), np.zeros(e.num_real, int)
    places = e.conditioned_on()
    for which, samples in e.restored():
        x = network(samples)
        for array, values in ((total, x), (ratio, _psnr(x, network(e.source.read(places[which])))), (count, 1)):
            np.add.at(array, which, values)
    drawn = np.flatnonzero(count)
    real, rows = network(e.source.read(places[drawn])), e.source.read_rows(places[drawn])
    repeats = e.num_images // e.num_real
    result: dict[str, Any] = {**bits.mean_and_error(ratio[drawn] / count[drawn]), "unit": "dB"}
    if repeats > 1 and e.num_images % e.num_real == 0:
        result["mean_of_samples"] = {"samples": repeats, **bits.mean_and_error(_psnr(total / repeats, real))}
    if conditioning.shape[-1] == experiment.image_shape[-1]:
        condition = experiment.pixels.from_network(conditioning.to_network(conditioning.split(rows)[1]))
        result["condition"] = bits.mean_and_error(_psnr(network(condition), real))
    return result | {"definition": e.definition("sampling", "reference")}


def rate_distortion(e: Evaluation) -> dict[str, Any]:
    """The rate-distortion curve, and a table at each tenth of the reverse process."""
    rows = bits.rate_distortion(e.drawn(), e.edges)
    return {
        "rate": rows[-1]["rate"],
        "distortion_bits": float(e.drawn().bits[:, 0].astype(np.float64).mean()),
        "rmse": rows[-1]["distortion"],
        "table": bits.progressive_table(rows, e.experiment.process.schedule.T),
        "curve": rows,
        "definition": e.definition("bound", "reference"),
    }


def nearest(e: Evaluation) -> dict[str, Any]:
    """The real images nearest to each of the first samples, by pixels and by features: were training images memorised?"""
    samples, result = e.first_samples()[:NEAREST], {}
    block, pixels = max(1, BLOCK_BYTES // samples[0].nbytes), pixel_features(e.experiment.pixels)
    starts = range(0, e.num_real, block)
    blocks = (pixels.compute(e.read(range(i, min(i + block, e.num_real))))["features"] for i in starts)
    found = {"pixels": scores.nearest(pixels.compute(samples)["features"], blocks, count=NEAREST)}
    if e.features.name != PIXELS.name:
        queries = e.features.compute(samples)["features"]
        found[e.features.name] = scores.nearest(queries, [e.real()["features"]], count=NEAREST)
    for name, (places, distances) in found.items():
        result[name] = {"places": e.places[places].tolist(), "distances": distances.tolist()}
    return {"nearest": result, "definition": e.definition("sampling", "features", "reference")}


# By name, cheap ones first: the order in which a command that names none computes them.
METRICS: dict[str, Callable[[Evaluation], dict[str, Any]]] = {
    "losses": losses,  # 4 evaluations of the network for each real image
    "nearest": nearest,
    "is": inception_score,  # a chain for each sample
    "kid": kid,
    "fid": fid,
    "prdc": prdc,
    "nll": nll,  # all T for each real image
    "rate-distortion": rate_distortion,
    "psnr": psnr,  # a chain for each sample
    "ode-nll": ode_nll,  # some hundred evaluations, and as many gradients, for each real image
}
# Metric, or a number of `prdc` -> its full name, and whether "lower" or "higher" is better; "" where neither is.
DESCRIPTIONS: dict[str, tuple[str, str]] = {
    "fid": ("Fréchet distance", "lower"),
    "is": ("Inception score", "higher"),
    "kid": ("Kernel distance", "lower"),
    "prdc": ("Precision, recall, density and coverage", "higher"),
    "precision": ("Precision", "higher"),
    "recall": ("Recall", "higher"),
    "density": ("Density", "higher"),
    "coverage": ("Coverage", "higher"),
    "losses": ("Loss of the real images", "lower"),
    "nll": ("Bits per dimension", "lower"),
    "rate-distortion": ("Rate and distortion", ""),
    "nearest": ("Nearest real images", ""),
    "psnr": ("Peak signal-to-noise ratio", "higher"),
    "ode-nll": ("Bits per dimension by the ODE", "lower"),
}
WITHOUT_FEATURES = ("losses", "nearest", "nll", "rate-distortion", "psnr", "ode-nll")
ON_REQUEST = ("psnr", "ode-nll")  # not computed by a command that names no metric
BITS = ("nll", "rate-distortion", "ode-nll")  # of 8-bit images


def step_of(result: dict[str, Any]) -> int:
    """The checkpoint's step of a result."""
    return _model_of(result)["step"]


def weights_of(result: dict[str, Any]) -> str:
    """The parameters that a result is of (`Run.weights`)."""
    return _model_of(result).get("weights", "ema")


def said_weights(result: dict[str, Any]) -> list[str]:
    """The parameters that a result is of, in words; nothing for the EMA, which is the usual."""
    weights = weights_of(result)
    return {"ema": [], "raw": ["raw parameters"]}.get(weights, [f"the average {weights}"])


def _model_of(result: dict[str, Any]) -> dict[str, Any]:
    definition = result["definition"]
    return next(definition[name] for name in ("sampling", "bound", "flow", "losses") if name in definition)


def file_name(result: dict[str, Any]) -> str:
    """The file name of a result."""
    return f"{result['metric']}-{step_of(result):08d}-{digest(result['definition'])[:8]}.json"


def evaluate(
    evaluation: Evaluation, metrics: tuple[str, ...], *, tell: Callable[[dict[str, Any]], object] | None = None
) -> dict[str, dict[str, Any]]:
    """Computes metrics, resuming from parts on disk, and writes each result to its file as soon as it is there.

    Args:
        evaluation: What they are computed from.
        metrics: Names of `METRICS`.
        tell: Called with each result, once it is written.

    Returns:
        The results by metric.

    All processes compute; process 0 writes and tells.
    """
    if unknown := [name for name in metrics if name not in METRICS]:
        raise UsageError(f"got the metric {unknown[0]!r}, expected some of {', '.join(METRICS)}")
    if set(metrics) & set(BITS):
        evaluation.check_bits()
    if "fid" in metrics:
        evaluation.check_distance()
    results = {}
    for name in metrics:
        result = {"metric": name, **METRICS[name](evaluation)}
        result["sha256"] = digest(result)
        if jax.process_index() == 0:
            assert evaluation.folder is not None  # `of_run` gives one
            evaluation.folder.mkdir(parents=True, exist_ok=True)
            write_text(evaluation.folder / file_name(result), json.dumps(result, indent=2) + "\n")
            if tell is not None:
                tell(result)
        results[name] = result
    return results
