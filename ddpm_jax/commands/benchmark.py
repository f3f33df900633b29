"""Measures samplers, the train step and the data feed: ddpm-jax benchmark CONFIG-or-WORKDIR --samplers ddim --steps 50"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jax
import tyro
from etils import epath
from tqdm import tqdm

from ddpm_jax.benchmark import programs, timing, topology
from ddpm_jax.benchmark.plan import Plan, compile_for, measure, refuse, write_json
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import Config
from ddpm_jax.core import rng
from ddpm_jax.core.errors import UsageError, program
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.workdir import load_run, read_config


@dataclass(frozen=True)
class Arguments:
    """Measure samplers, the train step and the data feed of a config, or of a run with its parameters."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default_factory=Plan)
    compile_for: str = ""
    """A TPU topology such as v5e:16x16: compile the programs for it, and run nothing (extra `tpu`)."""
    json: str = ""
    """JSON file to write the results to as well."""


def main() -> None:
    """Parses the command line, measures and prints a table."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(f"{__doc__}\n{program()} CONFIG --help lists the options")
        raise SystemExit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    name = sys.argv[1]
    is_run = "://" in name or Path(name).is_dir()
    given = read_config(epath.Path(name)) if is_run else load_config(name)
    arguments = tyro.cli(Arguments, prog=f"{program()} {name}", args=sys.argv[2:], default=Arguments(given))
    config, columns = arguments.config, programs.COLUMNS
    # Before JAX starts: no compilation cache, so compile times are real; no preallocation, so a peer on the GPU has memory.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.compile_for:
        jax.config.update("jax_platforms", "cpu")  # do not occupy a TPU or GPU
    if is_run and (config.model, config.data, config.diffusion) != (given.model, given.data, given.diffusion):
        fixed = "--model, --data and --diffusion options"
        raise UsageError(f"{name} is a run, whose network, images and process are fixed; leave out {fixed}")
    refuse(config, arguments.plan, compiling=bool(arguments.compile_for))

    def load_params():
        if is_run:
            return load_run(name).params
        return jax.jit(lambda: Experiment.from_config(config).init(rng.root_key(config.seed)))()

    if arguments.compile_for:
        rows, columns = compile_for(config, arguments.plan, arguments.compile_for), topology.COLUMNS
    else:
        rows = measure(config, arguments.plan, load_params)
    done: list[programs.Row] = []
    if arguments.json:
        write_json(arguments.json, config, done)  # refuse an unwritable path before anything is measured
    try:
        for row in tqdm(rows, unit="row", leave=False):
            done.append(row)
            if arguments.json:
                write_json(arguments.json, config, done)
    finally:  # print the rows before one that fails, e.g. for lack of memory
        if done:
            print(timing.table(done, columns))
            print("\n".join(f"{key}: {value}" for key, value in timing.environment().items()))
