"""Starting and ending a command: signals are handled from the start, and errors end in one sentence and an exit code.

Nothing heavy is imported here, so that the signal handlers are installed at once.
"""

import atexit
import contextlib
import difflib
import errno
import functools
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ddpm_jax.core import peers
from ddpm_jax.core.errors import RunError, UsageError, first_line, say
from ddpm_jax.core.version import __version__


class Command(NamedTuple):
    """What a command does, for `ddpm-jax --help`, and what an interrupt leaves of it."""

    does: str
    left: str


# Each is a module of `ddpm_jax.commands`, and has a function in `commands.arguments.PARSERS`.
COMMANDS = {
    "train": Command(
        "train a diffusion model; the same command continues",
        "checkpoints are intact, and the same command continues from the newest",
    ),
    "sample": Command("sample images from a run", "finished images are kept, and the same command continues"),
    "evaluate": Command(
        "FID and other metrics of a run, and its report", "finished parts are kept, and the same command continues"
    ),
    "convert": Command(
        "weights in and out: diffusers, the authors' checkpoints, one file",
        "nothing is left half-written, and the same command starts again",
    ),
    "benchmark": Command(
        "speed of sampling, training and the data feed",
        "nothing is kept but what --json has; the same command starts again",
    ),
    "prepare_data": Command(
        "fetch a data set, or check pictures", "what was fetched is kept, and the same command continues"
    ),
    "configs": Command("list the configs that come with the package", "nothing was written"),
    "env": Command("versions, devices and settings, for a bug report", "nothing was written"),
}
GRACE_SECONDS = 5.0  # for cleaning up after an interrupt


class Stopped(BaseException):
    """Raised in the command by SIGINT and SIGTERM."""


class _Interrupts:
    """Ends the process on SIGINT and SIGTERM, with one sentence and exit code 130 or 143.

    During imports it ends at once. While the command runs, `Stopped` is raised in it, so that it cleans up. After GRACE_SECONDS,
    or at a second signal, a thread ends the process. It must be a thread: Python runs handlers only after the main thread
    returns from a long call, such as a compilation, and a library may swallow `Stopped`.
    """

    def __init__(self) -> None:
        self.command_runs = False
        self.received: int | None = None
        self._left = ""
        self._ending = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, daemon=True).start()
        # Registered before JAX's handler, so that it runs last: after it Python restores the system's signal handlers.
        atexit.register(_ignore_signals)

    def install(self, left: str) -> None:
        """Installs the handlers. left: what an interrupt leaves, for the sentence."""
        self._left, self.received = left, None
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)  # receives each signal's number at once
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: Any) -> None:
        if self.command_runs and self.received is None:
            self.received = signum
            # Libraries may report `Stopped` as an unraisable exception; hide these reports.
            sys.unraisablehook = lambda _: None
            threading.excepthook = lambda _: None
            raise Stopped

    def _watch(self) -> None:
        before = 0
        while True:
            (signum,) = os.read(self._reader, 1)
            if signum not in (signal.SIGINT, signal.SIGTERM):
                continue
            before += 1
            if before == 1 and signal.getsignal(signum) != self._receive:  # training handles it, to save first
                say(f"{signal.Signals(signum).name}: stopping after this step; a second one stops at once")
                continue
            if before == 1 and self.command_runs:
                select.select([self._reader], [], [], GRACE_SECONDS)  # or until a second signal
            self.end(signum)

    def end(self, signum: int) -> NoReturn:
        """Ends the process without Python's shutdown, which waits for threads (decoding, saving) and prints stacks."""
        self._ending.acquire()  # never released, so that only one thread prints the sentence
        say(f"{signal.Signals(signum).name}: stopped; {self._left}")
        os._exit(128 + signum)


_interrupts: _Interrupts | None = None


