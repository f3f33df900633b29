"""Evaluations during training: a grid of samples, and losses, bits/dim and FID by the metrics of evaluate.py.

They use the EMA parameters and the same draws each time, so two evaluations differ by the parameters alone; the grid shows the
raw parameters too, while the EMA is of little use. To add an evaluator, write a class with `name`, `every` and `__call__`, and
add it to `EVALUATORS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8
from tqdm import tqdm

from ddpm_jax.config import Config
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import digest
from ddpm_jax.data import Source, open_source
from ddpm_jax.data.sheets import beside, class_grid, grid
from ddpm_jax.evaluation import metrics
from ddpm_jax.evaluation.evaluation import Evaluation, Programs
from ddpm_jax.evaluation.features import check_pictures, of_pictures, pixel_features
from ddpm_jax.evaluation.inception_weights import inception_features
from ddpm_jax.evaluation.options import Options
from ddpm_jax.generation.generator import draw, sample_key
from ddpm_jax.training import ema
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.loop import Evaluator, Findings
from ddpm_jax.training.step import TrainState

TERMS = 16  # terms of the bound between L_T and L_0 for each held-out image


def open_held_out(experiment: Experiment, classes: Sequence[str] = ()) -> Source:
    """train.eval_images images of train.eval_source, decoded like the training images. classes: the names of theirs.

    Raises UsageError if the source cannot be read, or has fewer than two images.
    """
    config = experiment.config
    train = config.train
    source = open_source(
        dataclasses.replace(config.data, source=train.eval_source, condition_source=train.eval_condition_source)
    )
    source = source.in_classes_of(classes)
    if len(source) < 2:
        raise UsageError(f"train.eval_source={config.train.eval_source} has {len(source)} image; give at least 2")
    labels, places = source.labels_of(config.model.num_classes), spread(source, config.train.eval_images)
    chosen = None if labels is None else labels[places]
    return Source(
        source.read(places),
        lambda: chosen,
        source.identity,
        conditions=None if source.conditions is None else source.conditions[places],
    )


def spread(source: Source, count: int) -> Int[np.ndarray, " n"]:
    """The places of at most `count` images of a source, equally spaced, since a source may be sorted by class."""
    count = min(count, len(source))
    return np.arange(count) * len(source) // count


class SampleGrid:
    """Draws the first train.num_samples images of the run's seed; with conditions, of those of `source`, which stand beside.

    While the EMA still holds much of the initial parameters, the raw parameters draw them too, and a note says so.
    """

    name, doing = "samples", "drawing the grid"

    def __init__(self, programs: Programs, source: Source):
        experiment = programs.experiment
        self.every, self._count = experiment.config.train.sample_every, experiment.config.train.num_samples
        self._programs, self._experiment, self._classes = programs, experiment, source.read_classes()
        self._tables: dict[str, Any] = {}
        if experiment.conditioning is not None and self.every:
            places = spread(source, self._count)
            self._tables["conditions"] = np.asarray(experiment.conditioning.split(source.read_rows(places))[1])
            labels = source.labels_of(experiment.num_classes)
            self._tables |= {} if labels is None else {"labels": labels[places]}

    def __call__(self, state: TrainState) -> Findings:
        """The images, as the picture `samples`; beside those of the raw parameters, where these are drawn too."""
        images, step = self._draw(state.ema_params), int(state.step)
        note = ema.note(self._experiment.config.train, step)
        sheets = [self._sheet(images)] if note or self._experiment.num_classes or self._tables else []
        if self._tables:
            sheets = [self._conditions(), *sheets]
        if note:
            if jax.process_index() == 0:
                tqdm.write(f"Note: the grid shows EMA (left) and raw parameters (right), since {note}.")
            sheets.append(self._sheet(self._draw(state.params)))
        return Findings({}, {self.name: functools.reduce(beside, sheets)[None] if sheets else images})

    def _sheet(self, images: UInt8[np.ndarray, "N H W C"]) -> UInt8[np.ndarray, "h w C"]:
        """The images side by side; with classes their names too."""
        if not self._experiment.num_classes or self._tables:
            return grid(images)
        return class_grid(images, np.arange(len(images)) % self._experiment.num_classes, self._classes)

    def _conditions(self) -> UInt8[np.ndarray, "h w C"]:
        """The conditions side by side, with as many channels as the samples' sheet."""
        pixels, conditioning = self._experiment.pixels, self._experiment.conditioning
        assert conditioning is not None
        stored = pixels.from_network(conditioning.to_network(self._tables["conditions"]))
        sheet = grid(pixels.to_pictures(np.asarray(stored)))
        channels = 3 if self._experiment.image_shape[-1] >= 3 else 1
        return sheet if sheet.shape[-1] == channels else sheet[..., :1].repeat(channels, axis=-1)

    def _draw(self, params: Any) -> UInt8[np.ndarray, "N H W C"]:
        size = sharding.round_up(self._count, self._programs.mesh.devices.size)
        key, first = sample_key(self._experiment.config.seed), range(self._count)
        images = draw(self._programs.generate, params, key, first, size=size, given=self._tables)
        return self._experiment.pixels.to_pictures(np.asarray(images)[: self._count])


