"""Waiting for the other processes of a run, and what is said when one has gone: without JAX, by what C++ would write."""

import signal
import subprocess
import sys

import pytest

from ddpm_jax.core import peers

SERVICE = (
    "E1126 06:32:46.202265    8781 coordination_service.cc:1549] [81125] Use error polling to propagate the following error to "
    "all tasks: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\\n1\\nThe tasks have crashed.\\n"
)
FATAL = (
    "F1126 06:32:33.086568    8748 client.h:80] Terminating process because the JAX distributed service detected fatal errors. "
    "absl::Status: UNAVAILABLE: {reason}\\nAdditional GRPC error:\\n*** Check failure stack trace: ***\\n    @ 0x7f2\\n"
)
OTHER = "F1126 06:32:33.086568    8748 convolution.cc:80] Check failed: stride > 0\\n    @ 0x7f2\\n"


def child(code):
    """What a process that listens does: exit code, standard output, standard error."""
    code = f"import ctypes, os, sys, time\nfrom ddpm_jax.core import peers\nsys.argv = ['train.py']\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("log", "who"),
    [
        (FATAL.format(reason="Failed to send RPC to coordination service. Either the leader"), "process 0"),
        (SERVICE + FATAL.format(reason="The following tasks are unhealthy"), "process 1"),
        (SERVICE.replace("\\n1\\n", "\\n1,3\\n") + FATAL.format(reason="see above"), "processes 1, 3"),
        (FATAL.format(reason="Barrier failed because: Task 2 heartbeat timeout"), "process 2"),
        (FATAL.format(reason="something else"), "another process"),
    ],
)
def test_abort_of_the_coordination_service_becomes_one_sentence_that_names_the_process(log, who):
    code, out, err = child(f'peers.listen()\nprint("kept")\nos.write(2, b"{log}")\nctypes.CDLL(None).abort()')
    assert (code, out) == (1, "kept\n")
    assert err.strip() == f"train.py: {peers.gone(who)}."


def test_gloo_alone_is_hidden_from_what_libraries_say():
    code, out, err = child(
        'peers.listen()\nos.write(1, b"[Gloo] Rank 0 is connected\\nmore\\n")\nos.write(2, b"W1126 06:32 tiling.cc:1] slow\\n")\n'
        'print("ours")\nprint("theirs", file=sys.stderr)\ntime.sleep(0.5)'
    )
    assert code == 0
    assert sorted(out.splitlines()) == ["more", "ours"]
    assert sorted(err.splitlines()) == ["W1126 06:32 tiling.cc:1] slow", "theirs"]


def test_abort_for_another_reason_says_what_it_always_did():
    code, _, err = child(f'peers.listen()\nos.write(2, b"{OTHER}")\nctypes.CDLL(None).abort()')
    assert code == 128 + signal.SIGABRT
    assert "Check failed: stride > 0" in err
    assert "@ 0x7f2" in err


def test_process_that_waits_says_for_whom_and_ends():
    code, _, err = child(
        'with peers.patience("process 0 at host:1", seconds=0.9, first=0.2, every=0.4):\n    time.sleep(30)'
    )
    assert code == 1
    *waiting, last = err.strip().splitlines()
    assert len([line for line in waiting if "waiting for process 0 at host:1" in line]) == 2
    assert "process 0 at host:1 did not come within 1 s" in last


def test_process_whose_others_come_says_nothing():
    code, out, err = child('with peers.patience("x", seconds=0.3, first=0.2):\n    pass\ntime.sleep(0.6)')
    assert (code, out, err) == (0, "", "")


def test_process_that_fails_does_not_wait_for_the_others_for_ever():
    started = "peers.listen()\npeers.END_SECONDS = 0.2\npeers.leave(2)\n"
    assert child(f"{started}time.sleep(30)")[0] == 2
    code, _, err = child(f'{started}os.write(2, b"{FATAL}")\nctypes.CDLL(None).abort()')
    assert (code, err) == (2, "")  # it has said its own


def test_process_that_is_aborted_while_it_says_why_says_it_once():
    """C++ notices the other process's end while this one is printing that sentence."""
    code, _, err = child(
        f"""peers.listen()
class Slow:
    def write(self, text):
        os.write(2, b"{FATAL}")
        time.sleep(1)
        sys.__stderr__.write(text)
sys.__stderr__, sys.stderr = sys.stderr, Slow()
peers.leave(1, "said")
ctypes.CDLL(None).abort()"""
    )
    assert (code, err) == (1, "train.py: said\n")


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:38632", True),
        ("UNKNOWN: Gloo context initialization failed: DEADLINE_EXCEEDED: GetKeyValue() timed out", True),
        ("INTERNAL: NCCL operation failed: remote process exited or there was a network error", True),
        ("INTERNAL: Barrier failed because: Task 1 heartbeat timeout", True),
        ("UNKNOWN: Gloo AllReduce failed: shapes differ", False),
        ("RESOURCE_EXHAUSTED: Out of memory", False),
    ],
)
def test_errors_that_come_of_a_lost_process_are_told_from_others(message, is_lost, monkeypatch):
    error = ValueError("saving failed")
    error.__cause__ = RuntimeError(message)
    assert peers.lost(error) is None  # a process alone
    monkeypatch.setattr(peers, "_listening", True)
    monkeypatch.setattr(peers, "others", [1])
    assert peers.lost(error) == (peers.gone("process 1") if is_lost else None)
