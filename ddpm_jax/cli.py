"""What the scripts share: finding a config, parsing options, and saying a failure in one sentence."""

import difflib
import errno
import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jax

from ddpm_jax.config import Config, check_types
from ddpm_jax.errors import RunError, UsageError


def fail(message: str, code: int) -> NoReturn:
    """Ends the script with one sentence on standard error."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def run(main: Callable[[], None]) -> None:
    """Runs a script's main function; a UsageError ends it with exit code 2, a RunError with 1, each as one sentence.

    A full disk is told so too, wherever it is met.
    """
    # Orbax reports every save there, and of one that fails whole stacks, though it raises the error as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_closed_loops
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "ddpm_jax" / "compiled"))
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        main()
    except UsageError as error:
        fail(str(error), 2)
    except RunError as error:
        fail(str(error), 1)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        fail("the disk is full; what was saved before is as it was: make room and run the same command again", 1)


def _ignore_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    # What a save that failed had still under way reports to an event loop that is gone, hundreds of times.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def load_config(name: str) -> Config:
    """The `config` of a config file, configs/NAME.py. Raises UsageError if there is none, with the nearest that is."""
    path = Path(name)
    if not path.is_file():
        there = sorted(str(p) for p in Path("configs").glob("*.py"))
        near = difflib.get_close_matches(name, there, n=1, cutoff=0.5)
        hint = f"perhaps you meant {near[0]}" if near else f"there are {', '.join(there) or 'none in configs/'}"
        raise UsageError(f"the config {name} does not exist; {hint}")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"the config {name} is not a Python file; give configs/NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"the config {name} cannot be executed ({type(error).__name__}: {error})") from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UsageError(f"the config {name} does not define `config = Config(...)`")
    check_types(config)
    return config
