"""Plans of what to measure or compile, carried out row by row."""

import dataclasses
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from ddpm_jax.benchmark import capacity, programs, topology, torch_peer
from ddpm_jax.benchmark.options import Plan, check_plan, dtypes_of
from ddpm_jax.benchmark.programs import Row
from ddpm_jax.config import Config, check, to_json
from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, program
from ddpm_jax.core.files import write_text
from ddpm_jax.core.room import check_memory
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.generation.starts import build_sampler
from ddpm_jax.training.experiment import Experiment


def refuse(config: Config, plan: Plan, *, compiling: bool = False) -> None:
    """Raises UsageError for a plan that cannot be carried out, before anything is compiled.

    compiling: the plan is for `compile_for`, so options of running are refused.
    """
    trained = plan.train or plan.data  # a topology's devices are checked by `compile_for`
    check(config, num_devices=jax.device_count() if trained and not compiling else None)
    check_plan(plan, compiling=compiling)
    Experiment.from_config(config).check_unconditional("benchmark")
    for options, _, batch in _sampling(plan):
        build_sampler(Experiment.from_config(config).process, options)
        if not compiling and jax.default_backend() == "cpu":
            # A lower bound: images, noise and output, and the first feature map.
            needed = 4 * batch * math.prod(config.data.size) * (3 * config.data.channels + config.model.ch)
            check_memory(needed, f"--batch-sizes {batch}", "use a smaller one")
        if plan.peer == "torch":
            torch_peer.find_scheduler(config, options.sampler)
    if plan.peer == "torch":
        torch_peer.libraries()


def _sampling(plan: Plan) -> Iterator[tuple[SamplerOptions, int, int]]:
    for sampler, steps, batch in itertools.product(plan.samplers, plan.steps, plan.batch_sizes):
        yield SamplerOptions(sampler=sampler, steps=(steps,)), steps, batch


def _experiments(config: Config, plan: Plan) -> Iterator[Experiment]:
    for dtype in dtypes_of(config, plan):
        model = dataclasses.replace(config.model, dtype=dtype)
        yield Experiment.from_config(dataclasses.replace(config, model=model))


def measure(config: Config, plan: Plan, load_params: Callable[[], Any]) -> Iterator[Row]:
    """Measures a plan and yields its rows. load_params: () -> the parameters, called if the plan has samplers."""
    how = programs.How(plan.repeats, plan.peak_tflops, plan.trace)
    mode = plan.peer_mode if plan.peer == "torch" else None
    params = load_params() if plan.samplers else None
    for one in _experiments(config, plan):
        for options, steps, batch in _sampling(plan):
            peer = torch_peer.sampling(one, options.sampler, steps, batch, mode=mode) if mode else None
            yield from programs.sampling(one, params, options, batch, how=how, peer=peer)
        if plan.train:
            peer = torch_peer.training(one, mode=mode) if mode else None
            yield from programs.training(one, how=how, peer=peer)
        yield from capacity.largest_batches(one, plan.fit)
    if plan.data:
        yield from programs.data(config, repeats=plan.repeats)


def compile_for(config: Config, plan: Plan, name: str) -> Iterator[Row]:
    """The rows of a plan's samplers and train step, each compiled for a TPU topology as it is taken; runs nothing.

    Raises UsageError, at once, for a topology that is not known or devices that do not divide a batch.
    """
    devices = topology.describe_topology(name)
    for _, _, batch in _sampling(plan):
        if batch % len(devices):
            use = sharding.round_up(batch, len(devices))
            raise UsageError(f"--batch-sizes {batch} is not divisible by the {len(devices)} chips; use {use}")

    def rows() -> Iterator[Row]:
        for one in _experiments(config, plan):
            if plan.train:
                yield topology.compile_training(one, devices)
            for options, _, batch in _sampling(plan):
                yield topology.compile_sampling(one, options, batch, devices)

    return rows()


def write_json(path: str, config: Config, rows: list[Row], environment: dict[str, Any]) -> None:
    """Writes the rows with the command, the config, the hardware and the versions as one JSON object."""
    command = shlex.join([program(), *sys.argv[1:]])
    content = {"command": command, "config": to_json(config), "environment": environment, "rows": rows}
    try:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(epath.Path(path), json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error}); choose another path") from None
