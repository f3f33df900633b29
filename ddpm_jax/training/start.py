"""The first state of a training: the newest intact checkpoint, another run's parameters, or random ones."""

import dataclasses
import itertools
import shlex
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ddpm_jax.config import Config, differences
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import digest
from ddpm_jax.core.provenance import made_with
from ddpm_jax.data import Source
from ddpm_jax.data.sources import without_shared_folders
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.ema import MOST_INITIAL, initial_share
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import TrainState, abstract_state, equal_averages, init_sharded_state
from ddpm_jax.training.workdir import Run, check_network, load_run, network_name


def describe(experiment: Experiment, source: Source, mesh: Mesh, state: TrainState, workdir: epath.Path) -> str:
    """Lines about the network, the data and the devices, the run, how to watch it, and where a resume starts."""
    train, step = experiment.config.train, int(state.step)
    devices, batch_size = mesh.devices.size, train.batch_size
    params = sum(array.size for array in jax.tree.leaves(state.params))
    said = (
        f"{params:,} parameters, {len(source):,} images; {jax.process_count()} process(es), {devices} {jax.default_backend()} "
        f"device(s), batch {batch_size} = {batch_size // devices} per device"
    )
    said += f"\n{train.steps:,} steps are {train.steps * batch_size / len(source):,.1f} epochs"
    if train.sample_every and step < train.steps:
        grid = min(train.steps, (step // train.sample_every + 1) * train.sample_every)
        said += f"; the {'next' if step else 'first'} grid of samples comes at step {grid:,}"
    if initial_share(train, train.steps) > MOST_INITIAL:
        said += (
            f"\nNote: {initial_share(train, train.steps):.0%} of the EMA will still be the initial parameters at the last "
            "step; set --train.ema-warmup, or draw samples with --weights raw."
        )
    said += f"\nCurves and samples: tensorboard --logdir {shlex.quote(str(workdir))} (pip install tensorboard)"
    if step >= train.steps:
        said += f"\nThe run stands at step {step} and train.steps={train.steps}, so nothing is left to train; raise it to go on."
        return said
    return said + (f"\nContinuing from step {step}." if step else "")


def start_state(
    experiment: Experiment,
    source: Source,
    mesh: Mesh,
    checkpoints: Checkpoints,
    *,
    unverified: bool = False,
    changed_data: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """Restores the newest intact checkpoint, or makes the state of step 0; returns the state and its meta.

    Removes partial checkpoints first.

    Args:
        experiment: What is trained.
        source: The training images.
        mesh: The devices of the state.
        checkpoints: Of the workdir.
        unverified: Restore without checking the files.
        changed_data: Accept a data set that differs from the checkpoint's.

    Raises:
        UsageError: If no checkpoint is intact, or it belongs to another config, network or data set.
    """
    sharding.first_decides(checkpoints.sweep)
    step, stamp = checkpoints.choose(unverified=unverified), digest(source.stamp)
    if step is not None:
        meta = checkpoints.restore_meta(step)
        _check_data(source, meta, step, changed_data)
        check_network(meta, experiment)
        recorded = {"classes": _classes_of(source, meta)} if experiment.num_classes else {}
        made = made_with(mesh)
        if note := note_of_rounding(meta.get("made_with", {}), made):
            tqdm.write(f"Note: {note}.")
        state = checkpoints.restore_state(step, abstract_state(experiment, mesh))
        return state, meta | {"data": source.identity, "stamp": stamp, "made_with": made} | recorded
    state = init_sharded_state(experiment, mesh)
    meta = {"data": source.identity, "stamp": stamp, "since_log": {}}
    meta |= {"network": network_name(experiment), "made_with": made_with(mesh)}
    classes = tuple(source.read_classes()) if experiment.num_classes else ()
    if experiment.num_classes:
        meta["classes"] = list(classes)
    if origin := experiment.config.train.init_from:
        network = experiment.network if experiment.has_own_network else None  # else the U-Net of the other run's config
        run = load_run(origin, mesh=mesh, network=network)
        params = fitting_params(run, state, origin)
        averages = equal_averages(experiment, params)
        state = dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params), averages=averages)
        meta["init_from"] = {"step": run.step, "checkpoint": run.checkpoint, "weights": run.weights}
        tqdm.write(describe_origin(experiment.config, classes, run, origin))
    return state, meta


def _check_data(source: Source, meta: dict[str, Any], step: int, changed_data: bool) -> None:
    """Raises UsageError if the data set is not the checkpoint's, unless that is accepted; tells if its files alone are newer."""
    before, stamp = meta.get("stamp"), digest(source.stamp)  # those of earlier versions have no stamp
    if meta["data"] not in (None, source.identity):  # None: imported weights record no data set
        changed = f"the data set has changed since the checkpoint of step {step}"
        changed += f": it was {meta['data']} and is {source.identity}"
        if not changed_data:
            raise UsageError(
                f"{changed}; give the same data, start in another workdir, or continue with the new data by --changed-data"
            )
        tqdm.write(f"Note: {changed}.")
    elif jax.process_index() == 0 and before not in (None, stamp):  # the files of other hosts may have other times
        tqdm.write(
            f"Note: files of the data set were written since the checkpoint of step {step}. Their names and sizes are the same; "
            "if one was edited, the run goes on with other data."
        )


def _classes_of(source: Source, meta: dict[str, Any]) -> list[str]:
    """The names of the classes that the run has had so far; folders that all of them lie in do not count.

    Raises UsageError if a number has come to mean another class; of imported weights, which any data may follow, a note says so.
    """
    before, now = list(meta.get("classes") or []), list(source.read_classes())
    plain = without_shared_folders(before), without_shared_folders(now)
    different = [i for i, (was, name) in enumerate(zip(*plain, strict=False)) if was != name and before[i] != now[i]]
    if not different:
        return now + before[len(now) :]
    place = different[0]
    found = f"class {place} of the checkpoint, {before[place]!r}, is {now[place]!r} now"
    if meta["data"] is None:
        tqdm.write(f"Note: {found}.")
        return now
    raise UsageError(f"{found}; name the classes so that they keep their order, or start in another workdir")


def note_of_rounding(was: dict[str, str], now: dict[str, str]) -> str:
    """A sentence if a checkpoint was made with other software or devices, empty if not, or if it does not say (`made_with`)."""
    changes = [f"{name} {was[name]} -> {value}" for name, value in now.items() if was.get(name, value) != value]
    said = "the checkpoint was made with other software or devices, so what follows is the same to rounding, not bit for bit"
    return f"{said} ({', '.join(changes)})" if changes else ""


def fitting_params(run: Run, state: TrainState, origin: str) -> Any:
    """A run's parameters, split like the state's. Raises UsageError, with the run's name, if their shapes differ."""
    theirs, ours = (
        {jax.tree_util.keystr(k): a.shape for k, a in jax.tree.leaves_with_path(p)} for p in (run.params, state.params)
    )
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise UsageError(
            f"the parameters of train.init_from={origin} do not fit this network: {name} has shape "
            f"{theirs.get(name)} there and {ours.get(name)} here; use the same model"
        )
    return jax.device_put(run.params, jax.tree.map(lambda a: a.sharding, state.params))


def describe_origin(config: Config, classes: tuple[str, ...], run: Run, origin: str) -> str:
    """Lines about the run that another one starts from: its step, its note, and what its parameters were trained for instead.

    config, classes: of the run that starts.
    """
    said = f"Starting from step {run.step} of {origin} ({run.weights})."
    if run.note:
        said += f"\nNote: {run.note}."
    other = [
        f"{name} (there {there!r}, here {here!r})"
        for name, (there, here) in differences(run.config, config).items()
        if name.startswith("diffusion.") or name in ("data.value_range", "data.condition")
    ]
    if run.classes and classes:  # either may have no names
        pairs = enumerate(itertools.zip_longest(run.classes, classes))
        other += [f"class {i} (there {a!r}, here {b!r})" for i, (a, b) in pairs if a != b][:1]
    return said + (f"\nNote: its parameters were trained for something else: {', '.join(other)}." if other else "")
