"""The console command: ddpm-jax train digits --workdir runs/digits is train.py of the repository, in any folder."""

import difflib
import sys

from ddpm_jax import __version__
from ddpm_jax.cli import run
from ddpm_jax.core.errors import UsageError

COMMANDS = {
    "train": "train a diffusion model; the same command continues",
    "sample": "sample images from a run",
    "evaluate": "FID and other metrics of a run, and its report",
    "convert": "weights in and out: diffusers, the authors' checkpoints, one file",
    "benchmark": "speed of sampling, training and the data feed",
    "prepare-data": "fetch a data set, or check pictures",
    "configs": "list the configs that come with the package",
    "env": "versions, devices and settings, for a bug report",
}


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in COMMANDS:
        sys.argv[:2] = [f"ddpm-jax {name}"]
        return run(name.replace("-", "_"))
    sys.argv[0] = "ddpm-jax"
    run(lambda: _answer(name))


def _answer(name: str) -> None:
    """Answers a command line that names no command."""
    if name == "--version":
        print(f"ddpm-jax {__version__}")
    elif name in ("", "-h", "--help"):
        print("usage: ddpm-jax COMMAND ...; ddpm-jax COMMAND --help shows its options\n")
        print("\n".join(f"  {command:12}  {text}" for command, text in COMMANDS.items()))
        raise SystemExit(0 if name else 2)
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"perhaps you meant {near[0]}" if near else f"give one of {', '.join(COMMANDS)}"
        raise UsageError(f"{name} is not a command; {hint}")


if __name__ == "__main__":
    main()
