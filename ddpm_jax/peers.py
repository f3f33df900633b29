"""The other processes of a run: waiting until they have come, and ending with one sentence when one of them has gone.

When a process goes, JAX's coordination service ends the others from C++: it writes pages, then aborts. No exception can be
caught and no callback given. So what C++ writes comes through a pipe here, and a thread reads it: it passes on what is for
people, leaves out what the service says to itself, and ends the process when the service is about to.
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

from ddpm_jax.errors import say

END_SECONDS = 5.0  # how long a process that has failed waits for the others to end as well
FATAL = b"Terminating process because the JAX distributed service"
# A record of C++'s log begins so; lines without it belong to the record before.
RECORD = re.compile(rb"[IWEF]\d{4} ")
SERVICE = re.compile(rb"[IWEF]\d{4} .* (coordination_service\w*|client)\.(cc|h):\d+\]")
GLOO = re.compile(rb"\[Gloo\] Rank ")
# An error of a computation, or of waiting for the others, that comes of another process having gone.
LOST = re.compile(
    r"(Gloo|NCCL).*(closed|reset|refused|tim\w+ ?out|broken pipe|remote process)|coordination service|heartbeat timeout",
    re.IGNORECASE,
)

_listening = False
others: list[int] = []  # of the processes of this run, once they have joined
_leaving: int | None = None  # the exit code of a process that is ending by itself


def listen() -> None:
    """Lets what C++ writes to standard output and error come through here; Python writes there as before."""
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

    # A thread that aborts sleeps first (for SIGABRT = 6 seconds: a handler's argument is the signal's number), so that
    # `_pass_on` comes to read why: C++ aborts where it does not hold the GIL. Python's own handlers would run too late.
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _pass_on(reader: int, outside: int) -> None:
    """Copies lines to where they are read by people, but for what the coordination service and Gloo say to themselves."""
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
            if line.startswith(b"F") and RECORD.match(line):  # an abort for another reason: its stack follows
                _end_in(0.5, 128 + signal.SIGABRT)
        if FATAL in log:
            _end(gone(_who(log.decode(errors="replace"))))


def _end_in(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _who(log: str) -> str:
    """Which process has gone, by what the coordination service has said."""
    named = re.search(r"stopped sending heartbeats\):\s*([\d,\s]+)", log) or re.search(r"Task (\d+) heartbeat", log)
    if named:
        indices = re.findall(r"\d+", named[1])
        return f"process {indices[0]}" if len(indices) == 1 else f"processes {', '.join(indices)}"
    return "process 0" if "Failed to send RPC to coordination service" in log else _another()


def _another() -> str:
    return f"process {others[0]}" if len(others) == 1 else "another process"


def gone(who: str) -> str:
    """The sentence for a process that has gone."""
    return (
        f"{who} of this run has stopped or cannot be reached; what was saved before is as it was: see its own messages, "
        "and start all processes again"
    )


def lost(error: BaseException | None) -> str | None:
    """The sentence for an error that comes of another process having gone; None for any other error."""
    while _listening and error is not None:
        if LOST.search(str(error)):
            return gone(_another())
        error = error.__cause__ or error.__context__
    return None


def leave(code: int) -> None:
    """Sees to it that a failed process ends soon: JAX would wait for the others, which may be waiting for this one."""
    global _leaving
    if _listening:
        _leaving = code
        _end_in(END_SECONDS, code)


def _end(sentence: str) -> NoReturn:
    if _leaving is None:
        say(sentence)
    os._exit(1 if _leaving is None else _leaving)


@contextlib.contextmanager
def patience(whom: str, *, seconds: float, first: float = 5.0, every: float = 30.0) -> Iterator[None]:
    """While the block waits for other processes, says so now and then; after `seconds` it ends the process, exit code 1."""
    came, start = threading.Event(), time.monotonic()

    def tell() -> None:
        pause = first
        while not came.wait(min(pause, max(0.0, start + seconds - time.monotonic()))):
            pause, waited = every, time.monotonic() - start
            if waited >= seconds:
                _end(
                    f"{whom} did not come within {seconds:.0f} s; start all processes within that time, and look whether "
                    "they have the same address and can reach it"
                )
            say(f"waiting for {whom}, {waited:.0f} s of at most {seconds:.0f}", before="")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        came.set()
