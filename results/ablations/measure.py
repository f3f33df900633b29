"""One run: trained, evaluated, and reduced to a row of figures, which is kept in a file."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from plan import RUNS, VARIANTS, commands, config_of, measurements, row_file, workdir_of

from ddpm_jax.benchmark.timing import environment
from ddpm_jax.commands.train import train
from ddpm_jax.config import Config, differences
from ddpm_jax.core.files import DamagedFileError, read_json, write_text
from ddpm_jax.evaluation.evaluation import Evaluation
from ddpm_jax.evaluation.features import PIXELS
from ddpm_jax.evaluation.metrics import evaluate
from ddpm_jax.generation.starts import build_sampler
from ddpm_jax.interop.result import seconds_of
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.metric_writer import read_metrics
from ddpm_jax.training.workdir import Run, load_run

Row = dict[str, Any]


def figures(results: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers of evaluations by name, and their standard errors over images."""
    found: dict[str, Mapping[str, Any]] = {}
    if "nll" in results:
        nll, quarters = results["nll"], results["losses"]["quarters"]
        found |= {"bits_per_dim": nll, "rate": nll["parts"]["rate"], "L_0": nll["parts"]["L_0"]}
        found |= {f"loss_{name}": quarter for name, quarter in quarters.items()}
    found["frechet_distance"] = results["fid"]
    found |= {name: results["prdc"][name] for name in ("precision", "recall")}
    return (
        {name: estimate["value"] for name, estimate in found.items()},
        {name: estimate["standard_error"] for name, estimate in found.items()},
    )


@functools.lru_cache(maxsize=1)  # every sampler takes the same one
def trained(config: Config, workdir: epath.Path) -> Run:
    """The run of a config, which is trained as far as it is not."""
    train(Experiment.from_config(config), workdir)
    return load_run(workdir)


@functools.cache
def here() -> dict[str, Any]:
    """The machine, versions and commit, which this process began with."""
    return environment()


def carry_out(base: Config, key: str, seed: int) -> Row:
    """Trains and evaluates one run, from where it was stopped, and writes its row."""
    began, config, workdir = time.process_time(), config_of(base, key, seed), workdir_of(key, seed)
    variant = VARIANTS[key]
    of = variant.parameters_of or key
    parameters, results = workdir_of(of, seed), dict[str, Any]()
    run = trained(config_of(base, of, seed), parameters)
    run = dataclasses.replace(run, experiment=Experiment.from_config(config))
    workdir.mkdir(parents=True, exist_ok=True)  # that of parameters which another run has
    start = time.perf_counter()
    for metrics, amount in measurements(key, config.diffusion.T):
        evaluation = Evaluation.of_run(run, workdir, PIXELS, amount, variant.sampler)
        with evaluation.alone():
            results |= evaluate(evaluation, metrics)
    values, errors = figures(results)
    row = {
        "variant": key,
        "seed": seed,
        "differs": {name: now for name, (_, now) in differences(config_of(base, "baseline", seed), config).items()},
        "commands": commands(base, key, seed),
        "parameters_of": of,
        "seconds": {
            "training": round(seconds_of(read_metrics(parameters)), 1),
            "evaluation": round(time.perf_counter() - start, 1),
            "processor": round(time.process_time() - began, 1),  # of the process that finished it
        },
        "evaluations": len(build_sampler(run.experiment.process, variant.sampler)),
        "figures": values,
        "standard_errors": errors,
        "environment": here(),
    }
    write_text(row_file(key, seed), json.dumps(row, indent=1) + "\n")
    return row


def read_row(base: Config, key: str, seed: int) -> Row | None:
    """The row of a finished run; None if it is not finished, or was made by other commands."""
    with contextlib.suppress(FileNotFoundError, DamagedFileError):
        row = read_json(row_file(key, seed))
        if row.get("commands") == commands(base, key, seed):
            return row
    return None


def finished(base: Config) -> dict[str, list[Row]]:
    """The rows of all finished runs by variant, in the order of their seeds."""
    seeds = {
        int(path.stem.removeprefix("seed_")) for path in Path(RUNS).glob("*/seed_*.json") if path.stem[5:].isdigit()
    }
    rows = {key: [read_row(base, key, seed) for seed in sorted(seeds)] for key in VARIANTS}
    return {key: there for key, found in rows.items() if (there := [row for row in found if row is not None])}
