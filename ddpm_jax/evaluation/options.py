"""What is evaluated: options, which are known before JAX is imported."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.options import LAST_SEED, Bounds, Choices, check_bounds
from ddpm_jax.generation.options import LAST_IMAGE

METRIC = Choices(
    "ddpm_jax.evaluation.metrics:METRICS",
    "losses",
    "nearest",
    "is",
    "kid",
    "fid",
    "prdc",
    "nll",
    "rate-distortion",
    "psnr",
    "ode-nll",
)
Preprocessing = Literal["tensorflow", "pytorch-fid"]


@dataclass(frozen=True)
class Options:
    """How much is computed, and from which images."""

    num_images: Annotated[int, Bounds(0, LAST_IMAGE)] = 0
    """Images that are sampled and judged; 0: as many as the real ones, at most 50,000."""
    num_real: Annotated[int, Bounds(0)] = 0
    """Real images, chosen at random and always the same, since a source may be sorted by class; 0: all."""
    terms: Annotated[int, Bounds(0)] = 0
    """Terms of the bound between the prior's and the decoder's that each image is given, at random times; 0: all T - 1."""
    bootstrap: Annotated[int, Bounds(0)] = 10
    """Resampled sets that the Fréchet distance's standard error is taken from; 0: none."""
    seed: Annotated[int, Bounds(0, LAST_SEED)] = 0
    """Seed of the samples and of the bound's noise, 0 to 4294967295."""
    batch_size: Annotated[int, Bounds(1)] = 64
    """Images computed together, and kept as one part if the process is killed."""
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="(default: the run's own)")] = ""
    """The real images, as data.source names them: a test split, say."""
    condition_source: Annotated[str, tyro.conf.arg(metavar="SOURCE", help_behavior_hint="(default: none)")] = ""
    """Their paired conditions, as data.condition_source names them."""
    statistics: Annotated[str, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = ""
    """An .npz file of mu and sigma of real images' features that the Fréchet distance is taken from, instead of the source."""


def check_options(options: Options) -> None:
    """Raises UsageError for numbers that are too small or too large."""
    check_bounds(options)
    if options.condition_source and not options.source:
        raise UsageError("--condition-source is of the images of --source; give both, or leave it out")
    if options.bootstrap == 1:
        raise UsageError("--bootstrap 1 has no spread; use 0 for none, or 2 or more")
