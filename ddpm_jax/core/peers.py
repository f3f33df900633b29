"""The other processes of a run: waiting for them, and ending with one sentence when one of them ends.

When a process ends, JAX's coordination service aborts the others from C++, after pages of logs. There is no exception to catch
and no callback. So the output of C++ goes through a pipe, which a thread reads. The thread passes on messages for people, drops
the service's logs, and ends the process when the service is about to abort it.
"""

import contextlib
import io
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from ddpm_jax.core.errors import program, say

END_SECONDS = 5.0  # how long a failed process waits for the others
FATAL = b"Terminating process because the JAX distributed service"
# The start of a record of a C++ log; lines without it belong to the record before.
RECORD = re.compile(rb"[IWEF]\d{4} ")
SERVICE = re.compile(rb"[IWEF]\d{4} .* (coordination_service\w*|client)\.(cc|h):\d+\]")
GLOO = re.compile(rb"\[Gloo\] Rank ")
# An error of a computation or a wait, caused by the end of another process.
LOST = re.compile(
    r"(Gloo|NCCL).*(closed|reset|refused|tim\w+ ?out|broken pipe|remote process)|coordination service|heartbeat timeout",
    re.IGNORECASE,
)

_listening = False
others: list[int] = []  # indices of the other processes, once they have joined
_leaving: int | None = None  # the exit code, once this process is ending by itself
_speaking = threading.Lock()  # held by the one thread that says why this process ends


def listen() -> None:
    """Redirects the output of C++ through a pipe; Python's output is not affected."""
    global _listening
    _listening = True
    for fd, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        stream.flush()
        outside = os.dup(fd)
        ours = io.TextIOWrapper(
            os.fdopen(outside, "wb"), encoding=stream.encoding, errors=stream.errors, line_buffering=True
        )
        setattr(sys, name, ours)
        reader, writer = os.pipe()
        os.dup2(writer, fd)
        os.close(writer)
        threading.Thread(target=_pass_on, args=(reader, outside), daemon=True).start()
    import ctypes

    # Make libc's `sleep` the handler of SIGABRT: its argument is the signal's number, 6, so a thread that aborts sleeps for
    # 6 seconds. Meanwhile `_pass_on` reads the reason, since C++ aborts without the GIL. A Python handler would run too late.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _pass_on(reader: int, outside: int) -> None:
    """Copies lines to the original output, without the logs of the coordination service and Gloo."""
    rest, hidden, log = b"", False, b""
    while data := os.read(reader, 2**16):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if GLOO.match(line):
                continue
            if RECORD.match(line):
                hidden = SERVICE.match(line) is not None
            if hidden or FATAL in line:
                log = (log + line + b"\n")[-(2**16) :]
                continue
            with contextlib.suppress(OSError):
                os.write(outside, line + b"\n")
            if line.startswith(b"F") and RECORD.match(line):  # an abort for another reason; let its stack trace through
                _end_in(0.5, 128 + signal.SIGABRT)
        if FATAL in log:
            _end(gone(_who(log.decode(errors="replace"))))


def _end_in(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _who(log: str) -> str:
    """The process that has ended, according to the coordination service's log."""
    named = re.search(r"stopped sending heartbeats\):\s*([\d,\s]+)", log) or re.search(r"Task (\d+) heartbeat", log)
    if named:
        indices = re.findall(r"\d+", named[1])
        return f"process {indices[0]}" if len(indices) == 1 else f"processes {', '.join(indices)}"
    return "process 0" if "Failed to send RPC to coordination service" in log else _another()


def _another() -> str:
    return f"process {others[0]}" if len(others) == 1 else "another process"


def gone(who: str) -> str:
    """The sentence for a process that has ended."""
    return (
        f"{who} of this run has stopped or cannot be reached; earlier saves are intact: see its messages, "
        "and start all processes again"
    )


def lost(error: BaseException | None) -> str | None:
    """The sentence for an error caused by the end of another process; None for any other error."""
    while _listening and error is not None:
        if LOST.search(str(error)):
            return gone(_another())
        error = error.__cause__ or error.__context__
    return None


def leave(code: int, sentence: str = "") -> None:
    """Says why a process has failed, unless its traceback will, and ends it after END_SECONDS at the latest.

    Otherwise JAX would wait for the others, which may wait for this one.
    """
    global _leaving
    with _speaking:
        if sentence:
            with contextlib.suppress(OSError):  # standard error is closed
                print(f"{program()}: {sentence}", file=sys.stderr)
        if _listening:
            _leaving = code
            _end_in(END_SECONDS, code)


def _end(sentence: str) -> NoReturn:
    _speaking.acquire()  # never released: `leave` may be saying the same
    if _leaving is None:
        say(sentence)
    os._exit(1 if _leaving is None else _leaving)


@contextlib.contextmanager
def patience(whom: str, *, seconds: float, first: float = 5.0, every: float = 30.0) -> Iterator[None]:
    """Reports regularly that the block waits for other processes; after `seconds` it ends the process with code 1."""
    came, start = threading.Event(), time.monotonic()

    def tell() -> None:
        pause = first
        while not came.wait(min(pause, max(0.0, start + seconds - time.monotonic()))):
            pause, waited = every, time.monotonic() - start
            if waited >= seconds:
                _end(
                    f"{whom} did not come within {seconds:.0f} s; start all processes within that time, and check that "
                    "they have the same address and can reach it"
                )
            say(f"waiting for {whom}, {waited:.0f} s of at most {seconds:.0f}", before="")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        came.set()
