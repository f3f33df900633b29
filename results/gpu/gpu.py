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
import fnmatch
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import tyro  # noqa: E402

from ddpm_jax import cli  # noqa: E402
from ddpm_jax.core.errors import UsageError  # noqa: E402
from ddpm_jax.core.options import Bounds, Flag, check_bounds  # noqa: E402


@dataclass(frozen=True)
class Options:
    """Measure and train on one GPU, in pieces of some minutes. The same command continues, until it says that all is done."""

    out: str = "runs/gpu"
    """Folder of all results."""
    seconds: Annotated[float, Bounds(1, 10**6)] = 540
    """When to end, from now on."""
    data: str = ""
    """Pictures of 32x32 to train on, as data.source names them; without them nothing is trained."""
    held_out: str = ""
    """Pictures to measure the loss on while training; without them it is not measured."""
    features: str = ""
    """What distances compare by, as evaluate takes it: a file of convert classifier, say; without it there are none."""
    only: tuple[str, ...] = ()
    """Tasks to carry out, failed ones too; patterns such as 'train_*' name several."""
    list: Flag = False
    """Print the tasks with their estimated seconds, and which are done; run nothing."""
    rehearse: Flag = False
    """Carry out the same plan with tiny networks and few repeats, on any device."""


@dataclass(frozen=True)
class Task:
    """A piece of work, one command of ddpm-jax.

    Attributes:
        name: Its name, also of its files.
        words: The command.
        seconds: How long it takes, roughly.
        least: It is begun while so many are left, as a later call continues it; None: while `seconds` are, as it is repeated.
        flags: Of XLA.
        kernels: The folder in OUT/autotune that keeps which kernels XLA has chosen, so that tasks compare with the same ones.
        environment: Further variables.
        after: The task that has to be done before.
        lacks: What has to be given for it.
    """

    name: str
    words: tuple[str, ...]
    seconds: float
    least: float | None = None
    flags: tuple[str, ...] = ()
    kernels: str = "all"
    environment: tuple[tuple[str, str], ...] = ()
    after: str = ""
    lacks: str = ""


# ---- The plan


def words(line: str, **values: str) -> tuple[str, ...]:
    """The words of a line, with values, which may hold blanks, in the place of their {names}."""
    return tuple(word.format(**values) for word in line.split())


@dataclass(frozen=True)
class Size:
    """How large the plan's tasks are. The defaults are those of a GPU."""

    small: str = ""  # options that change the network of cifar10
    large: str = ""  # and that of lsun_church256
    repeats: int = 9
    dispatch: int = 10  # steps of training in one measured call
    sampler_steps: int = 50
    shrink: float = 1.0  # batches are of their size to this power
    train: str = "--train.steps-per-dispatch 50 --train.log-every 100 --train.save-every 5000 --train.eval-images 1024"
    thousand: int = 1000  # steps of training that 1k stands for
    compared: str = "--num-images 10000 --batch-size 256"  # for a Fréchet distance
    saving: float = 25.0  # seconds that a training has to save in
    pace: float = 1.0  # of the estimated seconds

    def step(self, batch: int, dtype: str, *, large: bool = False, dispatch: int = 0) -> str:
        """The beginning of a line that measures a training step. large: of the 256x256 network."""
        network = f"lsun_church256 {self.large}" if large else f"cifar10 {self.small}"
        sizes = f"--train.batch-size {self.batch(batch)} --train.steps-per-dispatch {dispatch or self.dispatch}"
        return f"benchmark {network} --dtypes {dtype} {sizes}"

    def samples(self, dtype: str, *batches: int) -> str:
        """The beginning of a line that measures DDIM at some batch sizes."""
        sizes = " ".join(str(self.batch(batch)) for batch in batches)
        sampler = f"--samplers ddim --steps {self.sampler_steps} --batch-sizes {sizes}"
        return f"benchmark cifar10 {self.small} --dtypes {dtype} {sampler}"

    def batch(self, batch: int) -> int:
        """A batch size as it is measured."""
        return max(1, round(batch**self.shrink))


