"""Measures samplers, the train step and the data feed: ddpm-jax benchmark CONFIG-or-WORKDIR --samplers ddim --steps 50"""

import os

import jax
from tqdm import tqdm

from ddpm_jax.benchmark import programs, timing, topology
from ddpm_jax.benchmark.plan import compile_for, measure, refuse, write_json
from ddpm_jax.commands.arguments import Benchmark
from ddpm_jax.core import rng
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.workdir import load_run


def main(arguments: Benchmark) -> None:
    """Measures and prints a table."""
    config, columns = arguments.config, programs.COLUMNS
    # Before JAX starts: no compilation cache, so compile times are real; no preallocation, so a peer on the GPU has memory.
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if arguments.compile_for:
        jax.config.update("jax_platforms", "cpu")  # do not occupy a TPU or GPU
    refuse(config, arguments.plan, compiling=bool(arguments.compile_for))

    def load_params():
        if arguments.workdir:
            return load_run(arguments.workdir).params
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