def _ignore_signals() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with one sentence on standard error."""
    peers.leave(code, message)
    raise SystemExit(code)


def prepare(name: str) -> Callable[[], None]:
    """Parses the command line, and imports the command only after that, since JAX takes seconds. Returns what runs it."""
    arguments = importlib.import_module("ddpm_jax.commands.arguments").PARSERS[name](sys.argv[1:])
    return functools.partial(importlib.import_module(f"ddpm_jax.commands.{name}").main, arguments)


def main() -> None:
    """The console command: `ddpm-jax train ...` is what `train.py ...` of the repository is, in any folder."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    command = name.replace("-", "_")
    if command in COMMANDS and "_" not in name:
        sys.argv[:2] = [f"ddpm-jax {name}"]
        return run(command)
    sys.argv[0] = "ddpm-jax"
    run(functools.partial(_answer, name))


def _answer(name: str) -> None:
    """Answers a command line that names no command."""
    shown = {command.replace("_", "-"): what.does for command, what in COMMANDS.items()}
    if name == "--version":
        print(f"ddpm-jax {__version__}")
    elif name in ("", "-h", "--help"):
        print("usage: ddpm-jax COMMAND ...; ddpm-jax COMMAND --help shows its options\n")
        print("\n".join(f"  {command:12}  {does}" for command, does in shown.items()))
        raise SystemExit(0 if name else 2)
    else:
        near = difflib.get_close_matches(name, shown, n=1)
        hint = f"perhaps you meant {near[0]}" if near else f"give one of {', '.join(shown)}"
        raise UsageError(f"{name} is not a command; {hint}")


def run(command: str | Callable[[], None], *, left: str = "the same command starts again") -> None:
    """Runs a command of `ddpm_jax.commands`, or a function. A failure ends in one sentence and an exit code.

    left: what an interrupt leaves of a function, for the sentence.

    The code is 2 for UsageError, 1 for RunError and OSError, 130 for SIGINT and 143 for SIGTERM. Any other error is a bug and
    keeps its traceback. The signal handlers stay installed until the process ends.
    """
    global _interrupts
    _interrupts = interrupts = _interrupts or _Interrupts()
    interrupts.install(COMMANDS[command].left if isinstance(command, str) else left)
    try:
        try:
            _quiet()
            ready = command if callable(command) else prepare(command)
            interrupts.command_runs = True
            ready()
            sys.stdout.flush()
        finally:
            interrupts.command_runs = False
    except BaseException as error:
        if interrupts.received is not None:  # a library may have turned `Stopped` into another error
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            interrupts.end(interrupts.received)
        _tell(error)
        raise


def _tell(error: BaseException) -> None:
    """Ends the command with the sentence and code of an expected error; returns for any other."""
    if sentence := peers.lost(error):
        fail(sentence, 1)
    if isinstance(error, UsageError):
        fail(str(error), 2)
    if isinstance(error, RunError):
        fail(str(error), 1)
    if isinstance(error, BrokenPipeError) and error.filename is None:
        # The reader of the output has ended, like `head`: end silently, as programs in a pipe do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE)
    if isinstance(error, OSError) and error.errno is not None:
        fail(_of_system(error), 1)
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("ddpm_jax"):
        package = error.name.partition(".")[0]
        fail(f"the Python package {package} is needed and is not installed; install what ddpm-jax depends on", 1)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        what = f"memory is full ({first_line(error)}); earlier saves are intact"
        fail(f"{what}: use a smaller batch, a smaller network or more devices, and run the same command again", 1)
    if isinstance(error, Exception):
        peers.leave(1)


def _of_system(error: OSError) -> str:
    """The sentence for an OSError: what failed, and what to do."""
    if error.errno == errno.ENOSPC:
        return "the disk is full; earlier saves are intact: make room and run the same command again"
    where = f"{error.filename}: " if error.filename else ""
    what = f"{where}{error.strerror or error}"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{what}; earlier saves are intact: make the place writable or readable, or give another path"
    return f"{what}; earlier saves are intact: check that path, and run the same command again"


def _quiet() -> None:
    """Configures libraries before JAX is imported: a compilation cache, and no tracebacks in logs."""
    import logging

    cache = os.path.join(os.path.expanduser("~"), ".cache", "ddpm_jax", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # File names may hold characters that the terminal cannot print.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Orbax logs every save, and the traceback of a failed one although it raises the error as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_closed_loops


def _ignore_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    # Pending operations of a failed save report to a closed event loop, hundreds of times.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
