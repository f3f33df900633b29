"""Evaluates a run: ddpm-jax evaluate WORKDIR --metrics fid is kid prdc nll rate-distortion nearest

After a kill, the same command resumes. Results, figures and report.html are written into the workdir.
"""

import dataclasses

import jax
from etils import epath

from ddpm_jax.commands.arguments import Evaluate
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, import_extra, program
from ddpm_jax.evaluation.evaluation import EVALUATION, Evaluation
from ddpm_jax.evaluation.features import PIXELS, Features, check_pictures, of_pictures, pixel_features
from ddpm_jax.evaluation.figures import FOLDER, draw_figures, draw_samples
from ddpm_jax.evaluation.inception_weights import HOW_TO_GET, inception_features, inception_path
from ddpm_jax.evaluation.metrics import BITS, METRICS, ON_REQUEST, WITHOUT_FEATURES, evaluate
from ddpm_jax.evaluation.program import program_features
from ddpm_jax.evaluation.report import write_report
from ddpm_jax.evaluation.results import describe
from ddpm_jax.generation.generator import with_guide
from ddpm_jax.training.workdir import Run, is_parameters, load_run


def choose(run: Run, arguments: Evaluate) -> tuple[tuple[str, ...], Features]:
    """The metrics that are computed, and the features. Without Inception weights the default is what needs none."""
    if arguments.features != "inception" and arguments.preprocessing != Evaluate.preprocessing:
        raise UsageError(
            f"--preprocessing {arguments.preprocessing} is Inception's, and has no effect on --features {arguments.features}; "
            "leave it out"
        )
    metrics, batch_size, pixels = arguments.metrics, arguments.options.batch_size, run.experiment.pixels
    offered = tuple(
        name for name in METRICS if name not in ON_REQUEST and (pixels.value_range is None or name not in BITS)
    )
    if arguments.features == "inception":
        if (metrics and set(metrics) - set(WITHOUT_FEATURES)) or sharding.first_decides(inception_path().exists):
            check_pictures(run.experiment)
            inception = inception_features(run.mesh, preprocessing=arguments.preprocessing, batch_size=batch_size)
            return metrics or offered, of_pictures(inception, pixels)
        without = tuple(name for name in offered if name in WITHOUT_FEATURES)
        if not metrics and jax.process_index() == 0:
            print(f"Without Inception weights only {', '.join(without)} are computed; {HOW_TO_GET}.")
        return metrics or without, pixel_features(pixels)
    features = pixel_features(pixels)
    if arguments.features != PIXELS.name:
        shape = run.experiment.image_shape
        program = program_features(arguments.features, run.mesh, image_shape=shape, batch_size=batch_size)
        features = of_pictures(program, pixels)
    return metrics or tuple(name for name in offered if name != "is"), features


def main(arguments: Evaluate) -> None:
    """Computes the metrics and writes the report."""
    workdir = arguments.workdir
    for module in ("matplotlib", "sklearn"):
        import_extra(module, "evaluation", program())
    if arguments.distributed:
        sharding.start_processes()
        sharding.check_same(dataclasses.asdict(arguments))
    if is_parameters(workdir):
        made = f"ddpm-jax convert from-parameters {workdir} runs/NAME"
        raise UsageError(f"{workdir} is parameters and no folder, where the results would go; make it one: {made}")
    first = jax.process_index() == 0
    run = with_guide(load_run(workdir, **dataclasses.asdict(arguments.parameters)), arguments.sampler)
    metrics, features = choose(run, arguments)
    evaluation = Evaluation.of_run(run, workdir, features, arguments.options, arguments.sampler)
    with evaluation.alone():
        results = evaluate(
            evaluation, metrics, tell=lambda result: print(f"{result['metric']}: {describe(result)}", flush=True)
        )
        if arguments.figures:
            draw_figures(run, evaluation, epath.Path(workdir) / EVALUATION / FOLDER, results)
        elif any("sampling" in result["definition"] for result in results.values()):  # they are there already
            draw_samples(run, evaluation, epath.Path(workdir) / EVALUATION / FOLDER)
        if first:
            if run.note:
                print(f"Note: {run.note}.")
            print(f"The report: {write_report(workdir)}")
