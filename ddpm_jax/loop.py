"""The training loop's input and output: what goes on around the compiled steps.

The devices are never waited for but at a log, sample or checkpoint boundary, and a little to keep the host from running far
ahead. Whatever is killed, the same command continues from the newest intact checkpoint, and ends as if nothing had happened.
"""

import collections
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ddpm_jax import sharding
from ddpm_jax.checkpoint import Checkpoints
from ddpm_jax.config import Config, check
from ddpm_jax.data import Source, make_feed, open_source
from ddpm_jax.errors import RunError, UsageError
from ddpm_jax.evaluation.during_training import make_evaluation, open_held_out
from ddpm_jax.files import open_folder
from ddpm_jax.footprint import check_training
from ddpm_jax.generate import batch_ranges, generate_batches, make_generator, sample_key
from ddpm_jax.reporting import Report, best_step
from ddpm_jax.training import TrainState, init_sharded_state, init_state, learning_rate, make_train_step
from ddpm_jax.workdir import CHECKPOINTS, check_there, enter, held, load_run


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """Training was asked to stop and has saved; `signum` says by which signal."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"stopped at step {step}, which is saved")
        self.signum = signum
        self.step = step


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT in the list instead of ending the process; a second one of them ends it at once."""
    received: list[int] = []

    def receive(signum, frame):
        received.append(signum)
        if len(received) > 1:
            for s, handler in before.items():
                signal.signal(s, handler)
            signal.raise_signal(signum)

    before = {s: signal.signal(s, receive) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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


def describe(config: Config, source: Source, mesh: Mesh, params: int) -> str:
    """What runs where, in one line."""
    devices = mesh.devices.size
    return (
        f"{params:,} parameters, {len(source):,} images; {jax.process_count()} process(es), {devices} {jax.default_backend()} "
        f"device(s), batch {config.train.batch_size} = {config.train.batch_size // devices} per device"
    )


def start_state(
    config: Config,
    source: Source,
    mesh: Mesh,
    checkpoints: Checkpoints,
    *,
    unverified: bool = False,
    changed_data: bool = False,
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, with what was saved beside it: the newest intact checkpoint's, or that of step 0."""
    step = checkpoints.choose(unverified=unverified)
    if step is not None:
        meta = checkpoints.restore_meta(step)
        if meta["data"] not in (None, source.identity):  # None: imported weights, which remember no data set
            changed = f"the data set has changed since the checkpoint of step {step}"
            changed += f": it was {meta['data']} and is {source.identity}"
            if not changed_data:
                raise UsageError(
                    f"{changed}; give the same data, start in another workdir, or go on with these by --changed-data"
                )
            tqdm.write(f"Note: {changed}.")
        shapes = jax.eval_shape(lambda: init_state(config, jax.random.key(0)))
        like = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            shapes,
            sharding.state_sharding(mesh, shapes),
        )
        return checkpoints.restore_state(step, like), meta
    state = init_sharded_state(config, mesh)
    if config.train.init_from:
        params = initial_params(config, state, mesh)
        state = dataclasses.replace(state, params=params, ema_params=jax.tree.map(jnp.copy, params))
    return state, {"data": source.identity, "since_log": {}}


def initial_params(config: Config, state: TrainState, mesh: Mesh) -> Any:
    """The EMA parameters of the run `train.init_from`, if they fit this config's network."""
    params = load_run(config.train.init_from, mesh=mesh).params
    theirs, ours = (
        {jax.tree_util.keystr(k): a.shape for k, a in jax.tree.leaves_with_path(p)} for p in (params, state.params)
    )
    different = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if different:
        name = different[0]
        raise UsageError(
            f"the parameters of train.init_from={config.train.init_from} do not fit this network: {name} has shape "
            f"{theirs.get(name)} there and {ours.get(name)} here; use the same model"
        )
    return jax.device_put(params, jax.tree.map(lambda a: a.sharding, state.params))


def train(
    config: Config, workdir: epath.PathLike, *, unverified: bool = False, changed_data: bool = False
) -> TrainState:
    """Trains to train.steps, from where the workdir is, and returns the last state.

    unverified: continue from the newest checkpoint without checking it. changed_data: continue it also with another data
    set. Raises UsageError for what the user can put right (before anything is compiled, but for a picture that cannot be
    decoded when its step comes), RunError when a loss is not finite, a save fails or the workdir is gone, OSError when the
    logs cannot be written, Interrupted after SIGTERM or SIGINT.
    """
    workdir = open_folder(workdir)
    for warning in check(config, num_devices=jax.device_count()):
        tqdm.write(f"Note: {warning}.")
    check_training(config)
    with held(workdir):
        source = open_source(config.data)
        held_out = open_held_out(config) if config.train.eval_every else None
        enter(workdir, config)
        return _continue(config, workdir, source, held_out, unverified=unverified, changed_data=changed_data)


def _continue(
    config: Config,
    workdir: epath.Path,
    source: Source,
    held_out: Source | None,
    *,
    unverified: bool,
    changed_data: bool,
) -> TrainState:
    """Trains on from where the workdir is, which this run holds."""
    mesh = sharding.make_mesh(fsdp=config.train.fsdp)
    options = config.train
    checkpoints = Checkpoints(
        workdir / CHECKPOINTS,
        config=config,
        keep_last=options.keep_last,
        keep_every=options.keep_every,
        say=tqdm.write,
    )
    with signals() as received:
        try:
            if jax.process_index() == 0:
                checkpoints.sweep()
            state, meta = start_state(
                config, source, mesh, checkpoints, unverified=unverified, changed_data=changed_data
            )
            if int(state.step) % options.steps_per_dispatch:
                raise UsageError(
                    f"the run stands at step {int(state.step)}, which is not a multiple of "
                    f"train.steps_per_dispatch={options.steps_per_dispatch}; choose a divisor of it"
                )
            tqdm.write(describe(config, source, mesh, sum(a.size for a in jax.tree.leaves(state.params))))
            if int(state.step):
                tqdm.write(f"Continuing from step {int(state.step)}.")
            return _loop(config, workdir, source, held_out, mesh, checkpoints, state, meta, received)
        finally:
            checkpoints.close()


def _loop(config, workdir, source, held_out, mesh, checkpoints, state, meta, received) -> TrainState:
    options = config.train
    step = int(state.step)
    losses = Losses(step, meta["since_log"])
    report = Report(workdir, last_step=step, say=tqdm.write) if jax.process_index() == 0 else None
    feed = make_feed(config, source, mesh)
    train_steps = make_train_step(config, mesh=mesh)
    generator = make_generator(config, mesh)
    measure = make_evaluation(config, mesh, source, held_out, generator) if held_out else None
    lr = learning_rate(config)
    bar = tqdm(total=options.steps, initial=step, unit="step", disable=report is None, dynamic_ncols=True)
    logged_step, logged_time = step, time.perf_counter()

    def save():
        losses.fetch_all()  # nothing is saved whose losses were not finite
        check_there(workdir)
        if report:
            report.flush()
        best = best_step(workdir, options.keep_best, checkpoints.steps()) if report else None
        checkpoints.save(state, {"data": source.identity, "since_log": losses.since_log}, keep=best)

    def finish():
        checkpoints.wait()
        check_there(workdir)

    def aside(work, *arguments):
        nonlocal logged_time  # steps/s are of training alone, the steps still under way among it
        losses.fetch_all()
        start = time.perf_counter()
        work(*arguments)
        logged_time += time.perf_counter() - start

    def sample_grid():
        images = grid_images(config, generator, state.ema_params, mesh)
        if report:
            report.samples(step, images)

    def evaluate(measure):
        values = measure(state.ema_params)
        if report:
            report.scalars(step, values)

    def is_due(every):
        return every and (step % every == 0 or step == options.steps)

    def is_missing(has):
        return sharding.first_decides(lambda: report is not None and not has(report))

    def asked_to_stop():
        # A signal may reach one process before another: they agree where all of them wait for the devices anyhow.
        if jax.process_count() == 1:
            return bool(received)
        return step % options.log_every == 0 and sharding.any_process(bool(received))

    try:
        # A run that stopped between a save and what follows it makes up for that.
        if step and is_due(options.sample_every) and is_missing(lambda report: report.has_samples(step)):
            aside(sample_grid)
        if step and measure and is_due(options.eval_every) and is_missing(lambda report: report.has("eval_loss", step)):
            aside(evaluate, measure)
        while step < options.steps:
            state, metrics = train_steps(state, *feed(step, options.steps_per_dispatch))
            losses.add(metrics)
            step += options.steps_per_dispatch
            bar.update(options.steps_per_dispatch)
            last, stop = step == options.steps, asked_to_stop()
            if step % options.log_every == 0:
                values = losses.means()
                rate = (step - logged_step) / (time.perf_counter() - logged_time)
                logged_step, logged_time = step, time.perf_counter()
                values |= {"lr": float(lr(step - 1)), "steps_per_s": rate, "images_per_s": rate * options.batch_size}
                bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s")
                if report:
                    report.scalars(step, values)
            if step % options.save_every == 0 or last or stop:
                save()
            if stop and not last:
                finish()
                raise Interrupted(received[0] if received else signal.SIGTERM, step)
            if is_due(options.sample_every):
                aside(sample_grid)
            if measure and is_due(options.eval_every):
                aside(evaluate, measure)
        finish()
        return state
    finally:
        bar.close()
        if report:
            report.close()


def grid_images(config: Config, generator: Any, params: Any, mesh: Mesh) -> np.ndarray:
    """The first train.num_samples images of the run's seed, uint8 (N, H, W, C)."""
    count, devices = config.train.num_samples, mesh.devices.size
    ranges = batch_ranges(range(count), batch_size=count, num_devices=devices)
    batches = generate_batches(
        generator, params, sample_key(config.seed), ranges, batch_size=count, num_devices=devices
    )
    return np.concatenate([images for _, images in batches])
