"""What is measured: options, which are known before JAX is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ddpm_jax.benchmark.comparison import FEWEST
from ddpm_jax.config import Config
from ddpm_jax.core.errors import UsageError
from ddpm_jax.core.options import POSITIVE, Bounds, Flag, check_bounds
from ddpm_jax.generation.options import SAMPLER

OF_RUNS = ("peer", "peer_mode", "peak_tflops", "fit", "trace")  # of one version on the device that is there
DType = Literal["float32", "bfloat16"]
DEFAULTS = Path(__file__).with_name("defaults.py")  # a config file


@dataclass(frozen=True)
class Plan:
    """Every combination of samplers, steps, batch sizes and dtypes, and other measurements."""

    samplers: tuple[Annotated[str, SAMPLER], ...] = ("ancestral", "ddim")
    """Samplers to take; with no name after it: none."""
    steps: Annotated[tuple[int, ...], Bounds(1, 10**6)] = (50,)
    """How many of the T steps they visit."""
    batch_sizes: Annotated[tuple[int, ...], Bounds(1, 10**6)] = (1, 16)
    """Images sampled together."""
    dtypes: Annotated[tuple[DType, ...], tyro.conf.arg(help_behavior_hint="(default: the config's)")] = ()
    """What the network computes in."""
    repeats: Annotated[int, Bounds(1, 10**4)] = 5
    """Timed runs of each program, after the one that warms it up."""
    train: Flag = False
    """Also measure the train step, at train.batch_size."""
    data: Flag = False
    """Also measure the feed of batches, beside a bare NumPy gather or, of pictures decoded at every step, Pillow alone."""
    peer: Literal["none", "torch"] = "none"
    """Run the same in PyTorch with diffusers, in turn with ours (extra `parity`)."""
    peer_mode: Literal["max-autotune", "default"] = "max-autotune"
    """How torch.compile compiles that on a GPU; max-autotune gives the fastest program, after minutes."""
    fit: Annotated[
        tuple[int, ...], Bounds(1, 10**5), tyro.conf.arg(metavar="GIB ...", help_behavior_hint="(default: none)")
    ] = ()
    """Also find the largest train.batch_size for devices of so many GiB, by compiling the train step and running nothing."""
    trace: Annotated[str, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = ""
    """Also profile one run of each program: FOLDER gets the profile, and a JSON file of its time by kernel and by part of the
    network."""
    peak_tflops: Annotated[
        float | None, POSITIVE, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: that of the device)")
    ] = None
    """Peak of one device, where it is not known here."""


def dtypes_of(config: Config, plan: Plan) -> tuple[DType, ...]:
    """What the network computes in: as the plan says, or else the config."""
    return plan.dtypes or (config.model.dtype,)


def check_plan(plan: Plan, *, compiling: bool = False, comparing: bool = False) -> None:
    """Raises UsageError for a plan that cannot be carried out, whatever the config.

    compiling: the plan is for `compile_for`, so options of running are refused.
    comparing: the plan is for two versions, whose times alone are compared.
    """
    for name in (*OF_RUNS, "repeats", "data") if compiling else ():
        _refuse(plan, name, "--compile-for, which runs nothing")
    for name in OF_RUNS if comparing else ():
        _refuse(plan, name, "--against, which compares two versions' seconds")
    if comparing and plan.repeats < FEWEST:
        raise UsageError(f"--repeats {plan.repeats} is too small for --against; use {FEWEST} or more")
    check_bounds(plan)
    if plan.samplers and not (plan.steps and plan.batch_sizes):
        raise UsageError("--steps or --batch-sizes has no value; give at least one for each")
    if not (plan.samplers or plan.train or plan.data or plan.fit):
        raise UsageError("there is nothing to measure; give --samplers a name, or add --train, --data or --fit")
    if plan.peer_mode != Plan.peer_mode and plan.peer == "none":
        raise UsageError(f"--peer-mode {plan.peer_mode} has no effect without --peer torch; leave it out, or give both")


def _refuse(plan: Plan, name: str, what: str) -> None:
    if getattr(plan, name) != getattr(Plan(), name):
        raise UsageError(f"--{name.replace('_', '-')} has no meaning for {what}")
