"""Evaluates a run: ddpm-jax evaluate WORKDIR --metrics fid is kid prdc nll rate-distortion nearest

After a kill, the same command resumes. Results, figures and report.html are written into the workdir.
"""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import jax
import tyro
from etils import epath

from ddpm_jax.config import Choices
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, import_extra, program
from ddpm_jax.evaluation.evaluation import EVALUATION, Evaluation, Options
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.figures import FOLDER, draw_figures
from ddpm_jax.evaluation.inception import Preprocessing
from ddpm_jax.evaluation.inception_weights import HOW_TO_GET, inception_features, inception_path
from ddpm_jax.evaluation.metrics import METRICS, WITHOUT_FEATURES, evaluate
from ddpm_jax.evaluation.report import describe, write_report
from ddpm_jax.generation.generator import SamplerOptions
from ddpm_jax.training.workdir import load_run


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run on its EMA parameters."""

    metrics: tuple[Annotated[str, Choices(METRICS)], ...] = ()
    """What is computed; default all that the features allow, and without Inception weights what needs no features."""
    features: Literal["inception", "pixels"] = "inception"
    """Features that compare images: those of Inception-v3, as in papers, or raw pixels."""
    preprocessing: Preprocessing = "tensorflow"
    """Resizing and scaling for Inception: as in the original FID, or as in pytorch-fid."""
    options: tyro.conf.OmitArgPrefixes[Options] = field(default_factory=Options)
    sampler: tyro.conf.OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    step: int | Literal["best"] | None = None
    """The checkpoint's step, or best, by train.keep_best; default the newest."""
    figures: bool = True
    """Draw the figures of the report as well."""
    distributed: bool = False
    """Join the other processes of a multi-host run (see docs/parallelism.md)."""
    unverified: bool = False
    """Use the checkpoint even if its manifest is missing or does not match."""


def main() -> None:
    """Parses the command line, computes the metrics and writes the report."""
    if {"-h", "--help"} & set(sys.argv):
        tyro.cli(Arguments, prog=f"{program()} WORKDIR", args=["--help"])
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UsageError(f"no workdir was given; run {program()} WORKDIR, and {program()} --help for the options")
    workdir = sys.argv[1]
    arguments = tyro.cli(Arguments, prog=f"{program()} {workdir}", args=sys.argv[2:])
    if "--metrics" in sys.argv and not arguments.metrics:
        raise UsageError(f"--metrics is empty; give some of {', '.join(METRICS)}")
    for module in ("matplotlib", "sklearn"):
        import_extra(module, "evaluation", program())
    if arguments.distributed:
        sharding.start_processes()
    first = jax.process_index() == 0
    run = load_run(workdir, step=arguments.step, unverified=arguments.unverified)
    metrics: tuple[str, ...] = arguments.metrics
    features = PIXELS
    if arguments.features == "inception":
        if (metrics and set(metrics) - set(WITHOUT_FEATURES)) or sharding.first_decides(inception_path().exists):
            features = inception_features(
                run.mesh, preprocessing=arguments.preprocessing, batch_size=arguments.options.batch_size
            )
        elif not metrics:
            metrics = WITHOUT_FEATURES
            if first:
                print(f"Without Inception weights only {', '.join(metrics)} are computed; {HOW_TO_GET}.")
    if not metrics:
        metrics = tuple(name for name in METRICS if name != "is" or arguments.features == "inception")
    evaluation = Evaluation.of_run(run, workdir, features, arguments.options, arguments.sampler)
    with evaluation.alone():
        results = evaluate(evaluation, metrics)
        if arguments.figures:
            draw_figures(run, evaluation, epath.Path(workdir) / EVALUATION / FOLDER, results)
        if first:
            for name, result in results.items():
                print(f"{name}: {describe(result)}")
            print(f"The report: {write_report(workdir)}")
