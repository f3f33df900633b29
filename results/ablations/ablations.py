"""Ablations at the size of the digits: every variant of a small config is trained and evaluated with several seeds.

python results/ablations/ablations.py                  all of them; the same command continues
python results/ablations/ablations.py --only loss T    some groups
python results/ablations/ablations.py --seeds 1        one seed each

runs/ablations/VARIANT/seed_0/        the run's workdir, with its evaluation
runs/ablations/VARIANT/seed_0.log     what training and evaluation said
runs/ablations/VARIANT/seed_0.json    its row; written last, and a run that has it is not repeated
OUT/                                  ablations.json, the tables in README.md, and a picture of each group
"""

import contextlib
import io
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from etils import epath
from plan import GROUPS, plan, row_file

from ddpm_jax.commands.cli import run as run_command
from ddpm_jax.commands.config_file import load_config
from ddpm_jax.config import Config
from ddpm_jax.core.errors import RunError, UsageError, program
from ddpm_jax.core.files import check_place
from ddpm_jax.core.options import Bounds, check_bounds

Name = Literal["prediction", "loss", "variance", "schedule", "T", "samplers", "lr", "batch", "ema", "network"]


@dataclass(frozen=True)
class Options:
    """Train and evaluate ablations on a small config. The same command continues."""

    only: tuple[Name, ...] = ()
    """Groups that are run; default: all. The tables have every run that is finished."""
    seeds: Annotated[int, Bounds(1, 1000)] = 3
    """Seeds of each variant, from 0 on."""
    config: str = "digits"
    """Name or file of the baseline. What the tables call it (T = 100, 64 images, ch = 32) is true of the digits."""
    out: str = str(Path(__file__).parent)
    """Folder of the tables and pictures."""


class Log(io.TextIOWrapper):
    """A run's log, in the place of the standard streams. What an interrupt says still goes to the terminal."""

    def fileno(self) -> int:
        """Where `core.errors.say` writes, which bypasses Python's streams."""
        return sys.__stderr__.fileno() if sys.__stderr__ else super().fileno()


def parse(arguments: list[str]) -> Options:
    """The options of a command line. Raises UsageError for those that cannot be used."""
    options = tyro.cli(Options, prog=program(), args=arguments)
    check_bounds(options)
    if "--only" in arguments and not options.only:
        raise UsageError(f"--only is empty; give some of {', '.join(GROUPS)}, or leave it out for all")
    check_place(Path(options.out) / "x", "choose another folder by --out")
    return options


def main() -> None:
    """Carries out the runs that are not finished, a line for each, and writes the tables of all that are."""
    options = parse(sys.argv[1:])
    base, out = load_config(options.config), epath.Path(options.out)
    from measure import read_row  # these import JAX, after the command line is read
    from tables import write_report

    runs = plan(options.only, options.seeds)
    missing = [run for run in runs if read_row(base, *run) is None]
    print(f"{len(runs)} runs, of which {len(runs) - len(missing)} are finished.", flush=True)
    failed = [run for i, run in enumerate(missing, 1) if not carried_out(base, *run, begun=f"{i}/{len(missing)}")]
    write_report(out, base)
    print(f"The tables are in {out}.")
    if failed:
        raise RunError(f"{len(failed)} of the runs failed; the same command tries them again")


def carried_out(base: Config, key: str, seed: int, *, begun: str) -> bool:
    """Carries out one run and says so in a line. False if it failed, of which the other runs are independent."""
    from measure import carry_out
    from tables import say_row

    from ddpm_jax.training.loop import Interrupted

    begun, log = f"{begun} {key}, seed {seed}", row_file(key, seed).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with (
            Log(log.open("ab"), write_through=True) as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            row = carry_out(base, key, seed)
    except Interrupted as stop:
        by = signal.Signals(stop.signum).name
        print(f"{program()}: {by}: {stop}; the same command continues from there.", file=sys.stderr)
        raise SystemExit(128 + stop.signum) from None
    except (UsageError, RunError) as error:
        print(f"{begun} failed: {error}", flush=True)
        return False
    print(f"{begun}: {say_row(row)}", flush=True)
    return True


if __name__ == "__main__":
    run_command(main, left="finished runs are kept, and the same command continues")
