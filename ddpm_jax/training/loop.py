"""The training loop: dispatches of compiled steps, and the logs, checkpoints and evaluations between them.

The host waits for the devices only to log, evaluate or save, and to stay at most two dispatches ahead. After a kill, the same
command resumes from the newest intact checkpoint and ends with the same state.
"""

import collections
import contextlib
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from ddpm_jax.config import TrainConfig
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import RunError
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.ema import initial_share
from ddpm_jax.training.metric_writer import MetricWriter, best_step
from ddpm_jax.training.step import TrainState

PACE_STEPS = 50  # from which the time of the whole run is foreseen


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """A signal stopped training, and the state is saved. Attributes: `signum` and `step`."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}, which is saved")
        self.signum = signum
        self.step = step


class Findings(NamedTuple):
    """The result of an evaluator, by name: numbers (and texts) for the log, and images for grids, uint8 (N, H, W, C)."""

    numbers: dict[str, Any]
    pictures: dict[str, UInt8[np.ndarray, "N H W C"]]


class Evaluator(Protocol):
    """Evaluates the state, mostly its EMA parameters, at an interval and with the same draws each time.

    name: a number or picture that every evaluation gives; if the log lacks it, the evaluation is repeated at a resume.
    every: steps between two evaluations; 0: never.
    doing: optional; what the progress bar says meanwhile.
    """

    name: str
    every: int

    def __call__(self, state: TrainState) -> Findings:
        """Evaluates the state. All processes must call it."""


@dataclass(frozen=True)
class LoopParts:
    """What the loop works with. writer: on process 0 only. check: raises RunError if the workdir is gone."""

    train_steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    feed: Callable[[int, int], tuple[Any, Any]]
    learning_rate: Callable[[Any], Any]
    checkpoints: Checkpoints
    writer: MetricWriter | None
    evaluators: Sequence[Evaluator]
    check: Callable[[], None]


class StopSignal:
    """Records SIGTERM and SIGINT, so that training can save first. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.received: list[int] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Records signals while the block runs."""

        def receive(signum, frame):
            self.received.append(signum)
            if len(self.received) > 1:
                for s, handler in before.items():
                    signal.signal(s, handler)
                signal.raise_signal(signum)

        before = {s: signal.signal(s, receive) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def asked(self, boundary: bool) -> bool:
        """Whether to stop. Several processes agree only at a boundary, where they wait for the devices anyway."""
        if jax.process_count() == 1:
            return bool(self.received)
        return boundary and sharding.any_process(bool(self.received))

    @property
    def signum(self) -> int:
        """The signal; SIGTERM if another process received it."""
        return self.received[0] if self.received else signal.SIGTERM


class Stopwatch:
    """Measures steps per second, without evaluations."""

    def __init__(self, step: int):
        self._step, self._start = step, time.perf_counter()

    def lap(self, step: int) -> float:
        """Steps per second since the last lap."""
        now = time.perf_counter()
        rate = (step - self._step) / (now - self._start)
        self._step, self._start = step, now
        return rate

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Excludes the block from the time."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def duration(seconds: float) -> str:
    """A time in words: a minute, 40 minutes, 3.5 hours, 12.0 days."""
    for length, unit in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else "a minute"


class Losses:
    """Collects the metrics of steps: fetches them late, checks that they are finite, averages them for each log line."""

    def __init__(self, step: int, since_log: dict[str, list[float]]):
        self.step = step  # the last step whose metrics are fetched
        self.since_log = since_log
        self._waiting: collections.deque[dict[str, jax.Array]] = collections.deque()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of a dispatch. Waits until at most two dispatches are pending."""
        self._waiting.append(metrics)
        while len(self._waiting) > 2:
            self._fetch()

    def fetch_all(self) -> None:
        """Waits for all pending metrics."""
        while self._waiting:
            self._fetch()

    def _fetch(self) -> None:
        values = {name: np.asarray(value, np.float64) for name, value in self._waiting.popleft().items()}
        first, self.step = self.step + 1, self.step + len(values["loss"])
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise RunError(
                    f"{name} became {value[~np.isfinite(value)][0]} between steps {first} and {self.step}; the checkpoints "
                    "before are kept: lower train.lr or train.grad_clip, or look at the data, and continue in a new workdir"
                )
            self.since_log.setdefault(name, []).extend(value.tolist())

    def means(self) -> dict[str, float]:
        """The mean of each metric since the last call, after waiting for all."""
        self.fetch_all()
        means = {name: math.fsum(values) / len(values) for name, values in self.since_log.items()}
        self.since_log = {}
        return means