_TINY = "--model.ch 4 --model.ch-mult 1 --model.num-res-blocks 1 --model.groups 2 --model.attn-resolutions 8"
_TINY += " --data.image-size 8 --diffusion.T 10 --diffusion.schedule cosine"
_SHORT = "--train.steps-per-dispatch 1 --train.log-every 1 --train.save-every 5 --train.batch-size 8"
REHEARSAL = Size(
    small=_TINY,
    large=_TINY,
    repeats=1,
    dispatch=2,
    sampler_steps=5,
    shrink=0.5,
    train=f"{_TINY} {_SHORT} --train.eval-images 8",
    thousand=1,
    compared="--num-images 16 --batch-size 8",
    saving=10.0,
    pace=0.2,
)

STEP = "--samplers --train"  # the train step alone
PEER = "--peer torch"
DTYPES = ("bfloat16", "float32")  # float32 is TF32 there, by JAX's defaults
REPEATS = {"plain": (), "deterministic": ("--xla_gpu_deterministic_ops=true",)}


def essentials(size: Size, out: Path) -> Iterator[Task]:
    """What is worth most, in about six minutes."""
    yield Task("environment", ("env",), 15)
    step = f"{size.step(128, 'bfloat16')} {STEP}"
    yield Task("train_128_bfloat16", words(step), 80)
    profiled = "--samplers ddim --steps 10 --batch-sizes 1 --train --trace {trace}"
    line = f"{size.step(128, 'bfloat16', dispatch=5)} {profiled}"
    yield Task("trace", words(line, trace=str(out / "trace")), 90)
    yield Task("sample_bfloat16", words(size.samples("bfloat16", 1, 16, 256)), 110)
    yield Task("peer_default_128_bfloat16", words(f"{step} {PEER} --peer-mode default"), 100)


def training(options: Options, size: Size, out: Path) -> Iterator[Task]:
    """CIFAR-10 in bfloat16, and after 10, 20, 50 and 100 thousand steps samples and distances.

    The average follows sooner than the paper's (train.ema_warmup), since a run of so few steps is judged by it.
    """
    values = {"workdir": str(out / "cifar10"), "data": options.data, "held_out": options.held_out}
    values["features"] = options.features
    train = "train cifar10 --workdir {workdir} --data.source {data} --model.dtype bfloat16 --train.ema-warmup"
    train += f" --train.sample-every 0 {size.train}"
    if options.held_out:
        train += f" --train.eval-source {{held_out}} --train.eval-every {5 * size.thousand}"
    grid = "sample {workdir} --num-images 64 --seed 0 --format npz --out {grid}"
    distance = "evaluate {workdir} --metrics fid kid --features {features} --no-figures --bootstrap 0"
    distance += f" {size.compared} --sampler ddim --steps {size.sampler_steps}"
    no_data = "" if options.data else "--data names no pictures"
    no_features = no_data or ("" if options.features else "--features names none")
    total, before = 0, ""
    for thousands in (10, 20, 50, 100):
        name, line = f"{thousands}k", f"{train} --train.steps {thousands * size.thousand}"
        seconds = 60 + 30 * (thousands - total)
        yield Task(f"steps_{name}", words(line, **values), seconds, 60, kernels="", after=before, lacks=no_data)
        total, before = thousands, f"steps_{name}"
        drawn = words(grid, grid=str(out / "grids" / name), **values)
        yield Task(f"grid_{name}", drawn, 50, kernels="", after=before, lacks=no_data)
        yield Task(f"distance_{name}", words(distance, **values), 120, 40, kernels="", after=before, lacks=no_features)


