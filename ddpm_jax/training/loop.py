"""The training loop: compiled steps one after the other, and what happens between them.

The devices are never waited for but at a log, evaluation or checkpoint boundary, and a little to keep the host from running
far ahead. Whatever is killed, the same command continues from the newest intact checkpoint, and ends as if nothing had
happened.
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

from ddpm_jax import sharding
from ddpm_jax.config import TrainConfig
from ddpm_jax.errors import RunError
from ddpm_jax.training.checkpoint import Checkpoints
from ddpm_jax.training.metric_writer import MetricWriter
from ddpm_jax.training.step import TrainState


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Training was asked to stop and has saved; `signum` says by which signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}, which is saved")
        self.signum = signum
        self.step = step


class Findings(NamedTuple):
    """What an evaluator has found: numbers (and texts) for the log, and images for a grid, uint8 (N, H, W, C), by name."""

    numbers: dict[str, Any]
    pictures: dict[str, UInt8[np.ndarray, "N H W C"]]


class Evaluator(Protocol):
    """Something that looks at the EMA parameters now and then. It draws the same each time, so that findings compare.

    name: a number or picture that it always finds, by which a lost evaluation is noticed. every: steps between two; 0: never.
    """

    name: str
    every: int

    def __call__(self, params: Any) -> Findings:
        """What is found of the parameters; of several processes all must ask."""


@dataclass(frozen=True)
class Parts:
    """What the loop is handed. writer: on the first process only. check: raises where the workdir is no longer there."""

    train_steps: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    feed: Callable[[int, int], tuple[Any, Any]]
    learning_rate: Callable[[Any], Any]
    checkpoints: Checkpoints
    writer: MetricWriter | None
    evaluators: Sequence[Evaluator]
    check: Callable[[], None]


class StopSignal:
    """SIGTERM and SIGINT, collected instead of ending the process; a second one of them ends it at once."""

    def __init__(self) -> None:
        self.received: list[int] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Collects while the block runs."""

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
        """Whether training shall stop. Several processes agree at a boundary, where all of them wait for the devices anyhow."""
        if jax.process_count() == 1:
            return bool(self.received)
        return boundary and sharding.any_process(bool(self.received))

    @property
    def signum(self) -> int:
        """The signal; SIGTERM where another process was sent it."""
        return self.received[0] if self.received else signal.SIGTERM


class Stopwatch:
    """Steps per second of training alone."""

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
        """Does not count the block."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


class Losses:
    """The metrics of steps on their way from the devices: fetched late, checked for NaN, averaged for each log line."""

    def __init__(self, step: int, since_log: dict[str, list[float]]):
        self.step = step  # the last step whose metrics are here
        self.since_log = since_log
        self._waiting: collections.deque[dict[str, jax.Array]] = collections.deque()

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a dispatch; waits only for those before the last two, so that the host stays near."""
        self._waiting.append(metrics)
        while len(self._waiting) > 2:
            self._fetch()

    def fetch_all(self) -> None:
        """Waits for every metric under way."""
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
        """The mean of each metric since the last call, all of them fetched."""
        self.fetch_all()
        means = {name: math.fsum(values) / len(values) for name, values in self.since_log.items()}
        self.since_log = {}
        return means


class Log:
    """The log lines of a run: mean losses and the pace of training, for the writer and the progress bar."""

    def __init__(self, options: TrainConfig, parts: Parts, step: int, since_log: dict[str, list[float]]):
        self.options, self.writer, self.learning_rate = options, parts.writer, parts.learning_rate
        self.losses, self.watch = Losses(step, since_log), Stopwatch(step)
        hidden = parts.writer is None
        self.bar = tqdm(total=options.steps, initial=step, unit="step", disable=hidden, dynamic_ncols=True)

    def write(self, step: int) -> None:
        """One line."""
        values = self.losses.means()
        rate = self.watch.lap(step)
        images = rate * self.options.batch_size
        self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {images:.0f} images/s")
        if self.writer:
            lr = float(self.learning_rate(step - 1))
            self.writer.write(step, values | {"lr": lr, "steps_per_s": rate, "images_per_s": images})

    def evaluate(self, evaluator: Evaluator, step: int, params: Any) -> None:
        """What an evaluator finds. The steps still under way count as training, the evaluation does not."""
        self.losses.fetch_all()
        with self.watch.stopped():
            findings = evaluator(params)
            if self.writer:
                self.writer.write(step, findings.numbers, findings.pictures)

    def close(self) -> None:
        """Closes the bar and the writer's files."""
        self.bar.close()
        if self.writer:
            self.writer.close()


def train_loop(
    options: TrainConfig, parts: Parts, state: TrainState, meta: dict[str, Any], stop: StopSignal
) -> TrainState:
    """Trains from the state to step `options.steps`, and returns the last state.

    options: how long, and how often what happens between the steps does. meta: what was saved beside the state, which is
    donated: the data set's identity, and the losses that wait for a log line. Raises RunError where a loss is not finite, a
    save fails or the workdir is gone, Interrupted once what `stop` asked for is saved.
    """
    step, last = int(state.step), options.steps
    with contextlib.closing(Log(options, parts, step, meta["since_log"])) as log:

        def is_due(every: int) -> bool:
            return every > 0 and (step % every == 0 or step == last)

        def is_missing(name: str) -> bool:
            return parts.writer is not None and not parts.writer.has(name, step)

        # A run that stopped between a save and the evaluations after it makes up for them.
        for evaluator in parts.evaluators if step else ():
            if is_due(evaluator.every) and sharding.first_decides(functools.partial(is_missing, evaluator.name)):
                log.evaluate(evaluator, step, state.ema_params)

        while step < last:
            # Train: one dispatch of compiled steps, which is not waited for.
            state, metrics = parts.train_steps(state, *parts.feed(step, options.steps_per_dispatch))
            step += options.steps_per_dispatch
            log.losses.add(metrics)
            log.bar.update(options.steps_per_dispatch)

            # Log.
            if step % options.log_every == 0:
                log.write(step)

            # Save, where all losses were finite.
            stopping = stop.asked(step % options.log_every == 0)
            if step % options.save_every == 0 or step == last or stopping:
                log.losses.fetch_all()
                save(options, parts, state, meta | {"since_log": log.losses.since_log})
            if stopping and step < last:
                break

            # Evaluate.
            for evaluator in parts.evaluators:
                if is_due(evaluator.every):
                    log.evaluate(evaluator, step, state.ema_params)

        parts.checkpoints.wait()
        parts.check()
    if step < last:
        raise Interrupted(stop.signum, step)
    return state


def save(options: TrainConfig, parts: Parts, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts a save, with the logs up to it on disk; the best checkpoint so far stays."""
    parts.check()
    best = None
    if parts.writer:
        parts.writer.flush()
        best = parts.writer.best_step(options.keep_best, parts.checkpoints.steps())
    parts.checkpoints.save(state, meta, keep=best)
