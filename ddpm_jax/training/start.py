"""The first state of a training: the newest intact checkpoint, another run's parameters, or random ones."""

import dataclasses
import shlex
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.data import Source
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.ema import MOST_INITIAL, initial_share
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import TrainState, abstract_state, equal_averages, init_sharded_state
from ddpm_jax.training.workdir import check_network, load_run, network_name


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
    step = checkpoints.choose(unverified=unverified)
    if step is not None:
        meta = checkpoints.restore_meta(step)
        if meta["data"] not in (None, source.identity):  # None: imported weights record no data set
            changed = f"the data set has changed since the checkpoint of step {step}"
            changed += f": it was {meta['data']} and is {source.identity}"
            if not changed_data:
                raise UsageError(
                    f"{changed}; give the same data, start in another workdir, or continue with the new data by --changed-data"
                )
            tqdm.write(f"Note: {changed}.")
        check_network(meta, experiment)
        state = checkpoints.restore_state(step, abstract_state(experiment, mesh))
        return state, meta | {"data": source.identity}
    state = init_sharded_state(experiment, mesh)
    if experiment.config.train.init_from:
        params = initial_params(experiment, state, mesh)
        averages = equal_averages(experiment, params)
        state = dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params), averages=averages)
    meta = {"data": source.identity, "since_log": {}, "network": network_name(experiment)}
    return state, meta | ({"classes": list(source.read_classes())} if experiment.num_classes else {})


def initial_params(experiment: Experiment, state: TrainState, mesh: Mesh) -> Any:
    """The EMA parameters of the run `train.init_from`. Raises UsageError if their shapes differ from this network's."""
    source = experiment.config.train.init_from
    network = experiment.network if experiment.has_own_network else None  # else the U-Net of the other run's config
    params = load_run(source, mesh=mesh, network=network).params
    theirs, ours = (
        {jax.tree_util.keystr(k): a.shape for k, a in jax.tree.leaves_with_path(p)} for p in (params, state.params)
    )
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise UsageError(
            f"the parameters of train.init_from={source} do not fit this network: {name} has shape "
            f"{theirs.get(name)} there and {ours.get(name)} here; use the same model"
        )
    return jax.device_put(params, jax.tree.map(lambda a: a.sharding, state.params))
