"""SIGINT and SIGTERM at any moment of any script: one sentence, exit code 130 or 143, and the same command goes on.

The moment counts from when the script has taken the signals: before that Python itself starts, which nothing of ours guards.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SIGNALS = [signal.SIGINT, signal.SIGTERM]


def start(*command, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def takes_signals(process):
    """Waits until the script handles SIGTERM, as it does from its first lines on; False if it has ended before."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        caught = [int(line.split()[1], 16) for line in status.read_text().splitlines() if line.startswith("SigCgt")]
        if caught and caught[0] >> (signal.SIGTERM - 1) & 1:
            return True
        time.sleep(0.001)
    return False


def interrupted(process, signum, delay):
    """Sends the signal after the delay, if the script still runs: its exit code and standard error."""
    if takes_signals(process):
        time.sleep(delay)
        process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


# ---- Without JAX: what a command may be doing when the signal comes


def function(body, *, grace=0.2, before=""):
    """A process that runs a function by `cli.run` and says when it has begun."""
    lines = "\n".join(f"    {line}" for line in body)
    code = (
        f"import hashlib, signal, sys, time\nfrom ddpm_jax.commands import cli\n{before}\ncli.GRACE_SECONDS = {grace}\n"
        f"sys.argv = ['train.py']\ndef main():\n    print('begun', flush=True)\n{lines}\ncli.run(main)\n"
    )
    process = start("-c", code)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)  # until it is in the middle of the body
    return process


LONG_CALL = (
    "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # as a compilation: no Python runs, and no signal breaks it
)


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "body",
    [
        ["time.sleep(60)"],
        [LONG_CALL],
        ["while True:", "    try: time.sleep(60)", "    except BaseException: pass"],
        ["class Late:", "    def __del__(self): time.sleep(60)", "Late()", "time.sleep(60)"],
        ["try: time.sleep(60)", "finally: raise ValueError('of the library')"],
        ["import threading", "threading.Thread(target=time.sleep, args=(60,)).start()", "time.sleep(60)"],
    ],
    ids=["waits", "long call", "swallows", "destructor", "other error", "thread"],
)
def test_command_ends_with_one_sentence_whatever_it_does(body, signum):
    process = function(body)
    process.send_signal(signum)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err.strip()) == (
        128 + signum,
        f"train.py: {signum.name}: stopped; the same command starts again.",
    )


def test_command_cleans_up_first(tmp_path):
    process = function(
        ["try: time.sleep(60)", f"finally: time.sleep(0.3); open({str(tmp_path / 'x')!r}, 'w')"], grace=30
    )
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert (tmp_path / "x").exists()


