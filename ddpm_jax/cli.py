"""How a command starts and ends: its module imported under guard, every end one sentence and an exit code.

Nothing heavy is imported here, so that an interrupt in the first second finds its handler.
"""

import atexit
import contextlib
import errno
import importlib
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from ddpm_jax import peers
from ddpm_jax.errors import RunError, UsageError, first_line, say

# What a command that was interrupted leaves, and how to go on.
COMMANDS = {
    "train": "checkpoints are as they were, and the same command continues from the newest",
    "sample": "finished images are kept, and the same command continues",
    "evaluate": "finished parts are kept, and the same command continues",
    "convert": "nothing is left half-written, and the same command starts again",
    "benchmark": "nothing is kept but what --json has; the same command starts again",
    "prepare_data": "what was fetched is kept, and the same command continues",
}
GRACE_SECONDS = 5.0  # for what an interrupt leaves to clean up


class Stopped(BaseException):
    """A signal has asked the process to end."""


class _Interrupts:
    """Ends the process on SIGINT and SIGTERM, with one sentence and exit code 130 or 143.

    While modules are imported, at once: nothing is begun. While the command runs, `Stopped` is raised in it, so that it cleans
    up; after GRACE_SECONDS, and at a second signal, the process ends wherever it is. A thread sees to the latter: Python's
    handlers wait until the main thread comes back from a long call, such as a compilation, or a library swallows `Stopped`.
    """

    def __init__(self) -> None:
        self.command_runs = False
        self.received: int | None = None
        self._left = ""
        self._ending = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        threading.Thread(target=self._watch, daemon=True).start()
        # Registered before JAX's, so that it is called last: what follows would hand the signals back to the system.
        atexit.register(_ignore_signals)

    def install(self, left: str) -> None:
        """Takes the two signals from now on. left: what an interrupt leaves, for the sentence."""
        self._left, self.received = left, None
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)  # each signal's number, as soon as it comes
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: Any) -> None:
        if self.command_runs and self.received is None:
            self.received = signum
            # What libraries make of an exception that comes from nowhere is no news.
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
            if before == 1 and signal.getsignal(signum) != self._receive:  # training takes it, to save first
                say(f"{signal.Signals(signum).name}: stopping after this step; a second one stops at once")
                continue
            if before == 1 and self.command_runs:
                select.select([self._reader], [], [], GRACE_SECONDS)  # or until a second signal
            self.end(signum)

    def end(self, signum: int) -> NoReturn:
        """Ends without Python's own end, which waits for threads, perhaps decoding pictures or saving, and prints stacks."""
        self._ending.acquire()  # never released: one sentence
        say(f"{signal.Signals(signum).name}: stopped; {self._left}")
        os._exit(128 + signum)


_interrupts: _Interrupts | None = None


def _ignore_signals() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


def fail(message: str, code: int) -> NoReturn:
    """Ends the script with one sentence on standard error."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    peers.leave(code)
    raise SystemExit(code)


def run(command: str | Callable[[], None]) -> None:
    """Runs a command of `ddpm_jax.commands`, or a function, to its end: success, or one sentence and an exit code.

    UsageError: code 2; RunError, and a file or disk that cannot be read or written: 1; SIGINT: 130, SIGTERM: 143. Any other
    error is one of ours and keeps its stack. The signals stay taken: the interpreter's end is guarded too.
    """
    global _interrupts
    _interrupts = interrupts = _interrupts or _Interrupts()
    interrupts.install(COMMANDS[command] if isinstance(command, str) else "the same command starts again")
    try:
        try:
            _quiet()
            main = command if callable(command) else importlib.import_module(f"ddpm_jax.commands.{command}").main
            interrupts.command_runs = True
            main()
            sys.stdout.flush()
        finally:
            interrupts.command_runs = False
    except BaseException as error:
        if interrupts.received is not None:  # whatever a library made of it
            with contextlib.suppress(Exception):
                sys.stdout.flush()
            interrupts.end(interrupts.received)
        _tell(error)
        raise


def _tell(error: BaseException) -> None:
    """Ends the script as the error asks; returns for an error that nobody foresaw."""
    if sentence := peers.lost(error):
        fail(sentence, 1)
    if isinstance(error, UsageError):
        fail(str(error), 2)
    if isinstance(error, RunError):
        fail(str(error), 1)
    if isinstance(error, BrokenPipeError) and error.filename is None:
        # Whoever read the output has gone, as `head` does: an end like that of any program in a pipe, without a word.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE)
    if isinstance(error, OSError) and error.errno is not None:
        fail(_of_system(error), 1)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        what = f"memory is full ({first_line(error)}); what was saved before is as it was"
        fail(f"{what}: use a smaller batch, a smaller network or more devices, and run the same command again", 1)
    if isinstance(error, Exception):
        peers.leave(1)


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
    import logging

    cache = os.path.join(os.path.expanduser("~"), ".cache", "ddpm_jax", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    # Names of files may have letters that the terminal has not.
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # Orbax reports every save there, and of one that fails whole stacks, though it raises the error as well.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    sys.unraisablehook = _ignore_closed_loops


def _ignore_closed_loops(unraisable: "sys.UnraisableHookArgs") -> None:
    # What a save that failed had still under way reports to an event loop that is gone, hundreds of times.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
