"""What is measured and trained on a GPU: the tasks in the order of their worth, each a command of ddpm-jax."""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ddpm_jax.core.options import Bounds, Flag


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
