"""Prepares or checks a data set: ddpm-jax prepare-data tfds:cifar10; ddpm-jax prepare-data SOURCE --check

SOURCE is what data.source takes: a folder or a zip file of pictures, or tfds:NAME[:split].
"""

import sys
from dataclasses import dataclass

import tyro

from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import UsageError, program
from ddpm_jax.data import cache, sources, tfds


@dataclass(frozen=True)
class Arguments:
    """Download a data set of tensorflow-datasets and write it as array_record, or check the pictures of any source."""

    check: bool = False
    """Decode every picture, and list those that cannot be, for --data.on-bad-image skip."""
    workers: int = 0
    """Threads that decode pictures; 0: one for each CPU core."""


def main() -> None:
    """Parses the command line, and prepares or checks the source."""
    if {"-h", "--help"} & set(sys.argv):
        tyro.cli(Arguments, prog=f"{program()} SOURCE", args=["--help"])
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UsageError(f"no source was given; run {program()} SOURCE, and {program()} --help for the options")
    source = sys.argv[1]
    arguments = tyro.cli(Arguments, prog=f"{program()} {source}", args=sys.argv[2:])
    if arguments.workers < 0:
        raise UsageError(f"--workers {arguments.workers} is too small; use 0 or more")
    if arguments.check:
        check(source, arguments.workers)
    elif source.startswith(tfds.PREFIX):
        print(f"{source} is prepared: {tfds.prepare(source)}")
    else:
        sources.find_kind(source)
        raise UsageError(f"{source} needs no preparation; add --check to look for pictures that cannot be decoded")


def check(source: str, workers: int) -> None:
    """Prints the pictures that cannot be decoded and writes their list; exit code 1 if there are any."""
    pictures = sources.open_pictures(source)
    bad = cache.find_bad(sources.decoded(pictures, DataConfig(source=source, workers=workers)))
    for name, reason in bad.items():
        print(f"{name}: {reason}")
    print(
        f"{len(bad)} of {len(pictures.names)} pictures cannot be decoded; their list: {cache.write_bad(pictures, bad)}"
    )
    raise SystemExit(1 if bad else 0)
