"""Weights in and out: ddpm-jax convert {from-diffusers,from-tensorflow,to-diffusers,export,inception} --help"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from ddpm_jax.commands.arguments import Export, FromDiffusers, FromTensorflow, Inception, Parameters, ToDiffusers
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.core import sharding
from ddpm_jax.core.files import check_place
from ddpm_jax.evaluation.inception_weights import convert_inception
from ddpm_jax.interop import diffusers, export, tensorflow
from ddpm_jax.interop.card import model_card
from ddpm_jax.training.config_json import CONFIG
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import state_from_params
from ddpm_jax.training.workdir import Run, check_empty, load_run, write_run


def check_workdir(workdir: str) -> None:
    """Raises UsageError unless the workdir is empty or new, and can be written."""
    check_place(f"{workdir}/{CONFIG}", "give another workdir")
    check_empty(workdir)


def from_diffusers(source: str, workdir: str, config: str) -> None:
    """Writes a model of diffusers as a run at step 0."""
    check_workdir(workdir)
    run_config, params = diffusers.read_model(source, load_config(config) if config else None)
    experiment = Experiment.from_config(run_config)
    write_run(workdir, experiment, state_from_params(experiment, params))
    d = run_config.diffusion
    print(f"{source} is now the run {workdir} (T={d.T}, {d.schedule} schedule, predicts {d.prediction}, {d.variance})")


def from_tensorflow(checkpoint: str, workdir: str, config: str) -> None:
    """Writes a checkpoint of the authors' code as a run."""
    check_workdir(workdir)
    experiment = Experiment.from_config(load_config(config))
    state, unused = tensorflow.read_checkpoint(checkpoint, experiment)
    write_run(workdir, experiment, state)
    print(f"Not used: {', '.join(unused) or 'nothing'}.")
    print(f"{checkpoint} is now the run {workdir} at step {state.step}; sample from it: ddpm-jax sample {workdir}")


def load(workdir: str, parameters: Parameters) -> Run:
    """Loads a run onto one device, since nothing is computed, and says if its EMA is of little use."""
    run = load_run(workdir, **dataclasses.asdict(parameters), mesh=sharding.make_mesh(devices=jax.devices()[:1]))
    if run.note:
        print(f"Note: {run.note}.")
    return run


def to_diffusers(workdir: str, folder: Path, parameters: Parameters) -> None:
    """Writes a run as a model of diffusers."""
    diffusers.check_new(folder)
    run = load(workdir, parameters)
    diffusers.write_pipeline(run, folder, model_card(run, workdir, weights=parameters.weights, title=folder.name))
    print(f"Step {run.step} of {workdir} is now the diffusers model {folder}")


def export_file(workdir: str, file: str, parameters: Parameters) -> None:
    """Writes a run's parameters or sampler as one file."""
    export.check_file(file)
    run = load(workdir, parameters)
    export.export_run(run, file, weights=parameters.weights)
    print(f"Step {run.step} of {workdir} is now in {file}")


def inception(file: str) -> None:
    """Converts the weights of Inception-v3 into the cache."""
    print(f"The weights of Inception-v3 are now in {convert_inception(file)}")


def main(arguments: FromDiffusers | FromTensorflow | ToDiffusers | Export | Inception) -> None:
    """Converts."""
    convert: dict[type, Callable[..., None]] = {
        FromDiffusers: from_diffusers,
        FromTensorflow: from_tensorflow,
        ToDiffusers: to_diffusers,
        Export: export_file,
        Inception: inception,
    }
    convert[type(arguments)](**vars(arguments))
