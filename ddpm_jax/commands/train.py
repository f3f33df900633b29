"""Trains a diffusion model: python train.py configs/digits.py --workdir runs/digits [--any.field value]

The same command again continues where the run stopped.
"""

import signal
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from ddpm_jax import sharding
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import Config
from ddpm_jax.errors import UsageError
from ddpm_jax.loop import Interrupted, train

USAGE = "usage: train.py CONFIG --workdir WORKDIR [--any.field value]; train.py CONFIG --help lists the fields"


@dataclass(frozen=True)
class Arguments:
    """Train a diffusion model; the same command again continues where the run stopped."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    workdir: str = ""
    """Folder that the run is written to."""
    distributed: bool = False
    """Join the other processes of a multi-host run (see docs/parallelism.md)."""
    unverified: bool = False
    """Continue from the newest checkpoint even if its manifest is missing or does not match."""
    changed_data: bool = False
    """Continue although the data set has changed since the checkpoint, as where a bad picture was mended or left out."""


def main() -> None:
    """Parses the command line and trains."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(f"{__doc__}\n{USAGE}")
        raise SystemExit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    name = sys.argv[1]
    arguments = tyro.cli(
        Arguments,
        prog=f"train.py {name}",
        args=sys.argv[2:],
        default=Arguments(load_config(name)),
    )
    if not arguments.workdir:
        raise UsageError("no workdir was given; add --workdir runs/NAME")
    if arguments.distributed:
        sharding.start_processes()
    try:
        train(arguments.config, arguments.workdir, unverified=arguments.unverified, changed_data=arguments.changed_data)
    except Interrupted as stop:
        by = signal.Signals(stop.signum).name
        print(f"\n{by}: {stop}; the same command continues from there.", file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None
