"""The two sides compared, and the page that says it: Welch's t-test of each measure, and Markdown."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from ddpm_jax.evaluation.results import plain, with_spread

SIDES = {"ddpm_jax": "ddpm_jax", "pytorch": "PyTorch"}
CONFIDENCE = 0.95


def welch(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours against theirs: means, standard deviations, the difference with its interval, and Welch's t-test."""
    test = stats.ttest_ind(ours, theirs, equal_var=False)
    low, high = test.confidence_interval(CONFIDENCE)
    sides = zip(SIDES, (ours, theirs), strict=True)
    return {
        **{side: {"mean": float(np.mean(x)), "deviation": float(np.std(x, ddof=1))} for side, x in sides},
        "difference": float(np.mean(ours) - np.mean(theirs)),
        "interval": [float(low), float(high)],
        "t": float(test.statistic),
        "p": float(test.pvalue),
    }


def row(name: str, compared: dict[str, Any]) -> str:
    """A measure's row of the table; the difference is in percent of PyTorch's mean."""
    means = (with_spread(compared[side]["mean"], compared[side]["deviation"]) for side in SIDES)
    percent = 100 / compared["pytorch"]["mean"]
    low, high = (percent * end for end in compared["interval"])
    difference = f"{percent * compared['difference']:+z.1f} % ({low:+z.1f} to {high:+z.1f})"
    cells = [*(" ± ".join(filter(None, mean)) for mean in means), difference]
    return f"| {' | '.join([name, *cells, format(compared['t'], '+z.1f'), plain(compared['p'], decimals=2)])} |"


def verdict(comparison: dict[str, dict[str, Any]]) -> str:
    """Whether the sides differ by more than seeds do: the least p is held to Bonferroni's limit."""
    name, least = min(comparison.items(), key=lambda item: item[1]["p"])
    alpha, count = 1 - CONFIDENCE, len(comparison)
    low = sum(compared["p"] < alpha for compared in comparison.values())
    said = "No difference goes" if least["p"] >= alpha / count else "There is a difference that goes"
    return (
        f"{said} beyond what seeds explain. The least p of the {count} measures is {plain(least['p'], decimals=3)} ({name}). "
        f"Were the sides equal, it would be below {plain(alpha / count, decimals=4)}, {alpha:.2f} / {count}, in at most "
        f"{alpha:.0%} of such comparisons; {low} of {count} are below {alpha:.2f}."
    )


def page(result: dict[str, Any]) -> str:
    """The page of a comparison, Markdown."""
    steps, T, software = result["config"]["train"]["steps"], result["config"]["diffusion"]["T"], result["software"]
    seeds, count = ", ".join(map(str, result["seeds"])), len(result["seeds"])
    minutes = sum(map(sum, result["cpu_seconds"].values())) / 60
    versions = ", ".join(f"{name} {software[name]}" for name in ("jax", "torch", "diffusers"))
    before = [
        f"""`make torch-training EXTRAS=test,parity` trains `configs/digits.py` for {steps:,} steps with this package and with
        PyTorch, seeds {seeds} each, and writes this page and `results/torch_training/comparison.json`.""",
        """In PyTorch the network, the noise, the EMA and the sampler are diffusers' (`UNet2DModel`, `DDPMScheduler`, `EMAModel`,
        `DDPMPipeline`); Adam and the clipping of the gradient are PyTorch's. `results/torch_training/torch_recipe.py` imports
        nothing of this package. The initial weights have the paper's distribution, not PyTorch's default: uniform with the
        variance 1 / fan_avg, and the last layers nearly zero. Images, batch size, learning rate and its warm-up, Adam's
        constants, clipping and the decays of the EMA are the same. Each side draws initial weights, the order of images, t and
        noise by its own generator.""",
        f"""One program judges both. PyTorch's weights are imported as any model of diffusers is. The loss of all
        {result["data"]["images"]:,} training images by quarter of t is taken with the same t and noise for every run. Each side
        draws its own {result["images"]:,} samples in all {T} steps; the Fréchet distance is that of their pixels in [-1, 1] to
        the training images'.""",
    ]
    table = ["| measure | ddpm_jax | PyTorch | difference | t | p |", "|---|---|---|---|---|---|"]
    after = [
        f"""A mean is over seeds, ± the standard deviation of one run. The difference is ddpm_jax less PyTorch in percent of
        PyTorch's mean, with its {CONFIDENCE:.0%} interval; t is the difference in standard errors, p that of Welch's test.""",
        f"""{verdict(result["comparison"])} With {count} seeds a side, a difference below half of an interval is not
        seen.""",
        f"""Made on {result["hardware"]}, {software["device"]}, with Python {software["python"]}, {versions}, in {minutes:,.0f}
        minutes of processor time.""",
    ]
    rows = "\n".join([*table, *(row(name, compared) for name, compared in result["comparison"].items())])
    return "\n\n".join(["# The same recipe in PyTorch", *map(_wrapped, before), rows, *map(_wrapped, after)]) + "\n"


def _wrapped(paragraph: str) -> str:
    return textwrap.fill(" ".join(paragraph.split()), 128, break_long_words=False, break_on_hyphens=False)
