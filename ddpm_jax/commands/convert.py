"""Weights in and out: ddpm-jax convert {from-diffusers,from-tensorflow,to-diffusers,export,inception} --help"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from ddpm_jax.commands.config_file import load_config
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import program
from ddpm_jax.core.files import check_place
from ddpm_jax.evaluation.inception_weights import convert_inception
from ddpm_jax.interop import diffusers, export, tensorflow
from ddpm_jax.interop.card import model_card
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.step import state_from_params
from ddpm_jax.training.workdir import CONFIG, Run, check_empty, load_run, write_run

Workdir = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="WORKDIR")]
Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER-OR-ID")]
File = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]


def check_workdir(workdir: str) -> None:
    """Raises UsageError unless the workdir is empty or new, and can be written."""
    check_place(f"{workdir}/{CONFIG}", "give another workdir")
    check_empty(workdir)


def from_diffusers(source: Source, workdir: Workdir, config: str = "") -> None:
    """Import a model of diffusers (UNet2DModel or DDPMPipeline) as a run at step 0.

    Args:
        source: Folder, or id on the hub such as google/ddpm-cifar10-32.
        workdir: New folder that the run is written to.
        config: Name or file of a config of the same model, for the run's data and training options.
    """
    check_workdir(workdir)
    run_config, params = diffusers.read_model(source, load_config(config) if config else None)
    experiment = Experiment.from_config(run_config)
    write_run(workdir, experiment, state_from_params(experiment, params))
    d = run_config.diffusion
    print(f"{source} is now the run {workdir} (T={d.T}, {d.schedule} schedule, predicts {d.prediction}, {d.variance})")


def from_tensorflow(checkpoint: File, workdir: Workdir, config: str) -> None:
    """Import a checkpoint of the authors' code: parameters, their moving averages, Adam's moments and the step.

    Args:
        checkpoint: Path of the checkpoint's files without .index or .data, such as model.ckpt-790000.
        workdir: New folder that the run is written to.
        config: Name or file of the config of the checkpoint's model, such as cifar10.
    """
    check_workdir(workdir)
    experiment = Experiment.from_config(load_config(config))
    state, unused = tensorflow.read_checkpoint(checkpoint, experiment)
    write_run(workdir, experiment, state)
    print(f"Not used: {', '.join(unused) or 'nothing'}.")
    print(f"{checkpoint} is now the run {workdir} at step {state.step}; sample from it: ddpm-jax sample {workdir}")


@dataclass(frozen=True)
class Which:
    """Which parameters of a run."""

    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the parameters, or the parameters themselves."""
    step: int | Literal["best"] | None = None
    """The checkpoint's step, or best, by train.keep_best; default the newest."""
    unverified: bool = False
    """Use the checkpoint even if its manifest is missing or does not match."""

    def load(self, workdir: str) -> Run:
        """Loads the run onto one device, since nothing is computed."""
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        return load_run(workdir, step=self.step, weights=self.weights, unverified=self.unverified, mesh=mesh)


Chosen = Annotated[Which, tyro.conf.arg(name="")]


def to_diffusers(workdir: Workdir, folder: Folder, which: Chosen) -> None:
    """Write the run in WORKDIR as a new FOLDER that diffusers' DDPMPipeline.from_pretrained loads, with a model card."""
    diffusers.check_new(folder)
    run = which.load(workdir)
    diffusers.write_pipeline(run, folder, model_card(run, workdir, weights=which.weights, title=folder.name))
    print(f"Step {run.step} of {workdir} is now the diffusers model {folder}")


def export_file(workdir: Workdir, file: File, which: Chosen) -> None:
    """Write a run's parameters (FILE.safetensors) or whole sampler (FILE.jax_export) for programs without this package."""
    export.check_file(file)
    run = which.load(workdir)
    export.export_run(run, file, weights=which.weights)
    print(f"Step {run.step} of {workdir} is now in {file}")


def inception(file: File) -> None:
    """Convert the public PyTorch weights of Inception-v3 into the cache, for evaluate."""
    print(f"The weights of Inception-v3 are now in {convert_inception(file)}")


def main() -> None:
    """Parses the command line and converts."""
    commands = {f.__name__.replace("_", "-"): f for f in (from_diffusers, from_tensorflow, to_diffusers, inception)}
    tyro.extras.subcommand_cli_from_dict(
        commands | {"export": export_file}, prog=program(), description=__doc__, sort_subcommands=False
    )
