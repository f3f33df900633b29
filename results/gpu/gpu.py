"""Measures and trains on one GPU, in pieces of some minutes, without a network.

python results/gpu/gpu.py --out runs/gpu --seconds 540 --data TRAIN.zip    # again, until it says that all is done

The plan is a list of tasks in the order of their worth, each a command of ddpm-jax in a process of its own. A finished task is
not repeated. When the time ends, a training saves, and continues at the next call; a measurement is repeated then.

OUT/NAME.json, OUT/NAME.log    a measurement's result; what a task's process said
OUT/trace/                     profiles and their summaries (ddpm_jax/benchmark/trace.py)
OUT/cifar10/, OUT/grids/       the training's workdir, and its samples
OUT/status.json, summary.json  which tasks are done; all results in one file
"""

import dataclasses
import difflib
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import tyro  # noqa: E402
from outcome import collect, tell  # noqa: E402
from tasks import REHEARSAL, Options, Size, Task, plan  # noqa: E402

from ddpm_jax.commands import cli  # noqa: E402
from ddpm_jax.core.errors import UsageError  # noqa: E402
from ddpm_jax.core.options import check_bounds  # noqa: E402

DONE, FAILED, CUT = "done", "failed", "cut"
LEAVING = 7.0  # seconds that a measurement has to end in
TELLING = 5.0  # seconds for the tables in the end
MARGIN = 1.5  # of the seconds after which a measurement was cut: what it is given at least the next time


class Status:
    """OUT/status.json: of each task that was begun its state (done, failed, cut), seconds, and why it ended as it did.

    Raises UsageError if the folder holds a rehearsal and this is none, or the other way round.
    """

    def __init__(self, out: Path, rehearse: bool):
        self._path = out / "status.json"
        content: dict[str, Any] = {"rehearse": rehearse, "tasks": {}}
        if self._path.exists():
            content = json.loads(self._path.read_text())
        if content["rehearse"] != rehearse:
            holds = "a rehearsal" if content["rehearse"] else "results that are no rehearsal"
            raise UsageError(f"--out {out} holds {holds}; give another folder")
        self._content = content
        self.tasks: dict[str, dict[str, Any]] = content["tasks"]

    def state(self, name: str) -> str:
        """The state of a task; empty if it was never begun."""
        return self.tasks.get(name, {}).get("state", "")

    def needs(self, task: Task) -> float:
        """The seconds that must be left for it to begin."""
        if task.least is not None:
            return task.least
        cut_after = self.tasks[task.name]["seconds"] if self.state(task.name) == CUT else 0.0
        return max(task.seconds, MARGIN * cut_after)

    def enter(self, name: str, state: str, seconds: float, why: str) -> None:
        """Writes how a task ended."""
        self.tasks[name] = {"state": state, "seconds": round(seconds, 1), "why": why}
        write(self._path, self._content)


def write(path: Path, content: Any) -> None:
    """Writes JSON whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def last_sentence(log: str) -> str:
    """Why a command ended: the last line of what it wrote, or the first ones in the last box of the command line's parser."""
    lines = [line.strip() for line in log.replace("\r", "\n").splitlines() if line.strip()]
    if lines and lines[-1].startswith("╰"):
        box = lines[max(i for i, line in enumerate(lines) if line.startswith("╭")) + 1 : -1]
        lines = [" ".join(line.strip("│ ") for line in box if not line.startswith("│ ─"))]
    return lines[-1][:300] if lines else "it wrote nothing"


def environment(task: Task, out: Path) -> dict[str, str]:
    """The variables of a task's process, with the folders that its compilers keep their choices in."""
    flags = [os.environ.get("XLA_FLAGS", ""), *task.flags]
    if task.kernels:
        folder = out.resolve() / "autotune" / task.kernels
        folder.mkdir(parents=True, exist_ok=True)  # XLA does not make it
        flags.append(f"--xla_gpu_per_fusion_autotune_cache_dir={folder}")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"PYTHONPATH": path, "XLA_FLAGS": " ".join(filter(None, flags)), "COLUMNS": "10000"}
    return os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out.resolve() / "inductor")} | own | dict(task.environment)


def carry_out(
    command: Sequence[str], variables: dict[str, str], log: Path, until: tuple[float, float]
) -> tuple[int, bool]:
    """Runs a command and returns its exit code, and whether the time cut it.

    until: the times (time.monotonic) of SIGTERM and of SIGKILL.
    """
    with log.open("w") as output, subprocess.Popen(command, env=variables, stdout=output, stderr=output) as process:
        try:
            for when, signum in zip(until, (signal.SIGTERM, signal.SIGKILL), strict=True):
                try:
                    return process.wait(max(0.0, when - time.monotonic())), signum == signal.SIGKILL
                except subprocess.TimeoutExpired:
                    process.send_signal(signum)
            return process.wait(), True
        except BaseException:  # this process is told to stop
            process.terminate()
            raise


