"""What the metrics are computed from: samples, features, losses and bounds, and the definition of each.

    WORKDIR/evaluation/parts/     images, features and bounds, part by part, so that a killed evaluation resumes; may be deleted

`Programs` are compiled once for an experiment. An `Evaluation` belongs to one set of parameters; its methods compute a result at
their first call and keep it. All processes must call them.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import DamagedFileError, check_place, digest, is_regular, remove_remnants, sole_writer
from ddpm_jax.core.room import check_disk, check_memory
from ddpm_jax.core.version import __version__
from ddpm_jax.data import Source, epoch_order, open_source
from ddpm_jax.data.arrays import Arrays, parse_arrays
from ddpm_jax.data.cache import cache_folder
from ddpm_jax.evaluation import bits, scores
from ddpm_jax.evaluation.features import PIXELS, Features, in_one_shape
from ddpm_jax.evaluation.flow import TOLERANCE, check_flow, flow_keys, make_flow_bits
from ddpm_jax.evaluation.options import Options, check_options
from ddpm_jax.evaluation.parts import Parts, load_arrays, save_arrays
from ddpm_jax.evaluation.quarters import make_quarter_losses
from ddpm_jax.evaluation.scores import Statistics
from ddpm_jax.generation.generator import check_batch, draw, make_generator, sample_key
from ddpm_jax.generation.given import ConditionsOf, Tables, given_at
from ddpm_jax.generation.labels import label_table
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.workdir import Run

Result = TypeVar("Result")
EVALUATION = "evaluation"
NO_EPOCH = 2**63  # an epoch that no training reaches
CHOSEN = {"chosen": "in random order"}  # real images, where not all are taken
MOST_IMAGES = 50_000  # the number that papers use for FID


class Programs:
    """The compiled programs of evaluation, for any parameters of an experiment.

    terms: terms of the bound between L_T and L_0 that are computed for each image; 0: all. guide: the run of
    `sampler.guide_with`.
    """

    def __init__(
        self,
        experiment: Experiment,
        mesh: Mesh,
        sampler: SamplerOptions | None = None,
        *,
        terms: int = 0,
        guide: Run | None = None,
    ):
        self.experiment, self.mesh, self.guide = experiment, mesh, guide
        self.sampler = SamplerOptions() if sampler is None else sampler
        T = experiment.process.schedule.T
        self.edges = bits.strata(T, terms or T - 1)
        self.generate = make_generator(experiment, mesh, self.sampler, guide=guide)
        self.bound = bits.make_bound(experiment, mesh, self.edges)
        self.quarter_losses = make_quarter_losses(experiment, mesh)


def once(method: Callable[["Evaluation"], Result]) -> Callable[["Evaluation"], Result]:
    """Keeps the result of a method's first call: a call and no property, since all processes take part."""

    @functools.wraps(method)
    def known(self: "Evaluation") -> Result:
        if method.__name__ not in self._known:
            self._known[method.__name__] = method(self)
        return self._known[method.__name__]

    return known


