"""Samples images from a run: ddpm-jax sample WORKDIR --num-images 64 --seed 0 --out samples"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from ddpm_jax.commands.arguments import Sample
from ddpm_jax.core import sharding
from ddpm_jax.generation.animation import write_animation
from ddpm_jax.generation.generator import with_guide
from ddpm_jax.generation.given import with_given
from ddpm_jax.generation.image_set import generate_set
from ddpm_jax.generation.options import GivenOptions, SamplerOptions
from ddpm_jax.training.weights import file_part
from ddpm_jax.training.workdir import folder_of_outputs, load_run

NUM_IMAGES = 64  # if neither the command line nor pictures given say how many


def default_name(step: int, arguments: Sample) -> str:
    """A folder's name by step and options other than the defaults: step_40_ema_ddim_steps_50_eta_0.2_seed_0."""
    options, default = arguments.sampler, SamplerOptions()
    parts: list[object] = ["step", step, file_part(arguments.parameters.weights), options.sampler]
    for name in (f.name for f in dataclasses.fields(options) if f.name != "sampler"):
        value = getattr(options, name)
        if value != getattr(default, name):
            value = "-".join(map(str, value)) if isinstance(value, tuple) else value
            parts += [name, file_part(str(value))]
    for name, value in _given(arguments.given):
        parts += [name, file_part(value)]
    parts += ["seed", arguments.seed]
    if arguments.first_image:
        parts += ["from", arguments.first_image]
    return "_".join(map(str, parts))


def _given(options: GivenOptions) -> Iterator[tuple[str, str]]:
    """The options of given pictures that are no defaults, and the names of the pictures without their folders."""
    for each in dataclasses.fields(options):
        value, default = getattr(options, each.name), each.default
        if value != default:
            words = value if isinstance(value, tuple) else (str(value),)
            yield each.name, "-".join(Path(word).name for word in words)


def main(arguments: Sample) -> None:
    """Samples and writes the images."""
    if arguments.distributed:
        sharding.start_processes()
        sharding.check_same(dataclasses.asdict(arguments))
    run = with_guide(load_run(arguments.workdir, **dataclasses.asdict(arguments.parameters)), arguments.sampler)
    run = with_given(run, arguments.given, arguments.num_images)
    out = epath.Path(arguments.out or f"{folder_of_outputs(arguments.workdir)}/{default_name(run.step, arguments)}")
    num_images = arguments.num_images or (run.given and run.given.count) or NUM_IMAGES
    indices = range(arguments.first_image, arguments.first_image + num_images)
    generate_set(
        run,
        out,
        indices,
        seed=arguments.seed,
        options=arguments.sampler,
        batch_size=arguments.batch_size,
        format=arguments.format,
    )
    if arguments.animation != "none":
        write_animation(
            run,
            out / f"process.{arguments.animation}",
            indices,
            seed=arguments.seed,
            options=arguments.sampler,
            batch_size=arguments.batch_size,
        )
    if run.note:
        print(f"Note: {run.note}.")
    print(f"{len(indices)} images of step {run.step} are in {out}; the first ones side by side: {out}/grid.png")
