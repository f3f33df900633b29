"""One of several processes goes: the others end soon, with one sentence, and all started again go on."""

import re
import signal
import time

import pytest
from etils import epath
from processes import finish, one_device, start

from ddpm_jax.training.checkpoint import finished_steps

pytestmark = pytest.mark.slow

TRAIN = [
    *("train.py", "configs/digits.py", "--model.ch", "8", "--model.groups", "4", "--model.ch-mult", "1"),
    *(
        "--model.attn-resolutions",
        "8",
        "--diffusion.T",
        "10",
        "--train.batch-size",
        "16",
        "--train.steps-per-dispatch",
        "2",
    ),
    *("--train.log-every", "4", "--train.save-every", "8", "--train.sample-every", "0"),
]
LIMIT = 75  # seconds: 40 without a heartbeat, and what a busy machine adds


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return one_device(tmp_path_factory.mktemp("processes"))


def wait_until(condition, running):
    while not condition() and all(process.poll() is None for process in running):
        time.sleep(0.01)


def survived(process, script, who):
    """What a process says that ends because another has gone: its one sentence at the end, and no log or stack of C++."""
    begun = time.monotonic()
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 1, output
    assert time.monotonic() - begun < LIMIT
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"{script}: {who} of this run has stopped or cannot be reached"), output
    assert output.count("has stopped") == 1
    for noise in ("Traceback", "[Gloo]", "coordination", "    @ ", "absl::"):
        assert noise not in output
    assert not re.search(r"^[IWEF]\d{4} ", output, re.MULTILINE), output
    return output


@pytest.mark.parametrize(("victim", "saved"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_training_whose_other_process_is_killed_ends_and_continues(victim, saved, environment, tmp_path):
    """Killed while the first step is compiled, or with a finished checkpoint."""
    command = [*TRAIN, "--workdir", str(tmp_path)]
    running = start([*command, "--train.steps", "100000"], environment, 2)
    metrics = tmp_path / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(finished_steps(epath.Path(tmp_path) / "checkpoints")) >= saved, running)
    running[victim].kill()
    survived(running[1 - victim], "train.py", f"process {victim}")
    running[victim].communicate()
    steps = metrics.read_text().count("\n") // 2 * 8 + 8
    (output,) = finish(start([*command, "--train.steps", str(steps)], environment, 1))
    assert any(said in output for said in ("Continuing from step", "The run stands at step")) == (saved > 0)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_sampling_that_is_stopped_on_one_process_ends_on_both(signum, environment, tmp_path):
    finish(start([*TRAIN, "--workdir", str(tmp_path / "run"), "--train.steps", "8"], environment, 1))
    command = ["sample.py", str(tmp_path / "run"), "--out", str(tmp_path / "images"), "--batch-size", "2"]
    running = start([*command, "--num-images", "20000"], environment, 2)
    wait_until(lambda: (tmp_path / "images" / "parts").exists(), running)
    running[1].send_signal(signum)
    output, _ = running[1].communicate(timeout=30)
    assert running[1].returncode == 128 + signum
    assert f"{signum.name}: stopped; finished images are kept" in output
    survived(running[0], "sample.py", "process 1")


WAITS = """
from ddpm_jax.commands import cli
from ddpm_jax.core import sharding
cli.run(lambda: sharding.start_processes(timeout=7))
"""


@pytest.mark.parametrize("index", [0, 1])
def test_process_whose_others_never_come_says_so(index, environment):
    running = start(["-c", WAITS], environment, 2)
    running[1 - index].kill()
    running[1 - index].communicate()
    output, _ = running[index].communicate(timeout=30)
    assert running[index].returncode == 1
    waiting, last = output.strip().split("\n\n")
    whom = ("the other processes" if index == 0 else "process 0") + " of this run at localhost:"
    assert f"waiting for {whom}" in waiting
    assert whom in last
    assert "did not come within 7 s" in last
    assert "absl" not in output


FAILS = """
from ddpm_jax.commands import cli
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import RunError, UsageError

def decide():
    raise {error}

def main():
    sharding.start_processes()
    sharding.first_decides(decide)

cli.run(main)
"""


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("UsageError('first: not so')", 2, "first: not so"),
        ("RunError('first: broken')", 1, "first: broken"),
        ("OSError(28, 'No space left on device')", 1, "the disk is full"),
        ("OSError(30, 'Read-only file system', 'x')", 1, "x: Read-only file system"),
        ("ZeroDivisionError('ours')", 1, "ZeroDivisionError: ours"),
    ],
)
def test_whatever_the_first_process_fails_at_the_others_are_told(error, code, message, environment):
    first, second = finish(start(["-c", FAILS.format(error=error)], environment, 2), code)
    assert message in first
    assert "the first process has stopped; its message says why" in second
    assert "Traceback" not in second


def test_process_that_fails_alone_ends_all(environment):
    alone = "import jax, time\n    jax.process_index() or decide()\n    time.sleep(60)"
    fails = FAILS.replace("sharding.first_decides(decide)", alone).format(
        error="OSError(28, 'No space left on device')"
    )
    running = start(["-c", fails], environment, 2)
    output, _ = running[0].communicate(timeout=60)
    assert running[0].returncode == 1
    assert "the disk is full" in output
    survived(running[1], "-c", "process 0")