class Log:
    """Writes the log lines of a run: mean losses and speed, to the writer and the progress bar."""

    def __init__(self, options: TrainConfig, parts: LoopParts, step: int, since_log: dict[str, list[float]]):
        self.options, self.writer, self.learning_rate = options, parts.writer, parts.learning_rate
        self.losses, self.watch = Losses(step, since_log), Stopwatch(step)
        self.pace, self.pace_from = Stopwatch(step), step + options.steps_per_dispatch
        hidden = parts.writer is None
        self.bar = tqdm(total=options.steps, initial=step, unit="step", disable=hidden, dynamic_ncols=True)

    def dispatched(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics (a value for each step) of a dispatch that ends at a step. Raises RunError as `Losses`."""
        self.losses.add(metrics)
        self.bar.update(self.options.steps_per_dispatch)
        self.forecast(step)

    def forecast(self, step: int) -> None:
        """Says once how long the run will take, by the speed of PACE_STEPS after the first dispatch, which compiles."""
        if step == self.pace_from:
            self.losses.fetch_all()
            self.pace.lap(step)
        elif self.options.steps > step >= self.pace_from + PACE_STEPS > step - self.options.steps_per_dispatch:
            self.losses.fetch_all()
            left = duration((self.options.steps - step) / self.pace.lap(step))
            if self.writer:
                tqdm.write(f"The other {self.options.steps - step:,} steps will take about {left}, without the grids.")

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Says in the bar what is done while no step is taken, and leaves its time out of the time left."""
        before, start = getattr(self.bar, "postfix", None), time.perf_counter()
        self.bar.set_postfix_str(what)
        yield
        self.bar.set_postfix_str(before or "", refresh=False)
        if not self.bar.disable:
            self.bar.last_print_t += time.perf_counter() - start  # tqdm takes the speed from the time since then

    def dispatching(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Says in the bar that the first dispatch compiles."""
        first = step + self.options.steps_per_dispatch == self.pace_from
        return self.doing("compiling the step") if first else contextlib.nullcontext()

    def write(self, step: int) -> None:
        """Writes one line."""
        values = self.losses.means()
        rate = self.watch.lap(step)
        images = rate * self.options.batch_size
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {images:.0f} images/s")
        if self.writer:
            values |= {"lr": float(self.learning_rate(step - 1))}
            values |= {"ema_initial_share": initial_share(self.options, step)}
            self.writer.write(step, values | {"steps_per_s": rate, "images_per_s": images})

    def evaluate(self, evaluator: Evaluator, step: int, state: TrainState) -> None:
        """Runs an evaluator and writes its findings. Its time does not count as training; that of pending steps does."""
        self.losses.fetch_all()
        doing = getattr(evaluator, "doing", f"evaluating {evaluator.name}")
        with self.watch.stopped(), self.pace.stopped(), self.doing(doing):
            findings = evaluator(state)
            if self.writer:
                self.writer.write(step, findings.numbers, findings.pictures)

    def close(self) -> None:
        """Closes the bar and the writer's files."""
        self.bar.close()
        if self.writer:
            self.writer.close()


def train_loop(
    options: TrainConfig, parts: LoopParts, state: TrainState, meta: dict[str, Any], stop: StopSignal
) -> TrainState:
    """Trains from the state to step `options.steps`, and returns the last state.

    Args:
        options: The number of steps, and the intervals.
        parts: What the loop works with.
        state: The state to start from; it is donated.
        meta: The JSON saved with a checkpoint; "since_log" holds the losses of the next log line.
        stop: The signals that stop training.

    Raises:
        RunError: If a loss is not finite, a save fails or the workdir is gone.
        Interrupted: After a signal, once the state is saved.
    """
    step, last = int(state.step), options.steps
    with contextlib.closing(Log(options, parts, step, meta["since_log"])) as log:

        def is_due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == last)

        def is_missing(name: str) -> bool:
            return parts.writer is not None and not parts.writer.has(name, step)

        # A run that stopped between a save and its evaluations catches up on them.
        for evaluator in parts.evaluators if step else ():
            if is_due(evaluator.every) and sharding.first_decides(functools.partial(is_missing, evaluator.name)):
                log.evaluate(evaluator, step, state)

        while step < last:
            # Train: one dispatch of compiled steps, asynchronously.
            with log.dispatching(step):
                state, metrics = parts.train_steps(state, *parts.feed(step, options.steps_per_dispatch))
            step += options.steps_per_dispatch
            log.dispatched(step, metrics)

            # Log.
            if step % options.log_every == 0:
                log.write(step)

            # Save, once all losses are known to be finite.
            stopping = stop.asked(step % options.log_every == 0)
            if step % options.save_every == 0 or step == last or stopping:
                log.losses.fetch_all()
                save(options, parts, state, meta | {"since_log": log.losses.since_log})
            if stopping and step < last:
                break

            # Evaluate.
            for evaluator in parts.evaluators:
                if is_due(evaluator.every):
                    log.evaluate(evaluator, step, state)

        parts.checkpoints.wait()
        parts.check()
    if step < last:
        raise Interrupted(stop.signum, step)
    return state


def save(options: TrainConfig, parts: LoopParts, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts a save. The best checkpoint so far is kept."""
    parts.check()
    best = None
    if parts.writer:
        best = best_step(parts.writer.workdir, options.keep_best, parts.checkpoints.steps())
    parts.checkpoints.save(state, meta, keep=best)
