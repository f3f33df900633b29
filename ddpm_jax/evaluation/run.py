"""What the metrics of a run are made of: samples, features and bounds, of its EMA parameters, and all that defines them.

    WORKDIR/evaluation/parts/     images, features and bounds, a part at a time, so that a killed evaluation continues; may be
                                  deleted

The properties of an `Evaluation` are computed once, when first asked for; of several processes all must ask.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax import sharding
from ddpm_jax.arrays import Arrays, parse_arrays
from ddpm_jax.data import Source, open_source
from ddpm_jax.data.cache import cache_folder
from ddpm_jax.errors import UsageError
from ddpm_jax.evaluation import likelihood, scores
from ddpm_jax.evaluation.features import PIXELS, Features
from ddpm_jax.evaluation.likelihood import Drawn
from ddpm_jax.evaluation.parts import Parts, load_arrays, save_arrays
from ddpm_jax.evaluation.scores import Statistics
from ddpm_jax.files import DamagedFileError, check_place, is_regular, remove_remnants, sole_writer
from ddpm_jax.generate import (
    LAST_IMAGE,
    SamplerOptions,
    check_batch,
    generate_batches,
    make_generator,
    sample_key,
)
from ddpm_jax.room import check_disk, check_memory
from ddpm_jax.workdir import Run

EVALUATION = "evaluation"
MOST_IMAGES = 50_000  # what papers take their FID of


@dataclass(frozen=True)
class Options:
    """What is computed of a run, and of how much."""

    num_images: int = 0
    """Images that are sampled and judged; 0: as many as the real ones, at most 50,000."""
    num_real: int = 0
    """Real images: the first of the source; 0: all."""
    terms: int = 0
    """Terms of the bound between the prior's and the decoder's that each image is given, at random times; 0: all T - 1."""
    bootstrap: int = 10
    """Resampled sets that the Fréchet distance's standard error is taken from; 0: none."""
    seed: int = 0
    """Seed of the samples and of the bound's noise, 0 to 4294967295."""
    batch_size: int = 64
    """Images computed together, and kept as one part if the process is killed."""
    source: str = ""
    """The real images, as data.source names them (a test split, say); default the run's own."""
    statistics: str = ""
    """An .npz file of mu and sigma of real images' features that the Fréchet distance is taken from, instead of the source."""