def test_second_signal_ends_at_once():
    process = function([LONG_CALL], grace=60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_training_that_saves_first_is_given_time_until_the_second_signal():
    process = function(["signal.signal(signal.SIGINT, lambda *_: None)", LONG_CALL], grace=0.1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    first, second = filter(None, err.splitlines())
    assert "SIGINT: stopping after this step; a second one stops at once" in first
    assert "SIGINT: stopped" in second


def test_signal_at_the_very_end_leaves_the_command_finished():
    """An object that is destroyed when Python has taken its signal handlers away, as JAX's devices are."""
    late = (
        "class Late:\n    work = staticmethod(hashlib.pbkdf2_hmac)\n"
        "    def __del__(self): self.work('sha256', b'', b'', 3 * 10**6)"
    )
    process = function(["import builtins; builtins.late = Late()"], before=late)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")


def test_signal_after_the_command_leaves_no_traceback():
    process = function(["import atexit", "atexit.register(time.sleep, 60)"])
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


@pytest.mark.parametrize("lines", [1, 100_000])
def test_closed_pipe_ends_a_command_without_a_word(lines):
    process = function([f"for _ in range({lines}): time.sleep(0.3 / {lines}); print('a line')"])
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
        assert process.wait(20) == 128 + signal.SIGPIPE


# ---- The scripts


@pytest.mark.parametrize("signum", SIGNALS)
@pytest.mark.parametrize(
    "command",
    [
        ("train", "configs/digits.py", "--workdir", "nothing"),
        ("sample", "nothing"),
        ("evaluate", "nothing"),
        ("convert", "export", "nothing", "nothing.npz"),
        ("benchmark", "configs/digits.py"),
        ("prepare_data", "nothing"),
    ],
    ids=lambda command: command[0],
)
def test_script_that_only_starts_ends_with_one_sentence(tmp_path, command, signum):
    (tmp_path / "jax.py").write_text("import time; time.sleep(100)")  # in JAX's place: the import that takes long
    script, *arguments = command
    process = start(f"{script}.py", *arguments, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    code, err = interrupted(process, signum, delay=0.0 if signum == signal.SIGINT else 0.5)
    assert code == 128 + signum
    assert err.strip().startswith(f"{script}.py: {signum.name}: stopped; ")
    assert len(err.strip().splitlines()) == 1


TRAIN = [
    *("--model.ch", 8, "--model.groups", 4, "--model.ch-mult", 1, "--model.attn-resolutions", 8, "--diffusion.T", 10),
    *("--train.batch-size", 16, "--train.steps-per-dispatch", 2, "--train.log-every", 4, "--train.save-every", 8),
]


class Scripts:
    """Every script on a tiny run, each time in a new folder."""

    def __init__(self, folder):
        self.folder = folder
        self.run, self.pictures = folder / "run", folder / "pictures"
        keep = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        caches = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "DDPM_JAX_CACHE": str(folder / "cache")}
        self.environment = keep | caches | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        self.pictures.mkdir()
        for i in range(300):
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(self.pictures / f"{i}.png")
        self.finish(["train.py", "configs/digits.py", "--workdir", self.run, *TRAIN, "--train.steps", 8])
        self.seconds = dict.fromkeys(SCRIPTS, 8.0)  # that each took last; a guess at first

    def command(self, script, new):
        """The command of a script that writes into a new folder, or beside it."""
        new.mkdir()
        if script == "evaluate":
            shutil.copytree(self.run, new / "run")
        return {
            "train": ["train.py", "configs/digits.py", "--workdir", new / "run", *TRAIN, "--train.steps", 40],
            "sample": ["sample.py", self.run, "--out", new / "images", "--num-images", 24, "--batch-size", 8],
            "evaluate": [
                *("evaluate.py", new / "run", "--features", "pixels", "--metrics", "kid", "nll"),
                *("--num-images", 18, "--num-real", 30, "--batch-size", 8, "--bootstrap", 4),
            ],
            "convert": ["convert.py", "to-diffusers", self.run, new / OUTPUT.get(script, "")],
            "export": ["convert.py", "export", self.run, new / OUTPUT.get(script, "")],
            "benchmark": ["benchmark.py", self.run, "--steps", 5, "--batch-sizes", 2, "--repeats", 2],
            "prepare_data": ["prepare_data.py", self.pictures, "--check"],
        }[script]

    def start(self, command):
        return start(*command, env=self.environment)

    def finish(self, command):
        process = self.start(command)
        takes_signals(process)
        begun = time.monotonic()
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    return Scripts(tmp_path_factory.mktemp("scripts"))


SCRIPTS = ["train", "sample", "evaluate", "convert", "export", "benchmark", "prepare_data"]
OUTPUT = {"convert": "model", "export": "sampler.jax_export"}


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(int(os.environ.get("DDPM_JAX_MOMENTS", "8"))))  # more of them: 50, say
def test_script_that_is_interrupted_at_a_random_moment_says_so_and_goes_on(moment, scripts, tmp_path):
    drawn = random.Random(moment)
    script = SCRIPTS[moment % len(SCRIPTS)]
    signum = signal.SIGTERM if drawn.random() < 0.3 else signal.SIGINT
    delay = drawn.uniform(0.0, 1.1) * scripts.seconds[script]
    new = tmp_path / "new"
    command = scripts.command(script, new)
    code, err = interrupted(scripts.start(command), signum, delay)
    where = f"{script}, {signum.name} after {delay:.3f} s, code {code}:\n{err}"
    assert "Traceback" not in err, where
    assert "Exception ignored" not in err, where
    assert code in (0, 128 + signum), where
    if code:
        told = err.strip().splitlines()[-1]
        assert signum.name in told, where
        assert "stopped" in told, where
    left = [path.name for path in new.rglob("*") if path.name.endswith(".tmp")]
    if script in ("convert", "export") and (new / OUTPUT[script]).exists():  # whole, so that it is refused as finished
        return
    scripts.seconds[script] = scripts.finish(command)
    assert not [path.name for path in new.rglob("*") if path.name.endswith(".tmp")], left