def peers(size: Size) -> Iterator[Task]:
    """Every measurement beside the peer at its best, whose compilation takes minutes."""
    for dtype in DTYPES:
        for batch in (128, 512, 1024):
            yield Task(f"peer_train_{batch}_{dtype}", words(f"{size.step(batch, dtype)} {STEP} {PEER}"), 300)
        for batch in (1, 16, 256):
            yield Task(f"peer_sample_{batch}_{dtype}", words(f"{size.samples(dtype, batch)} {PEER}"), 200)
    for dtype in DTYPES:
        for batch in (8, 16, 32):
            line = f"{size.step(batch, dtype, large=True)} {STEP} {PEER}"
            yield Task(f"peer_train256_{batch}_{dtype}", words(line), 400)


def variants(size: Size) -> Iterator[Task]:
    """Settings that a trace may speak for; all else is as in train_128_bfloat16 or sample_bfloat16."""
    step = words(f"{size.step(128, 'bfloat16')} {STEP}")
    for name in ("deterministic_ops", "exclude_nondeterministic_ops"):
        yield Task(f"train_{name}", step, 90, flags=(f"--xla_gpu_{name}=true",), kernels=name)
    for steps in (1, 50):
        yield Task(f"train_dispatch_{steps}", words(f"{size.step(128, 'bfloat16', dispatch=steps)} {STEP}"), 70)
    loops = ("--xla_gpu_enable_command_buffer=+WHILE",)
    yield Task("sample_command_buffer", words(size.samples("bfloat16", 1, 16)), 80, flags=loops)
    yield Task("train_exact_bfloat16", step, 80, flags=("--xla_allow_excess_precision=false",))
    yield Task("train_conv_fusion", step, 80, flags=("--xla_gpu_experimental_enable_conv_fusion=true",))
    exact = (("JAX_DEFAULT_MATMUL_PRECISION", "highest"),)  # no TF32
    yield Task("train_exact_float32", words(f"{size.step(128, 'float32')} {STEP}"), 90, environment=exact)
    for batch in (8, 32):
        line = f"{size.step(batch, 'bfloat16', large=True)} {STEP} --model.remat"
        yield Task(f"train256_{batch}_remat", words(line), 120)


def repeats(options: Options, size: Size, out: Path) -> Iterator[Task]:
    """Short trainings, each twice: do they agree bit for bit? (`differing`)"""
    line = "train cifar10 --workdir {workdir} --data.source {data} --model.dtype bfloat16 --train.sample-every 0"
    line += f" --train.steps 100 --train.steps-per-dispatch 10 --train.log-every 10 {size.small}"
    lacks = "" if options.data else "--data names no pictures"
    for name, flags in REPEATS.items():
        for i in (1, 2):
            workdir = str(out / "repeats" / f"{name}_{i}")
            command = words(line, workdir=workdir, data=options.data)
            yield Task(f"repeat_{name}_{i}", command, 60, flags=flags, kernels=name, lacks=lacks)


def capacities(size: Size) -> Iterator[Task]:
    """The largest batches. No kernel is tried out, since nothing is run."""
    for name, line in {
        "fit_bfloat16": size.step(128, "bfloat16"),
        "fit256_bfloat16": size.step(8, "bfloat16", large=True),
        "fit256_remat": f"{size.step(8, 'bfloat16', large=True)} --model.remat",
    }.items():
        command = words(f"{line} --samplers --fit 16 24 80")
        yield Task(name, command, 240, flags=("--xla_gpu_autotune_level=0",), kernels=name)


def plan(options: Options) -> list[Task]:
    """All tasks in the order of their worth."""
    out, size = Path(options.out), REHEARSAL if options.rehearse else Size()
    parts = [essentials(size, out), training(options, size, out), peers(size), variants(size)]
    parts += [repeats(options, size, out), capacities(size)]
    tasks = []
    for task in itertools.chain(*parts):
        told = words("--repeats {n} --json {file}", n=str(size.repeats), file=str(out / f"{task.name}.new.json"))
        command = task.words + (told if task.words[0] == "benchmark" else ())
        least = task.least and task.least * size.pace + size.saving
        tasks.append(dataclasses.replace(task, words=command, seconds=task.seconds * size.pace, least=least))
    return tasks


