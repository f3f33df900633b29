"""Samples images from a run: ddpm-jax sample WORKDIR --num-images 64 --seed 0 --out samples"""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from etils import epath

from ddpm_jax.core import sharding
from ddpm_jax.core.errors import UsageError, program
from ddpm_jax.core.rng import check_seed
from ddpm_jax.generation.animation import write_animation
from ddpm_jax.generation.generator import LAST_IMAGE, SamplerOptions
from ddpm_jax.generation.image_set import Format, generate_set
from ddpm_jax.training.workdir import load_run


@dataclass(frozen=True)
class Arguments:
    """Sample images from a run. The same command resumes an incomplete set."""

    num_images: int = 64
    """Number of images; image i of a seed does not depend on it."""
    first_image: int = 0
    """Index of the first image, to make a set in several pieces."""
    seed: int = 0
    """Seed of every draw, 0 to 4294967295."""
    out: str = ""
    """Folder that the images are written to; default WORKDIR/generated/ and a name by step and options."""
    format: Format = "both"
    """Single PNGs, one images.npz, both, or one npz shard per batch, for sets too large for one file."""
    animation: Literal["none", "gif", "webp"] = "none"
    """Also write OUT/process.gif or .webp: the reverse process of the first images, 64 or --batch-size."""
    options: Annotated[SamplerOptions, tyro.conf.arg(name="")] = field(default_factory=SamplerOptions)
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the parameters, or the parameters themselves."""
    step: int | Literal["best"] | None = None
    """The checkpoint's step, or best, by train.keep_best; default the newest."""
    batch_size: int = 64
    """Images computed together; changes speed only."""
    distributed: bool = False
    """Join the other processes of a multi-host run (see docs/parallelism.md)."""
    unverified: bool = False
    """Use the checkpoint even if its manifest is missing or does not match."""


def default_name(step: int, arguments: Arguments) -> str:
    """A folder's name by step and options other than the defaults: step_40_ema_ddim_steps_50_eta_0.2_seed_0."""
    options, default = arguments.options, SamplerOptions()
    parts: list[object] = ["step", step, arguments.weights, options.sampler]
    for name in ("steps", "spacing", "eta", "clip"):
        value = getattr(options, name)
        if value != getattr(default, name):
            parts += [name, "-".join(map(str, value)) if isinstance(value, tuple) else value]
    parts += ["seed", arguments.seed]
    if arguments.first_image:
        parts += ["from", arguments.first_image]
    return "_".join(map(str, parts))


def main() -> None:
    """Parses the command line, samples and writes the images."""
    if {"-h", "--help"} & set(sys.argv):
        tyro.cli(Arguments, prog=f"{program()} WORKDIR", args=["--help"])
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UsageError(f"no workdir was given; run {program()} WORKDIR, and {program()} --help for the options")
    workdir = sys.argv[1]
    arguments = tyro.cli(Arguments, prog=f"{program()} {workdir}", args=sys.argv[2:])
    for name, smallest in (("num_images", 1), ("batch_size", 1), ("first_image", 0)):
        if getattr(arguments, name) < smallest:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} {getattr(arguments, name)} is too small; use {smallest} or more")
    if arguments.first_image + arguments.num_images > LAST_IMAGE:
        raise UsageError(f"--first-image and --num-images go beyond image {LAST_IMAGE}; choose smaller ones")
    check_seed(arguments.seed)
    if arguments.distributed:
        sharding.start_processes()
    run = load_run(workdir, step=arguments.step, weights=arguments.weights, unverified=arguments.unverified)
    out = epath.Path(arguments.out or f"{workdir}/generated/{default_name(run.step, arguments)}")
    indices = range(arguments.first_image, arguments.first_image + arguments.num_images)
    generate_set(
        run,
        out,
        indices,
        seed=arguments.seed,
        options=arguments.options,
        batch_size=arguments.batch_size,
        format=arguments.format,
    )
    if arguments.animation != "none":
        write_animation(
            run,
            out / f"process.{arguments.animation}",
            indices,
            seed=arguments.seed,
            options=arguments.options,
            batch_size=arguments.batch_size,
        )
    print(f"{len(indices)} images of step {run.step} are in {out}; the first ones side by side: {out}/grid.png")
