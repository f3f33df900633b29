"""This version beside another checkout of the project, each in a process of its own, their calls in turn."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ddpm_jax.benchmark.comparison import Comparison
from ddpm_jax.benchmark.options import Plan, dtypes_of
from ddpm_jax.benchmark.programs import Row
from ddpm_jax.benchmark.timing import Timing
from ddpm_jax.config import Config
from ddpm_jax.core.errors import RunError, UsageError
from ddpm_jax.core.provenance import commit

THIS = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
COLUMNS = {
    "what": ("what", ""),
    "steps": ("steps", "d"),
    "batch": ("batch", "d"),
    "dtype": ("dtype", ""),
    "this_median_s": ("this: median s", ".4f"),
    "this_spread": ("spread", ".1%"),
    "other_median_s": ("other: median s", ".4f"),
    "other_spread": ("spread", ".1%"),
    "ratio": ("this / other", ".3f"),
    "low": ("from", ".3f"),
    "high": ("to", ".3f"),
    "verdict": ("verdict", ""),
}


class WorkerError(Exception):
    """A version's process that has ended before it was told to. Attributes: `role`, this or other; `code`; `said`, why."""

    def __init__(self, role: str, code: int, said: str):
        super().__init__(said)
        self.role, self.code, self.said = role, code, said


class Worker:
    """A process of `benchmark/worker.py`, whose program is compiled. Attribute: `about`, its version and environment."""

    def __init__(self, role: str, process: "subprocess.Popen[str]", errors: IO[str]):
        self._role, self._process, self._errors = role, process, errors
        self.about = self._answer()

    def seconds(self) -> float:
        """Runs the program once and returns how long it took. Raises WorkerError if the process ends instead."""
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended, as its answer will show
            os.write(self._process.stdin.fileno(), b"\n")  # nothing stays in a buffer that closing would write
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = f"{signal.Signals(-code).name} ended it" if code < 0 else last_sentence(self._errors.read())
        raise WorkerError(self._role, code, said or f"it ended with exit code {code}")


@contextmanager
def start(role: str, folder: Path, words: Sequence[str]) -> Iterator[Worker]:
    """Starts the version in a folder on a command line, waits until its program is compiled, and ends it after the block."""
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    # Both hold memory of a GPU, so neither may take all of it. Refusals are not wrapped at the terminal's width.
    environment = os.environ | {"PYTHONPATH": path, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "COLUMNS": "10000"}
    command = [sys.executable, "-P", str(WORKER), str(folder), *words]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, env=environment, stderr=errors, **pipes) as process,
    ):
        try:
            yield Worker(role, process, errors)
        finally:
            process.kill()


def last_sentence(text: str) -> str:
    """The reason in what a command wrote to standard error: in a box of the command line's parser, or the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    boxed = [line.strip("│ ") for line in lines if line.startswith("│")]
    if boxed:
        return " ".join(itertools.takewhile(lambda line: not line.startswith("─"), boxed)).rstrip(".")
    return lines[-1].removeprefix("ddpm-jax benchmark: ").rstrip(".") if lines else ""


def checkout(name: str) -> Path:
    """The folder of another version. Raises UsageError if the package is not in it."""
    folder = Path(name).resolve()
    if not (folder / "ddpm_jax" / "__init__.py").is_file():
        raise UsageError(
            f"--against {name} has no ddpm_jax/ in it; give the folder of another checkout of this project"
        )
    return folder


def single_rows(config: Config, plan: Plan) -> Iterator[tuple[Row, list[str]]]:
    """The rows of a plan: what each is called, and the options that measure it alone."""
    batch = config.train.batch_size
    for dtype in dtypes_of(config, plan):
        for sampler, steps, images in itertools.product(plan.samplers, plan.steps, plan.batch_sizes):
            options = ["--samplers", sampler, "--steps", str(steps), "--batch-sizes", str(images), "--dtypes", dtype]
            yield {"what": sampler, "steps": steps, "batch": images, "dtype": dtype}, options
        if plan.train:
            labels = {"what": "train step", "steps": config.train.steps_per_dispatch, "batch": batch, "dtype": dtype}
            yield labels, ["--samplers", "--train", "--dtypes", dtype]
    if plan.data:
        yield {"what": "data feed", "batch": batch}, ["--samplers", "--data"]


def name_of(row: Row) -> str:
    """A row in words: ddim (steps 50, batch 16, float32)."""
    told = [f"{key} {row[key]}" for key in ("steps", "batch") if key in row]
    return f"{row['what']} ({', '.join(told + [row['dtype']] * ('dtype' in row))})"


class Against:
    """This version and another on the same rows.

    Args:
        other: The folder of the other version, with ddpm_jax/ in it.
        words: The config's part of the command line, which both are given: its file, and the fields that differ.

    Attributes:
        environment: The hardware and both versions, as the processes tell them; empty before the first row.
    """

    def __init__(self, other: Path, words: Sequence[str]):
        self._folders = {"this": THIS, "other": other}
        self._words = tuple(words)
        self.environment: dict[str, Any] = {}

    def measure(self, config: Config, plan: Plan) -> Iterator[Row]:
        """Yields a plan's rows. One that the other version does not know, or cannot run, has `left_out`: why.

        Raises UsageError for what this version refuses, and RunError for a row that it cannot run.
        """
        for labels, options in single_rows(config, plan):
            words = [*self._words, *options]
            try:
                with (
                    start("this", self._folders["this"], words) as ours,
                    start("other", self._folders["other"], words) as theirs,
                ):
                    self._learn(this=ours, other=theirs)
                    rounds = [(ours.seconds(), theirs.seconds()) for _ in range(1 + plan.repeats)]
            except WorkerError as error:
                if error.role == "other":
                    yield labels | {"left_out": error.said, "verdict": "left out"}
                    continue
                if error.code == 2:
                    raise UsageError(error.said) from None
                failed = f"{name_of(labels)} cannot be measured in this version ({error.said})"
                raise RunError(f"{failed}; the same command without --against says more") from None
            yield labels | _compared(*(Timing(first, list(rest)) for first, *rest in zip(*rounds, strict=True)))

    def _learn(self, **workers: Worker) -> None:
        self.environment = dict(workers["this"].about["environment"])
        for role, worker in workers.items():
            folder = self._folders[role]
            self.environment[role] = f"{worker.about['version']}, {commit(folder) or folder.name}"


def _compared(this: Timing, other: Timing) -> Row:
    comparison = Comparison(this.repeats, other.repeats)
    low, high = comparison.interval
    row: Row = {"ratio": comparison.ratio, "low": low, "high": high, "verdict": comparison.verdict}
    for role, timing in (("this", this), ("other", other)):
        row |= {
            f"{role}_warm_up_s": timing.warm_up,
            f"{role}_repeats_s": timing.repeats,
            f"{role}_median_s": timing.median,
            f"{role}_spread": timing.spread,
        }
    return row


def judge(rows: Sequence[Row]) -> None:
    """Raises RunError if this version is slower in a row, and UsageError if there is no row that both could run."""
    if all("left_out" in row for row in rows):
        raise UsageError(
            "nothing was compared, as the other version can run none of the rows; give another checkout, or rows"
        )
    if slower := [f"{name_of(row)} by {row['ratio'] - 1:.0%}" for row in rows if row["verdict"] == "slower"]:
        raise RunError(f"this version is slower than the other, beyond the spread, in {', '.join(slower)}")