# ---- Carrying it out

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
            raise UsageError(f"--only {pattern} names no task; give some of {', '.join(task.name for task in tasks)}")
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


# ---- What came of it

COLUMNS = {
    "task": ("task", ""),
    "what": ("what", ""),
    "device_gib": ("GiB", "d"),
    "batch": ("batch", "d"),
    "dtype": ("dtype", ""),
    "compile_s": ("compile s", ".0f"),
    "ms_each": ("ms each", ".2f"),
    "spread": ("spread", ".1%"),
    "images_per_s": ("images/s", ".1f"),
    "peak_share": ("of peak", ".1%"),
    "ratio_to_peer": ("time / peer's", ".2f"),
    "memory_mib": ("MiB", ".0f"),
}


def rows(tasks: Sequence[Task], out: Path) -> list[dict[str, Any]]:
    """The measurements' rows, each with its task; of one that was cut those that it had written."""
    found = []
    for task in tasks:
        files = [path for path in (out / f"{task.name}.json", out / f"{task.name}.new.json") if path.exists()]
        for row in json.loads(files[0].read_text())["rows"] if files else ():
            found.append({"task": task.name} | row)
    return found


def curve(workdir: Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics.jsonl that are whole."""
    path, lines = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue  # the training was killed while it wrote it
    return lines


def differing(out: Path, flags: str) -> str:
    """From which step on two trainings with the same flags differ in a logged loss or gradient; empty without both."""
    both = [curve(out / "repeats" / f"{flags}_{i}") for i in (1, 2)]
    numbers = [{line["step"]: (line["loss"], line["grad_norm"]) for line in lines if "loss" in line} for lines in both]
    if not all(numbers):
        return ""
    apart = [step for step, values in numbers[0].items() if numbers[1].get(step) != values]
    return f"from step {min(apart)}" if apart else f"in none of {max(numbers[0])} steps"


def collect(tasks: Sequence[Task], status: Status, out: Path) -> dict[str, Any]:
    """All results: the content of OUT/summary.json."""
    workdir = out / "cifar10"
    traces = {path.stem: json.loads(path.read_text()) for path in sorted((out / "trace").glob("*.json"))}
    return {
        "tasks": status.tasks,
        "rows": rows(tasks, out),
        "traces": traces,
        "repeats_differ": {flags: differing(out, flags) for flags in REPEATS},
        "curve": curve(workdir),
        "evaluations": [json.loads(path.read_text()) for path in sorted((workdir / "evaluation").glob("*.json"))],
    }


def tell(found: dict[str, Any]) -> None:
    """Prints the results as tables."""
    from ddpm_jax.benchmark.timing import table  # imports JAX

    headings = {name: (name, ".0f" if name == "seconds" else "") for name in ("task", "state", "seconds", "why")}
    print("\n" + table([{"task": name} | entry for name, entry in found["tasks"].items()], headings))
    if found["rows"]:
        print("\n" + table(found["rows"], COLUMNS))
    for name, trace in found["traces"].items():
        parts = ", ".join(f"{part['name']} {part['share']:.0%}" for part in trace["parts"][:6])
        print(f"\n{name}: busy {trace['busy_ms']:.1f} of {trace['span_ms']:.1f} ms; {parts}")
    for flags, where in found["repeats_differ"].items():
        if where:
            print(f"\nTwo trainings ({flags}) differ {where}.")
    lines = [[line for line in found["curve"] if name in line][-1:] for name in ("loss", "eval_loss")]
    for line in itertools.chain(*lines):
        told = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "crc32"}
        print("\n" + ", ".join(f"{name} {value:.6g}" for name, value in told.items()))
    for result in found["evaluations"]:
        print(f"{result['metric']} {result['value']:.6g} at step {result['definition']['sampling']['step']}")


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
    found = collect(everything, status, out)
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