class Evaluation:
    """A run and its real images, and what can be computed of them. Raises UsageError for options that cannot be used."""

    def __init__(
        self,
        run: Run,
        workdir: epath.PathLike,
        features: Features,
        options: Options,
        sampler: SamplerOptions | None = None,
    ):
        for name, low in (("num_images", 0), ("num_real", 0), ("terms", 0), ("bootstrap", 0), ("batch_size", 1)):
            if getattr(options, name) < low:
                shown = name.replace("_", "-")
                raise UsageError(f"--{shown} {getattr(options, name)} is too small; use {low} or more")
        if options.bootstrap == 1:
            raise UsageError("--bootstrap 1 has no spread; use 0 for none, or 2 or more")
        if not 0 <= options.seed < 2**32:
            raise UsageError(f"--seed {options.seed} is outside of 0 .. 4294967295; choose another")
        self.run, self.features, self.options = run, features, options
        self.sampler = SamplerOptions() if sampler is None else sampler
        # Compiled when it is first called; made here, so that options which do not go together are refused at once.
        self._generator = make_generator(run.config, run.mesh, self.sampler)
        self.folder = epath.Path(workdir) / EVALUATION
        data = run.config.data
        self.source: Source = open_source(dataclasses.replace(data, source=options.source or data.source))
        self.num_real = min(options.num_real or len(self.source), len(self.source))
        self.num_images = options.num_images or min(self.num_real, MOST_IMAGES)
        # One compiled program for all parts: every device takes as many images.
        devices = run.mesh.devices.size
        self.batch_size = -(-options.batch_size // devices) * devices
        sharding.first_decides(self._check_room)
        self.T = run.schedule.T
        self.edges = likelihood.strata(self.T, options.terms or self.T - 1)
        self.software = software(run.mesh)
        self.model = {"step": run.step, "weights": run.weights, "weights_sha256": weights_checksum(run.params)}

    def _check_room(self) -> int:
        check_batch(self.run.config, self.run.mesh, self.batch_size)
        if count := self.options.num_images:
            what, remedy = f"--num-images {count}", "use fewer"
            if count > LAST_IMAGE:
                raise UsageError(f"{what} goes beyond image {LAST_IMAGE}; {remedy}")
            image = int(np.prod(self.source.images.shape[1:]))
            # Of a function of a user's own no more is known than that it gives numbers.
            number = {PIXELS.name: image}.get(self.features.name, 1)
            check_memory(4 * number * count, f"{what} (their features)", remedy)
            there = sum(path.stat().length for path in (self.folder / "parts").glob("*/*.npz"))
            check_disk(self.folder, (image + 4 * number) * count - there, f"{what} (images and features)", remedy)
        return 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds WORKDIR/evaluation while the block runs, swept of what killed processes left; of all processes all must ask.

        Raises UsageError where another command holds it, or it cannot be written.
        """
        with contextlib.ExitStack() as held:

            def enter() -> int:
                check_place(self.folder / "figures" / "x", "make the workdir writable, or evaluate a copy of it")
                self.folder.mkdir(exist_ok=True)
                held.enter_context(sole_writer(self.folder))
                for folder in (self.folder, self.folder / "figures", *(self.folder / "parts").glob("*/")):
                    remove_remnants(folder)
                return 0

            sharding.first_decides(enter)
            yield

    # ---- What defines the numbers

    @property
    def sampling(self) -> dict[str, Any]:
        """What defines the samples but for their number."""
        d = self.run.config.diffusion
        steps = self.sampler.steps or (d.T,)
        sampler = {**dataclasses.asdict(self.sampler), "steps": steps[0] if len(steps) == 1 else list(steps)}
        return {**self.model, **sampler, "variance": d.variance, "seed": self.options.seed}

    @property
    def reference(self) -> dict[str, Any]:
        """What defines the real images."""
        name = self.options.source or self.run.config.data.source
        return {"source": name, "identity": self.source.identity, "images": self.num_real}

    def definition(self, *parts: str) -> dict[str, Any]:
        """What defines a result that is made of these: sampling, features, reference, statistics, bound."""
        statistics = {"statistics": self.options.statistics}
        if "statistics" in parts and self.options.statistics:
            content = sharding.first_reads(epath.Path(self.options.statistics))
            assert content is not None  # the statistics were read from it
            statistics["sha256"] = hashlib.sha256(content).hexdigest()
        values = {
            "sampling": {**self.sampling, "images": self.num_images},
            "features": self.features.name,
            "reference": self.reference,
            "statistics": statistics if self.options.statistics else self.reference,
            "bound": {**self.model, "seed": self.options.seed, "terms": len(self.edges) - 1, "T": self.T},
        }
        return {**{name: values[name] for name in parts}, "batch_size": self.batch_size, "software": self.software}

    # ---- What is computed, part by part

    @functools.cached_property
    def _samples(self) -> Parts:
        def compute(part: range) -> Arrays:
            whole = range(part.start, part.start + self.batch_size)
            batches = generate_batches(
                self._generator,
                self.run.params,
                sample_key(self.options.seed),
                [whole],
                batch_size=self.batch_size,
                num_devices=self.run.mesh.devices.size,
            )
            return {"images": np.concatenate([images for _, images in batches])[: len(part)]}

        definition = {**self.sampling, "batch_size": self.batch_size, "software": self.software}
        return Parts(self.folder / "parts", definition, compute)

    @functools.cached_property
    def generated(self) -> Arrays:
        """The features (and logits) of the samples."""
        definition = {**self._samples.definition, "features": self.features.name}
        parts = Parts(
            self.folder / "parts",
            definition,
            lambda part: self.features.compute(self._samples.get(part)["images"]),
        )
        return parts.all(self.num_images, self.batch_size, title="samples")

    @functools.cached_property
    def first_samples(self) -> np.ndarray:
        """The first samples, uint8 (N, H, W, C): at most 64, and one part."""
        count = min(self.num_images, self.batch_size)
        return self._samples.get(range(count))["images"][:64]

    @functools.cached_property
    def real(self) -> Arrays:
        """The features of the real images, kept in the machine's cache by the data's fingerprint."""
        return self._real_features.all(self.num_real, self.batch_size, title="real images")

    @property
    def _real_features(self) -> Parts:
        return real_features(self.source, self.features, batch_size=self.batch_size, mesh=self.run.mesh)

    def read(self, part: range) -> np.ndarray:
        """Some real images, uint8 (n, H, W, C)."""
        return self.source.read(np.arange(part.start, part.stop))

    @functools.cached_property
    def real_statistics(self) -> Statistics:
        """Mean and covariance of the real images' features: from --statistics, or computed once and kept in the cache."""
        if self.options.statistics:
            given = read_statistics(epath.Path(self.options.statistics))
            D = self.features.compute(self.read(range(1)))["features"].shape[1]
            if given.mu.shape != (D,):
                raise UsageError(
                    f"--statistics {self.options.statistics} are of {len(given.mu):,} features, but {self.features.name} "
                    f"has {D:,}; give statistics of the same function"
                )
            return given
        return feature_statistics(self._real_features, count=self.num_real, batch_size=self.batch_size)

    @functools.cached_property
    def drawn(self) -> Drawn:
        """The bound's terms of each real image."""
        compiled, key = (
            likelihood.make_bound(self.run.config, self.run.mesh, self.edges),
            likelihood.bound_key(self.options.seed),
        )

        def compute(part: range) -> Arrays:
            images, indices = self.read(part), np.arange(part.start, part.start + self.batch_size)
            padded = np.concatenate([images, np.zeros((self.batch_size - len(images), *images.shape[1:]), np.uint8)])
            drawn = compiled(self.run.params, key, padded, indices.astype(np.int32))
            return {name: np.asarray(a)[: len(part)] for name, a in drawn.items()}

        definition = {**self.definition("bound"), "identity": self.source.identity}
        parts = Parts(self.folder / "parts", definition, compute)
        return Drawn(**parts.all(self.num_real, self.batch_size, title="bits/dim"))


def software(mesh: Mesh) -> dict[str, str]:
    """The versions and devices that numbers were computed with."""
    names = ("ddpm-jax", "jax", "jaxlib", "flax", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
        "device": f"{mesh.devices.size} {mesh.devices.flat[0].device_kind}",
    }


def real_features(source: Source, features: Features, *, batch_size: int, mesh: Mesh) -> Parts:
    """The features of a source's images, kept in the machine's cache by the data's fingerprint."""
    definition = {
        "identity": source.identity,
        "image_shape": list(source.images.shape[1:]),  # one folder gives images of many sizes
        "features": features.name,
        "batch_size": batch_size,
        "software": software(mesh),
    }
    return Parts(
        epath.Path(cache_folder()) / "features",
        definition,
        lambda part: features.compute(source.read(np.arange(part.start, part.stop))),
    )


def feature_statistics(features: Parts, *, count: int, batch_size: int) -> Statistics:
    """Mean and covariance of the first `count` images' features, computed once and kept beside them."""
    path = features.folder / f"statistics-{count}.npz"
    kept = load_arrays(path)
    if kept is None or set(kept) != set(Statistics._fields):
        parts = features.each(count, batch_size, title="real images")
        computed = scores.statistics_of_parts(part["features"] for part in parts)
        save_arrays(path, computed._asdict())
        return computed
    return Statistics(**kept)


def weights_checksum(params: Any) -> str:
    """SHA-256 of parameters: names, shapes and values."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def read_statistics(path: epath.Path) -> Statistics:
    """mu and sigma of an .npz file, as published for data sets. Raises UsageError for any other file."""
    content = sharding.first_reads(path) if sharding.first_decides(lambda: is_regular(path)) else None
    try:
        arrays = parse_arrays(path, content or b"")
        mu, sigma = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    except (DamagedFileError, KeyError, TypeError, ValueError):
        raise UsageError(
            f"--statistics {path} is not an .npz file with the arrays mu and sigma; give such a file"
        ) from None
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UsageError(f"--statistics {path} has numbers that are not finite; give other statistics")
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise UsageError(f"--statistics {path} has mu {mu.shape} and sigma {sigma.shape}, expected (D,) and (D, D)")
    return Statistics(mu, sigma)
