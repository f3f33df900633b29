"""Weights in and out: ddpm-jax convert --help lists the ways"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from ddpm_jax.commands.arguments import (
    Classifier,
    Export,
    FromDiffusers,
    FromParameters,
    FromTensorflow,
    Inception,
    Parameters,
    ToDiffusers,
    ToResult,
)
from ddpm_jax.commands.config_file import command_of, load_config
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.files import check_place, write_bytes
from ddpm_jax.core.provenance import processor
from ddpm_jax.data import open_source
from ddpm_jax.evaluation.classifier import PART, accuracy, classifier_file, labels_of, train_classifier
from ddpm_jax.evaluation.inception_weights import convert_inception
from ddpm_jax.evaluation.program import program_features
from ddpm_jax.interop import diffusers, export, tensorflow
from ddpm_jax.interop.card import model_card
from ddpm_jax.interop.result import write_result
from ddpm_jax.training.config_json import CONFIG, read_config
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.parameters import ENDING
from ddpm_jax.training.shipped import RESULT
from ddpm_jax.training.step import state_from_params
from ddpm_jax.training.workdir import Run, check_empty, is_parameters, load_run, write_run


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


def from_parameters(source: str, workdir: str, weights: str) -> None:
    """Writes parameters that come with the package, or of an exported file, as a run at their step."""
    check_workdir(workdir)
    if not is_parameters(source):
        raise UsageError(f"{source} is no file of parameters; give pretrained:NAME, or a file that ends in {ENDING}")
    run = load_run(source, weights=weights, mesh=one_device())
    state = dataclasses.replace(state_from_params(run.experiment, run.params), step=jnp.asarray(run.step, jnp.int32))
    write_run(workdir, run.experiment, state, run.classes)
    print(f"{source} is now the run {workdir} at step {run.step}, with a fresh optimizer")


def to_result(workdir: str, folder: str, more: tuple[str, ...], command: str, hardware: str) -> None:
    """Reduces a run to a result."""
    check_place(f"{folder}/{RESULT}", "give another folder")
    run = load_run(workdir, mesh=one_device())
    command = command or command_of(run.config, f"runs/{Path(folder).name}")
    told = {"command": command, "hardware": hardware or processor()}
    write_result(run, epath.Path(folder), [epath.Path(name) for name in (workdir, *more)], **told)
    print(f"Step {run.step} of {workdir} is now the result {folder}")


def one_device() -> Mesh:
    """A mesh of the first device, for what is not computed much."""
    return sharding.make_mesh(devices=jax.devices()[:1])


def load(workdir: str, parameters: Parameters) -> Run:
    """Loads a run onto one device, since nothing is computed, and says if its EMA is of little use."""
    run = load_run(workdir, **dataclasses.asdict(parameters), mesh=one_device())
    if run.note:
        print(f"Note: {run.note}.")
    return run


def to_diffusers(workdir: str, folder: Path, parameters: Parameters) -> None:
    """Writes a run as a model of diffusers."""
    diffusers.check_new(folder)
    run = load(workdir, parameters)
    diffusers.write_pipeline(run, folder, model_card(run, workdir, title=folder.name))
    print(f"Step {run.step} of {workdir} is now the diffusers model {folder}")


def export_file(workdir: str, file: str, parameters: Parameters) -> None:
    """Writes a run's parameters or sampler as one file."""
    export.check_file(file)
    run = load(workdir, parameters)
    export.export_run(run, file)
    print(f"Step {run.step} of {workdir} is now in {file}")


def inception(file: str) -> None:
    """Converts the weights of Inception-v3 into the cache."""
    print(f"The weights of Inception-v3 are now in {convert_inception(file)}")


def classifier(workdir: str, file: str, test: str, epochs: int) -> None:
    """Trains a classifier on a run's images, writes it as a program, and tells its accuracy on held-out images."""
    check_place(file, "give another file")
    if (path := epath.Path(file)).exists():
        raise UsageError(f"{file} exists; choose another name, or move it away")
    config = read_config(epath.Path(workdir))
    if config.data.value_range is not None:
        raise UsageError(
            "the classifier is of 8-bit images, and data.value_range makes these float32; give a run of 8-bit images"
        )
    source = open_source(config.data)
    held_out = test or config.train.eval_source
    model, params = train_classifier(source, epochs=epochs, seed=config.seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, classifier_file(model, params, source.images.shape[1:]))
    print(f"The classifier is now in {file}")
    if held_out:
        features = program_features(path, one_device(), image_shape=source.images.shape[1:], batch_size=PART)
        tested = open_source(dataclasses.replace(config.data, source=held_out)).in_classes_of(source.read_classes())
        share = accuracy(features.compute, tested, np.unique(labels_of(source)))
        print(f"It is right about {share:.2%} of the images of {held_out}")


def main(arguments: Any) -> None:
    """Converts."""
    convert: dict[type, Callable[..., None]] = {
        FromDiffusers: from_diffusers,
        FromTensorflow: from_tensorflow,
        FromParameters: from_parameters,
        ToDiffusers: to_diffusers,
        ToResult: to_result,
        Export: export_file,
        Inception: inception,
        Classifier: classifier,
    }
    convert[type(arguments)](**vars(arguments))
