"""Measures samplers, the train step and the data feed: ddpm-jax benchmark CONFIG-or-WORKDIR --samplers ddim --steps 50"""

import os
from collections.abc import Callable, Iterable
from typing import Any

import jax
from tqdm import tqdm

from ddpm_jax.benchmark import against, programs, timing, topology
from ddpm_jax.benchmark.plan import compile_for, measure, refuse, write_json
from ddpm_jax.commands.arguments import Benchmark
from ddpm_jax.core import rng
from ddpm_jax.training.experiment import Experiment
from ddpm_jax.training.workdir import load_run


def main(arguments: Benchmark) -> None:
    """Measures and prints a table. With --against it fails if this version is the slower one."""
    if arguments.against:
        compare(arguments)
        return
    config = arguments.config
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
        rows, columns = measure(config, arguments.plan, load_params), programs.COLUMNS
    done = report(arguments, rows, columns, timing.environment)
    for line in filter(None, map(topology.tell_parts, done)):
        print(line)


def compare(arguments: Benchmark) -> None:
    """Measures this version and another in turn. JAX starts in their processes alone, which share the devices."""
    both = against.Against(against.checkout(arguments.against), arguments.words)
    rows = both.measure(arguments.config, arguments.plan)
    done = report(arguments, rows, against.COLUMNS, lambda: both.environment)
    for row in done:
        if "left_out" in row:
            print(f"{against.name_of(row)} is left out, as the other version cannot run it: {row['left_out']}.")
    against.judge(done)


def report(
    arguments: Benchmark,
    rows: Iterable[programs.Row],
    columns: dict[str, tuple[str, str]],
    environment: Callable[[], dict[str, Any]],
) -> list[programs.Row]:
    """Carries out the measurements, prints them as a table and writes them where --json says. Returns the rows."""
    done: list[programs.Row] = []

    def write():
        if arguments.json:
            write_json(arguments.json, arguments.config, done, environment())

    write()  # refuse an unwritable path before anything is measured
    try:
        for row in tqdm(rows, unit="row", leave=False):
            done.append(row)
            write()
    finally:  # print the rows before one that fails, e.g. for lack of memory
        if done:
            print(timing.table(done, columns))
            print("\n".join(f"{key}: {value}" for key, value in environment().items()))
    return done
