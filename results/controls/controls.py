"""What real pictures score: the figures that those of a result's samples are read beside.

python results/controls/controls.py results/digits
python results/controls/controls.py results/fashion_mnist_small --num 5000 --test data/fashion_mnist/t10k-images-idx3-ubyte.gz

Everything is compared with the same pictures as `evaluate.py --num-real NUM` takes: as many others of the training set, these
others blurred, pictures of uniform noise, and with --test as many of a test set.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import scipy.ndimage
import tyro
from etils import epath
from jaxtyping import UInt8

from ddpm_jax.commands.cli import run
from ddpm_jax.config import from_json
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, program
from ddpm_jax.core.options import Bounds, check_bounds
from ddpm_jax.data import Source, open_source
from ddpm_jax.evaluation import scores
from ddpm_jax.evaluation.evaluation import real_places
from ddpm_jax.evaluation.features import PIXELS, Features
from ddpm_jax.evaluation.program import program_features
from ddpm_jax.training.shipped import RESULT, read_result

BLOCK = 5000  # training pictures compared at a time
Images = UInt8[np.ndarray, "N H W C"]


@dataclass(frozen=True)
class Options:
    """Score real pictures as a result's samples are scored."""

    result: tyro.conf.Positional[str]
    """Folder of a result; features.jax_export in it gives the features, else they are the pixels."""
    source: str = ""
    """Training pictures; empty: the data.source of the result's config."""
    test: str = ""
    """Test pictures."""
    num: Annotated[int, Bounds(0)] = 0
    """Pictures of each set; 0: half of the training pictures, rounded down."""
    queries: Annotated[int, Bounds(1)] = 500
    """Pictures of which the nearest training picture is sought."""
    batch_size: Annotated[int, Bounds(1)] = 100
    """Pictures whose features are computed together."""


def feature_set(features: Features, images: Images, size: int) -> np.ndarray:
    """The features of images, (N, D), computed `size` at a time."""
    parts = [features.compute(images[i : i + size])["features"] for i in range(0, len(images), size)]
    return np.concatenate(parts)


def compared(features: Features, size: int, reference: Images, sets: dict[str, Images]) -> Iterator[str]:
    """A line for each set: its Fréchet distance to the reference, and precision and recall."""
    real = feature_set(features, reference, size)
    for name, images in sets.items():
        found = feature_set(features, images, size)
        distance = scores.frechet_distance(scores.statistics(found), scores.statistics(real))
        near = scores.neighbourhoods(found, real)
        yield f"{name}: Fréchet distance {distance:.4g}, precision {near.precision.value:.3f}, recall {near.recall.value:.3f}"


def nearest(source: Source, queries: Images, *, itself: bool) -> str:
    """A line about the distances of pixels from queries to the nearest training pictures. itself: the queries are among them."""
    blocks = (source.read(np.arange(i, min(i + BLOCK, len(source)))) for i in range(0, len(source), BLOCK))
    pixels = (PIXELS.compute(block)["features"] for block in blocks)
    _, distances = scores.nearest(PIXELS.compute(queries)["features"], pixels, count=1 + itself)
    found = distances[:, -1]
    said = f"median {np.median(found):.3g}, least {found.min():.3g}"
    return f"distance of pixels from {len(queries):,} to the nearest training picture: {said}"


def controls(options: Options) -> Iterator[str]:
    """The lines of all figures. Raises UsageError for a folder that is no result, and for sets without so many pictures."""
    folder = epath.Path(options.result)
    if not (folder / RESULT).exists():
        raise UsageError(f"{folder} has no {RESULT}; give the folder of a result, results/digits say")
    data = from_json(read_result(folder)["config"]).data
    source = open_source(dataclasses.replace(data, source=options.source or data.source))
    num, size = options.num or len(source) // 2, options.batch_size
    if 2 * num > len(source):
        raise UsageError(
            f"--num {num} takes {2 * num} of the {len(source)} training pictures; give at most {len(source) // 2}"
        )
    places = real_places(len(source), num)  # those that `evaluate.py --num-real` takes
    rest = np.setdiff1d(np.arange(len(source)), places)
    others = source.read(rest[real_places(len(rest), num)])
    noise = np.random.default_rng(0).integers(0, 256, others.shape, np.uint8)
    blurred = scipy.ndimage.uniform_filter(others, (0, 3, 3, 0))
    sets = {"other training pictures": others, "these blurred by 3 x 3": blurred, "uniform noise": noise}
    queries = others
    if options.test:
        test = open_source(dataclasses.replace(data, source=options.test))
        if num > len(test):
            raise UsageError(f"--num {num} takes more than the {len(test)} test pictures; give at most {len(test)}")
        queries = test.read(real_places(len(test), num))
        sets = {"test pictures": queries} | sets
    judge, features = folder / "features.jax_export", PIXELS
    if judge.exists():
        shape = (*data.size, data.channels)
        features = program_features(judge, sharding.make_mesh(), image_shape=shape, batch_size=size)
    yield f"{features.name}; {num:,} pictures of each set, compared with {num:,} training pictures"
    yield from compared(features, size, source.read(places), sets)
    yield nearest(source, queries[: options.queries], itself=not options.test)


def main() -> None:
    """Prints the figures."""
    options = tyro.cli(Options, prog=program())
    check_bounds(options)
    for line in controls(options):
        print(line, flush=True)


if __name__ == "__main__":
    run(main)