def run_task(task: Task, out: Path, size: Size, end: float) -> tuple[str, float, str]:
    """Carries out a task until `end` (time.monotonic). Returns its state, seconds, and why it ended so."""
    start, log, result = time.monotonic(), out / f"{task.name}.log", out / f"{task.name}.new.json"
    saving = LEAVING if task.least is None else size.saving
    command = [sys.executable, "-m", "ddpm_jax", *task.words]
    code, cut = carry_out(command, environment(task, out), log, (end - saving, end))
    seconds, said = time.monotonic() - start, last_sentence(log.read_text(errors="replace"))
    if code == 0:
        if result.exists():
            result.replace(out / f"{task.name}.json")
        return DONE, seconds, ""
    if cut:
        return CUT, seconds, said if task.least else f"the time ended after {seconds:.0f} s"
    return FAILED, seconds, f"exit code {code}: {said}"


def chosen(tasks: Sequence[Task], only: Sequence[str]) -> list[Task]:
    """The tasks that some of the patterns name, all without patterns. Raises UsageError for a pattern that names none."""
    for pattern in only:
        if not any(fnmatch.fnmatchcase(task.name, pattern) for task in tasks):
            near = difflib.get_close_matches(pattern, [task.name for task in tasks], n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"--only {pattern} names no task; {meant}--list prints all of them")
    return [task for task in tasks if not only or any(fnmatch.fnmatchcase(task.name, pattern) for pattern in only)]


def obstacle(task: Task, status: Status, left: float) -> str:
    """Why a task is not begun; empty if nothing is in its way."""
    if task.lacks:
        return f"left out, as {task.lacks}"
    if task.after and status.state(task.after) != DONE:
        return f"waits for {task.after}"
    if left < (needed := status.needs(task)):
        return f"not begun, as {left:.0f} s are left, and it takes {needed:.0f}"
    return ""


def work(tasks: Sequence[Task], status: Status, run: Callable[[Task], tuple[str, float, str]], end: float) -> None:
    """Carries out the tasks until `end` (time.monotonic), with a line for each; one that does not fit is passed over."""
    for number, task in enumerate(tasks):
        if (left := end - time.monotonic()) <= 0:
            print(f"The time is over; {len(tasks) - number} tasks were not looked at.", flush=True)
            return
        if reason := obstacle(task, status, left):
            print(f"{task.name}: {reason}", flush=True)
            continue
        print(f"{task.name}: ", end="", flush=True)
        state, seconds, why = run(task)
        status.enter(task.name, state, seconds, why)
        print(f"{state} after {seconds:.0f} s" + (why and f": {why}"), flush=True)


def show(tasks: Sequence[Task], status: Status) -> None:
    """Prints the tasks: their estimated seconds, and whether they are done."""
    for task in tasks:
        print(f"{task.name:32} {task.seconds:5.0f} s  {task.lacks or status.state(task.name) or '-'}")


def draw_pictures(out: Path, options: Options) -> dict[str, Any]:
    """What a rehearsal takes for what is not given: 64 small pictures of waves, and their pixels as features."""
    path, generator = out / "rehearsal.npz", np.random.default_rng(0)
    if not path.exists():
        across, phase = np.linspace(0, 6, 8), generator.uniform(0, 6, (64, 1, 1, 3))
        waves = np.sin(across[:, None, None] + phase) * np.cos(across[None, :, None] - phase)
        np.savez(path, images=np.uint8(127.5 * (1 + waves)))
    drawn = {"data": str(path), "held_out": str(path), "features": "pixels"}
    return {name: value for name, value in drawn.items() if not getattr(options, name)}


def main() -> None:
    """Carries out the plan until the time ends, and says whether all of it is done."""
    start, options = time.monotonic(), tyro.cli(Options, prog="gpu.py")
    check_bounds(options)
    out, size = Path(options.out), REHEARSAL if options.rehearse else Size()
    status = Status(out, options.rehearse)
    out.mkdir(parents=True, exist_ok=True)
    if options.rehearse:
        options = dataclasses.replace(options, **draw_pictures(out, options))
    everything = plan(options)
    tasks = chosen(everything, options.only)
    if options.list:
        return show(tasks, status)
    end = start + options.seconds - TELLING
    settled = (DONE,) if options.only else (DONE, FAILED)  # a failed one is begun again if it is named
    wanted = [task for task in tasks if status.state(task.name) not in settled]
    work(wanted, status, lambda task: run_task(task, out, size, end), end)
    found = collect(everything, status.tasks, out)
    write(out / "summary.json", found)
    tell(found)
    open_ones = [task.name for task in tasks if not task.lacks and status.state(task.name) not in (DONE, FAILED)]
    failed = [task.name for task in tasks if status.state(task.name) == FAILED]
    again = (
        f"{len(open_ones)} of {len(tasks)} tasks are open; the same command continues" if open_ones else "all is done"
    )
    print(f"\n{again}" + (f"; failed: {', '.join(failed)}, see their logs" if failed else "") + ".")


if __name__ == "__main__":
    cli.run(main)
