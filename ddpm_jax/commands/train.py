"""Trains a diffusion model: ddpm-jax train digits --workdir runs/digits [--any.field value]

A folder or a zip file of pictures may stand in the place of the config: a small config is chosen by them. The same command
resumes the run.
"""

import contextlib
import signal
import sys

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ddpm_jax.commands.arguments import Train
from ddpm_jax.config import Config, check, flatten
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import open_folder
from ddpm_jax.data import Source, make_feed, open_source
from ddpm_jax.evaluation.evaluators import make_evaluators, open_held_out
from ddpm_jax.evaluation.reference import Track, find_reference
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.footprint import check_training
from ddpm_jax.training.loop import Interrupted, LoopParts, StopSignal, train_loop
from ddpm_jax.training.metric_writer import MetricWriter
from ddpm_jax.training.snapshots import make_snapshots
from ddpm_jax.training.start import describe, start_state
from ddpm_jax.training.step import TrainState, make_train_step
from ddpm_jax.training.workdir import CHECKPOINTS, check_there, classes_of, enter, held

MOST_NAMED = 10  # classes in a note


def train(
    experiment: Experiment,
    workdir: epath.PathLike,
    *,
    mesh: Mesh | None = None,
    unverified: bool = False,
    changed_data: bool = False,
) -> TrainState:
    """Trains an experiment to train.steps, from the workdir's newest intact checkpoint or from the start.

    Args:
        experiment: What is trained: `Experiment.from_config(config)`, also with your own network.
        workdir: The folder that the run is written to.
        mesh: The devices (`make_mesh`); default all, with an fsdp axis of train.fsdp.
        unverified: Resume from the newest checkpoint without checking it.
        changed_data: Resume even if the data set has changed.

    Returns:
        The last state.

    Raises:
        UsageError: If the config, the data or the workdir cannot be used, or processes differ in these or the options. This is
            raised before anything is compiled, except for a picture that cannot be decoded at its step.
        RunError: If a loss is not finite, a save fails or the workdir is gone.
        OSError: If the logs cannot be written.
        Interrupted: After SIGTERM or SIGINT, once the state is saved.

    Example:
        >>> from ddpm_jax import Experiment, train
        >>> train(Experiment.from_config(config), "runs/mine")    # doctest: +SKIP
    """
    config, workdir, stop = experiment.config, open_folder(workdir), StopSignal()
    # Hosts may find the images under different names: their identities are compared once they are open.
    same = {name: value for name, value in flatten(config).items() if not name.endswith("source")}
    sharding.check_same(same | {"--workdir": str(workdir), "--unverified": unverified, "--changed-data": changed_data})
    mesh = _checked_mesh(experiment, mesh)
    with held(workdir):
        source, held_out = _open_data(experiment, workdir)
        enter(workdir, config, own_network=experiment.has_own_network)
        keep = {"keep_last": config.train.keep_last, "keep_every": config.train.keep_every}
        checkpoints = Checkpoints(workdir / CHECKPOINTS, config=config, **keep, say=tqdm.write)
        with stop.collected(), contextlib.closing(checkpoints):
            state, meta = start_state(
                experiment, source, mesh, checkpoints, unverified=unverified, changed_data=changed_data
            )
            step = int(state.step)
            _check_dispatch(step, config.train.steps_per_dispatch)
            tqdm.write(describe(experiment, source, mesh, state, workdir))
            snapshots = make_snapshots(workdir, config, last_step=step)
            track = [Track(workdir, config, found)] if (found := find_reference(config, source.identity)) else []
            parts = LoopParts(
                train_steps=make_train_step(experiment, mesh=mesh),
                feed=make_feed(config, source, mesh),
                learning_rate=experiment.learning_rate,
                checkpoints=checkpoints,
                writer=MetricWriter(workdir, last_step=step, say=tqdm.write) if jax.process_index() == 0 else None,
                evaluators=[*snapshots, *make_evaluators(experiment, mesh, source, held_out), *track],
                check=lambda: check_there(workdir),
            )
            return train_loop(config.train, parts, state, meta, stop)


def _checked_mesh(experiment: Experiment, mesh: Mesh | None) -> Mesh:
    """The devices, once the config and the memory that its training takes are checked for them."""
    config, own_network = experiment.config, experiment.has_own_network
    num_devices = jax.device_count() if mesh is None else mesh.devices.size
    for warning in check(config, num_devices=num_devices, own_network=own_network):
        tqdm.write(f"Note: {warning}.")
    mesh = sharding.make_mesh(fsdp=config.train.fsdp) if mesh is None else mesh
    if not own_network:
        check_training(config, mesh)
    return mesh


def _open_data(experiment: Experiment, workdir: epath.Path) -> tuple[Source, Source | None]:
    """The training images and the held-out ones, if there are evaluations: the same on all processes."""
    config = experiment.config
    source = open_source(config.data)
    classes = list(source.read_classes()) if experiment.num_classes else []
    before = classes_of(workdir)
    if classes and before[: len(classes)] == classes:  # the last ones may have no images any more, and keep their names
        source, classes = source.in_classes_of(before), before
    held_out = open_held_out(experiment, classes) if config.train.eval_every else None
    sharding.check_same({"data.source": source.identity, "train.eval_source": held_out.identity if held_out else {}})
    for note in data_notes(config, source, held_out):
        tqdm.write(f"Note: {note}.")
    return source, held_out


def data_notes(config: Config, source: Source, held_out: Source | None) -> list[str]:
    """What is odd about the images, one sentence each: held-out ones that are the training images, classes without images.

    Raises UsageError if the images have no labels of the config's classes.
    """
    notes, num_classes = [], config.model.num_classes
    if held_out is not None and held_out.identity == source.identity:
        notes.append(
            f"train.eval_source={config.train.eval_source} holds the training images, so its numbers tell nothing of new ones; "
            "name others, a test split such as tfds:cifar10:test"
        )
    labels = source.labels_of(num_classes)
    absent = [] if labels is None else np.setdiff1d(np.arange(num_classes), labels).tolist()
    if absent:
        named = ", ".join(map(str, absent[:MOST_NAMED])) + (", ..." if len(absent) > MOST_NAMED else "")
        notes.append(
            f"model.num_classes={num_classes}, but {len(absent)} of these have no images ({named}) and are never trained; set it "
            "to the number of classes that there are, or add images"
        )
    return notes


def _check_dispatch(step: int, steps: int) -> None:
    if step % steps:
        raise UsageError(
            f"the run stands at step {step}, which is not a multiple of train.steps_per_dispatch={steps}; "
            "choose a divisor of it"
        )


def main(arguments: Train) -> None:
    """Trains, and says at which step a signal stopped it."""
    if arguments.distributed:
        sharding.start_processes()
    try:
        experiment = Experiment.from_config(arguments.config)
        train(experiment, arguments.workdir, unverified=arguments.unverified, changed_data=arguments.changed_data)
    except Interrupted as stop:
        by = signal.Signals(stop.signum).name
        print(f"\n{by}: {stop}; the same command continues from there.", file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None