class Evaluation:
    """Everything that metrics need of a network's parameters and of real images.

    Args:
        programs: The programs of the parameters' experiment.
        params: The network's parameters.
        source: The real images.
        features: The feature function.
        options: How much is computed.
        model: The identity of the parameters, recorded in results.
        folder: Where parts are kept; None: nowhere.
    """

    def __init__(
        self,
        programs: Programs,
        params: Any,
        source: Source,
        features: Features,
        options: Options,
        *,
        model: dict[str, Any],
        folder: epath.Path | None = None,
    ):
        self.programs, self.params, self.source = programs, params, source
        self.features, self.options = features, options
        self.experiment, self.mesh, self.edges = programs.experiment, programs.mesh, programs.edges
        self.model, self.folder = model, folder
        self._parts = functools.partial(Parts, None if folder is None else folder / "parts")
        self.places = real_places(len(source), options.num_real)
        self.num_real = len(self.places)
        self.num_images = options.num_images or min(self.num_real, MOST_IMAGES)
        self.batch_size = sharding.round_up(options.batch_size, self.mesh.devices.size)  # one program for all parts
        self.software = software(self.mesh)
        self.labels = source.labels_of(self.experiment.num_classes)
        self._stamp = {"stamp": source.stamp} if source.stamp else {}  # a folder's identity has names and sizes alone
        self._known: dict[str, Any] = {}

    @classmethod
    def of_run(
        cls,
        run: Run,
        workdir: epath.PathLike,
        features: Features,
        options: Options,
        sampler: SamplerOptions | None = None,
    ) -> "Evaluation":
        """The evaluation of a run, with its parts in the workdir. Raises UsageError for invalid options."""
        check_options(options)
        programs = Programs(run.experiment, run.mesh, sampler, terms=options.terms, guide=run.guide)
        data = run.config.data
        if options.source:
            data = dataclasses.replace(data, source=options.source, condition_source=options.condition_source)
        source = open_source(data).in_classes_of(run.classes)
        sharding.check_same({"the real images": source.identity})
        model = {"step": run.step, "weights": run.weights, "weights_sha256": weights_checksum(run.params)}
        folder = epath.Path(workdir) / EVALUATION
        evaluation = cls(programs, run.params, source, features, options, model=model, folder=folder)
        sharding.first_decides(evaluation._check_room)
        return evaluation

    def _check_room(self) -> None:
        check_batch(self.experiment, self.mesh, self.batch_size)
        if count := self.options.num_images:
            what, remedy = f"--num-images {count}", "use fewer"
            image = int(np.prod(self.source.images.shape[1:])) * self.source.images.dtype.itemsize
            number = self._least_width()
            check_memory(4 * number * count, f"{what} (their features)", remedy)
            there = sum(path.stat().length for path in (self._place() / "parts").glob("*/*.npz"))
            check_disk(self._place(), (image + 4 * number) * count - there, f"{what} (images and features)", remedy)

    def check_bits(self) -> None:
        """Raises UsageError if bits/dim are not defined: the decoder of Eq. (13) is of 8-bit images."""
        if self.experiment.pixels.value_range is not None:
            raise UsageError(
                "bits/dim (nll, rate-distortion, ode-nll) are of 8-bit images, which the decoder of Eq. (13) is made for, and "
                "data.value_range makes these float32; leave out these metrics"
            )

    def check_distance(self) -> None:
        """Raises UsageError if the Fréchet distance would take hours, or more memory than there is."""
        D, counts = self._least_width(), (self.num_images, 0 if self.options.statistics else self.num_real)
        scores.check_rank(max(counts), D)
        needed = 8 * D * sum(min(count, D) for count in counts)
        what, remedy = f"the Fréchet distance of {max(counts):,} images", "use fewer (--num-images, --num-real)"
        sharding.first_decides(lambda: check_memory(needed, what, remedy))

    def _least_width(self) -> int:
        """How many features an image has: known for pixels before they are computed; any other function gives at least one."""
        return int(np.prod(self.source.images.shape[1:])) if self.features.name == PIXELS.name else 1

    def _place(self) -> epath.Path:
        assert self.folder is not None  # `of_run` gives one
        return self.folder

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Locks WORKDIR/evaluation while the block runs, and removes temporary files that killed processes left.

        Raises UsageError if another command holds the lock, or the folder cannot be written.
        """
        folder = self._place()
        with contextlib.ExitStack() as held:

            def enter() -> None:
                check_place(folder / "figures" / "x", "make the workdir writable, or evaluate a copy of it")
                folder.mkdir(exist_ok=True)
                held.enter_context(sole_writer(folder))
                for swept in (folder, folder / "figures", *(folder / "parts").glob("*/")):
                    remove_remnants(swept)

            sharding.first_decides(enter)
            yield

    # ---- Provenance

    def sampling(self) -> dict[str, Any]:
        """The definition of the samples, without their number."""
        sampler, process = self.programs.sampler, self.experiment.process
        steps = sampler.steps or (process.schedule.T,)
        drawn = {**sampler.definition(), "steps": steps[0] if len(steps) == 1 else list(steps)}
        if self.programs.guide is not None:
            drawn |= {"guide": self.programs.guide.checkpoint}
        if self.labels is not None:
            table = self._tables()["labels"].tolist()
            drawn |= {"labels": list(sampler.labels) or self.source.identity, "labels_sha256": digest(table)}
        if self.experiment.conditioning is not None:
            drawn |= {"conditions": self.source.identity, "of_images": self.num_real, **self._chosen()}
        return {**self.model, **drawn, "variance": process.variance, "seed": self.options.seed}

    def reference(self) -> dict[str, Any]:
        """The definition of the real images."""
        name = self.options.source or self.experiment.config.data.source
        return {"source": name, "identity": self.source.identity, "images": self.num_real, **self._chosen()}

    def _chosen(self) -> dict[str, str]:
        return {} if self.num_real == len(self.source) else CHOSEN

    def definition(self, *parts: str) -> dict[str, Any]:
        """The definition of a result. parts: some of sampling, features, reference, statistics, bound, losses, flow."""
        drawn = {**self.model, "seed": self.options.seed, "T": self.experiment.process.schedule.T}
        values: dict[str, Callable[[], Any]] = {
            "sampling": lambda: {**self.sampling(), "images": self.num_images},
            "features": lambda: self.features.name,
            "reference": self.reference,
            "statistics": self._statistics,
            "bound": lambda: {**drawn, "terms": len(self.edges) - 1},
            "losses": lambda: drawn,
            "flow": lambda: {**drawn, "tolerance": TOLERANCE},
        }
        return {**{name: values[name]() for name in parts}, "batch_size": self.batch_size, "software": self.software}

    def _statistics(self) -> dict[str, Any]:
        """The definition of the real images' statistics."""
        if not self.options.statistics:
            return self.reference()
        content = sharding.first_reads(epath.Path(self.options.statistics))
        assert content is not None  # `_read_statistics` has read it
        return {"statistics": self.options.statistics, "sha256": hashlib.sha256(content).hexdigest()}

    # ---- Computation, part by part

    @once
    def _tables(self) -> Tables:
        """What samples are drawn with: the labels of the real images in a random order, so that every class has its share of any
        number; with conditions both of the images that count.
        """
        words, conditioning, tables = self.programs.sampler.labels, self.experiment.conditioning, dict[str, Any]()
        places = np.arange(len(self.source)) if conditioning is None else self.places
        order = places[epoch_order(self.options.seed, 0, len(places))]
        if self.labels is None or words:
            labels = label_table(words, self.experiment.num_classes, self.source.read_classes())
        else:
            labels = self.labels[order]
        if labels is not None:
            tables["labels"] = labels
        if conditioning is not None:
            tables["conditions"] = ConditionsOf(conditioning, self.source, order)
        return tables

    @once
    def _samples(self) -> Parts:
        def compute(part: range) -> Arrays:
            params = self.params if self.programs.guide is None else (self.params, self.programs.guide.params)
            key, tables = sample_key(self.options.seed), self._tables()
            images = draw(self.programs.generate, params, key, part, size=self.batch_size, given=tables)
            return {"images": np.asarray(images)[: len(part)]}

        definition = {**self.sampling(), "batch_size": self.batch_size, "software": self.software}
        if self.experiment.conditioning is not None:
            definition |= self._stamp
        return self._parts(definition, compute)

    @once
    def generated(self) -> Arrays:
        """The features (and logits) of the samples."""
        samples = self._samples()
        definition = {**samples.definition, "features": self.features.name}
        parts = self._parts(definition, lambda part: self.features.compute(samples.get(part)["images"]))
        return parts.all(self.num_images, self.batch_size, title="samples")

    @once
    def first_samples(self) -> np.ndarray:
        """The first samples, as they are stored (N, H, W, C): at most 64, and one part."""
        return self._samples().get(range(min(self.num_images, self.batch_size)))["images"][:64]

    @once
    def real(self) -> Arrays:
        """The features of the real images (`real_features`), in the order of `places`."""
        return self.real_features().all(self.num_real, self.batch_size, title="real images")

    def real_features(self) -> Parts:
        """The features of the real images, cached on this machine by the data set's fingerprint."""
        definition = {
            "identity": self.source.identity,
            "image_shape": list(self.source.images.shape[1:]),  # a folder can be read at many sizes
            "features": self.features.name,
            "batch_size": self.batch_size,
            "software": self.software,
            **self._stamp,
        }
        if self.experiment.pixels.value_range is not None:
            definition["value_range"] = self.experiment.pixels.value_range
        folder = epath.Path(cache_folder()) / "features"
        return Parts(folder, definition | self._chosen(), lambda part: self.features.compute(self.read(part)))

    def read(self, part: range) -> np.ndarray:
        """A range of the real images, as they are stored (n, H, W, C)."""
        return self.source.read(self.places[part.start : part.stop])

    @once
    def real_statistics(self) -> Statistics:
        """Mean and covariance of the real images' features: from --statistics, or computed once and cached."""
        if not self.options.statistics:
            return feature_statistics(self.real_features(), count=self.num_real, batch_size=self.batch_size)
        given = read_statistics(epath.Path(self.options.statistics))
        D = self.features.compute(self.read(range(1)))["features"].shape[1]
        if given.mu.shape != (D,):
            raise UsageError(
                f"--statistics {self.options.statistics} are of {len(given.mu):,} features, but {self.features.name} "
                f"has {D:,}; give statistics of the same function"
            )
        return given

    @once
    def drawn(self) -> bits.Drawn:
        """The bound's terms of each real image. Raises as `check_bits`."""
        self.check_bits()
        return bits.Drawn(**self._of_real(self.programs.bound, "bound", title="bits/dim"))

    @once
    def losses(self) -> np.ndarray:
        """The training loss of each real image in each quarter of t, float (N, 4)."""
        return self._of_real(self.programs.quarter_losses, "losses", title="losses")["losses"]

    @once
    def flow(self) -> Arrays:
        """Bits/dim of each real image by the probability-flow ODE. Raises as `check_bits` and `check_flow`."""
        self.check_bits()
        check_flow(self.experiment)
        compiled, keys = make_flow_bits(self.experiment, self.mesh), flow_keys(self.options.seed)
        return self._of_real(compiled, "flow", title="ODE", key=keys)

    def conditioned_on(self) -> np.ndarray:
        """The places in the source of the real images whose conditions samples are drawn of, in turn, (num_real,)."""
        return np.asarray(self._tables()["conditions"].order)

    def restored(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places in `conditioned_on`, and samples that are drawn of these conditions (n, H, W, C), part by part."""
        done = 0
        for part in self._samples().each(self.num_images, self.batch_size, title="samples"):
            yield np.arange(done, done + len(part["images"])) % self.num_real, part["images"]
            done += len(part["images"])

    def _of_real(self, compiled: Callable[..., dict[str, Any]], name: str, *, title: str, key: Any = None) -> Arrays:
        """The results of a compiled program on the real images, part by part. key: its draws'; None: those of the bound."""
        key = bits.bound_key(self.options.seed) if key is None else key

        def compute(part: range) -> Arrays:
            places = self.places[part.start : part.stop]
            indices = np.resize(places, self.batch_size).astype(np.int32)  # an image's noise is that of its place
            labels = given_at({} if self.labels is None else {"labels": self.labels}, indices)
            rows = self.source.read_rows(places)
            return in_one_shape(lambda i: compiled(self.params, key, i, indices, **labels), rows, self.batch_size)

        definition = {**self.definition(name), "identity": self.source.identity, **self._chosen(), **self._stamp}
        parts = self._parts(definition, compute)
        return parts.all(self.num_real, self.batch_size, title=title)


def software(mesh: Mesh) -> dict[str, str]:
    """The versions of the software, and the devices."""
    names = ("jax", "jaxlib", "flax", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "ddpm-jax": __version__,
        **{name: importlib.metadata.version(name) for name in names},
        "device": f"{mesh.devices.size} {mesh.devices.flat[0].device_kind}",
    }


def real_places(size: int, count: int) -> np.ndarray:
    """The places of the real images in a source of `size`: all in order, or `count` of them in a random order.

    A source may be sorted by class, so that the first images are of one class alone. The order is always the same, and fewer
    images are the first of more. It is that of no epoch: else a short run would be judged by the very images it was trained on.
    0: all.
    """
    return np.arange(size) if count == 0 or count >= size else epoch_order(0, NO_EPOCH, size)[:count]


def feature_statistics(features: Parts, *, count: int, batch_size: int) -> Statistics:
    """Mean and covariance of the features of the first `count` images.

    Those of more images than features are cached beside the features; of fewer, the features say the same in less space.
    """
    assert features.folder is not None  # `real_features` gives one
    path = features.folder / f"statistics-{count}.npz"
    kept = load_arrays(path)
    if kept is None or set(kept) != set(Statistics._fields):
        parts = features.each(count, batch_size, title="real images")
        computed = scores.statistics_of_parts(part["features"] for part in parts)
        if count >= len(computed.mu):
            save_arrays(path, computed._asdict())
        return computed
    return Statistics(**kept)


def weights_checksum(params: Any) -> str:
    """SHA-256 of the parameters' names, shapes and values."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        sha.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        sha.update(np.asarray(leaf).tobytes())
    return sha.hexdigest()


def read_statistics(path: epath.Path) -> Statistics:
    """Reads mu and sigma from an .npz file, as published for data sets. Raises UsageError for any other file."""
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
    return scores.from_covariance(mu, sigma)
