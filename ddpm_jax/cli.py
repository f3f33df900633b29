"""How a command starts and ends: its module imported under guard, every end one sentence and an exit code.

Nothing heavy is imported here, so that an interrupt in the first second finds its handler.
"""

import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ddpm_jax.errors import RunError, UsageError

# What a command that was interrupted leaves, and how to go on.
COMMANDS = {
    "train": "checkpoints are as they were, and the same command continues from the newest",
    "sample": "finished images are kept, and the same command continues",
    "evaluate": "finished parts are kept, and the same command continues",
    "convert": "nothing is left half-written, and the same command starts again",
    "benchmark": "nothing is kept; the same command starts again",
    "prepare_data": "what was fetched is kept, and the same command continues",
}
GRACE_SECONDS = 5.0  # for what an interrupt leaves to clean up


class Stopped(BaseException):
    """A signal has asked the process to end."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def fail(message: str, code: int) -> NoReturn:
    """Ends the script with one sentence on standard error."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def run(command: str | Callable[[], None]) -> None:
    """Runs a command of `ddpm_jax.commands`, or a function, to its end: success, or one sentence and an exit code.

    UsageError: code 2; RunError, and a file or disk that cannot be read or written: 1; SIGINT: 130, SIGTERM: 143. Any other
    error is one of ours and keeps its stack.
    """
    left = COMMANDS[command] if isinstance(command, str) else "the same command starts again"
    received: list[int] = []
    main: Callable[[], None] | None = None

    def stop(signum: int, frame: Any) -> NoReturn:
        received.append(signum)
        if (
            main is None
        ):  # while modules are imported: nothing is begun, and extension modules would print the exception
            _end_at_once(signum, left)
        # Where the exception is lost in a library's callback, or the end waits for a thread, the process ends all the same.
        timer = threading.Timer(GRACE_SECONDS, _end_at_once, (received[0], left))
        timer.daemon = True
        timer.start()
        raise Stopped(signum)

    handlers = {}
    for signum in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # not the main thread, where no signal arrives
            handlers[signum] = signal.signal(signum, stop)
    try:
        _quiet()
        main = command if callable(command) else importlib.import_module(f"ddpm_jax.commands.{command}").main
        main()
    except BaseException as error:
        if received:  # whatever a library made of it
            _end_at_once(received[0], left)
        if isinstance(error, UsageError):
            fail(str(error), 2)
        if isinstance(error, RunError):
            fail(str(error), 1)
        if isinstance(error, OSError) and error.errno is not None:
            fail(_of_system(error), 1)
        raise
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _end_at_once(signum: int, left: str) -> None:
    # Without Python's own end: it waits for threads, which may be decoding pictures or saving, and prints their stacks.
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    name, script = signal.Signals(signum).name, Path(sys.argv[0]).name
    with contextlib.suppress(OSError):
        os.write(2, f"\n{script}: {name}: stopped; {left}.\n".encode())
    os._exit(128 + signum)


def _of_system(error: OSError) -> str:
    """What the operating system refused, and what to do."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; what was saved before is as it was: make room and run the same command again"
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror or error}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{what}; what was saved before is as it was: make the place writable or readable, or give another"
    return f"{what}; what was saved before is as it was: look at that path, and run the same command again"


def _quiet() -> None:
    """Sets what a command wants of its libraries, before JAX is imported: a cache of compiled programs, no stacks in logs."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "ddpm_jax" / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Orbax reports every save there, and of one that fails whole stacks, though it raises the error as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_closed_loops


def _ignore_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    # What a save that failed had still under way reports to an event loop that is gone, hundreds of times.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