class HeldOut:
    """Computes losses and bits/dim of held-out images, and the FID of train.eval_samples samples to the training images.

    eval_loss, eval_loss_quarter_1 .. 4 (from small t to large): the training loss.
    eval_bits_per_dim, eval_bits_per_dim_error: an unbiased estimate of the bound from 16 terms between L_T and L_0, and its
    standard error over the images; of 8-bit images only.
    eval_fid: if train.eval_samples is not 0.
    eval_of: a fingerprint of images, samples and features; numbers with equal ones can be compared.

    Raises UsageError if the Inception weights are needed but missing, or as `Evaluation.check_distance`.
    """

    name, doing = "eval_loss", "evaluating held-out images"

    def __init__(self, programs: Programs, source: Source, held_out: Source):
        options = programs.experiment.config.train
        self.every = options.eval_every
        self._programs, self._source, self._held_out = programs, source, held_out
        experiment = programs.experiment
        self._features = pixel_features(experiment.pixels)
        if options.eval_samples and options.eval_features == "inception":
            check_pictures(experiment)
            # evaluate.py's batch size, so that both share the cached features
            size = sharding.round_up(Options().batch_size, programs.mesh.devices.size)
            inception = inception_features(programs.mesh, preprocessing="tensorflow", batch_size=size)
            self._features = of_pictures(inception, experiment.pixels)
        if options.eval_samples:
            self._of_samples({}).check_distance()

    def __call__(self, state: TrainState) -> Findings:
        """The numbers, by the names above."""
        params = state.ema_params
        config = self._programs.experiment.config
        options = Options(seed=config.seed, batch_size=config.train.batch_size, bootstrap=0)
        held_out = self._evaluation(params, self._held_out, options)
        losses = metrics.losses(held_out)
        numbers = {"eval_loss": losses["value"]}
        numbers |= {f"eval_loss_{name}": quarter["value"] for name, quarter in losses["quarters"].items()}
        if config.data.value_range is None:
            bound = metrics.nll(held_out)
            numbers |= {"eval_bits_per_dim": bound["value"], "eval_bits_per_dim_error": bound["standard_error"]}
        if config.train.eval_samples:
            numbers["eval_fid"] = metrics.fid(self._of_samples(params))["value"]
        return Findings(numbers | {"eval_of": eval_of(config, self._source, self._held_out)}, {})

    def _of_samples(self, params: Any) -> Evaluation:
        config = self._programs.experiment.config
        options = Options(seed=config.seed, num_images=config.train.eval_samples, bootstrap=0)
        return self._evaluation(params, self._source, options)

    def _evaluation(self, params: Any, source: Source, options: Options) -> Evaluation:
        return Evaluation(self._programs, params, source, self._features, options, model={})


def eval_of(config: Config, source: Source, held_out: Source) -> str:
    """A fingerprint of the images, samples and features of an evaluation."""
    options = config.train
    of_samples = [source.identity, options.eval_samples, options.eval_features] if options.eval_samples else []
    return digest([held_out.identity, min(options.eval_images, len(held_out)), *of_samples])[:8]


EVALUATORS: dict[str, Callable[[Programs, Source, Source | None], Evaluator | None]] = {
    "samples": lambda programs, source, held_out: SampleGrid(programs, source),
    "held_out": lambda programs, source, held_out: None if held_out is None else HeldOut(programs, source, held_out),
}


def make_evaluators(experiment: Experiment, mesh: Mesh, source: Source, held_out: Source | None) -> list[Evaluator]:
    """The evaluators of a run, in the order of `EVALUATORS`.

    Args:
        experiment: What is trained.
        mesh: The devices of its state.
        source: The training images.
        held_out: The held-out images; None: no evaluation on them.

    Returns:
        The evaluators, each with its own interval.

    Raises:
        UsageError: If the Inception weights are needed but missing.
    """
    terms = min(TERMS, experiment.process.schedule.T - 1)
    programs = Programs(experiment, mesh, terms=terms)
    made = [make(programs, source, held_out) for make in EVALUATORS.values()]
    return [evaluator for evaluator in made if evaluator is not None]
