"""Samples images from a run: ddpm-jax sample WORKDIR --num-images 64 --seed 0 --out samples"""

import dataclasses
import re

from etils import epath

from ddpm_jax.commands.arguments import Sample
from ddpm_jax.core import sharding
from ddpm_jax.generation.animation import write_animation
from ddpm_jax.generation.generator import with_guide
from ddpm_jax.generation.image_set import generate_set
from ddpm_jax.generation.options import SamplerOptions
from ddpm_jax.training.weights import file_part
from ddpm_jax.training.workdir import folder_of_outputs, load_run


def default_name(step: int, arguments: Sample) -> str:
    """A folder's name by step and options other than the defaults: step_40_ema_ddim_steps_50_eta_0.2_seed_0."""
    options, default = arguments.sampler, SamplerOptions()
    parts: list[object] = ["step", step, file_part(arguments.parameters.weights), options.sampler]
    for name in (f.name for f in dataclasses.fields(options) if f.name != "sampler"):
        value = getattr(options, name)
        if value != getattr(default, name):
            value = "-".join(map(str, value)) if isinstance(value, tuple) else value
            parts += [name, re.sub(r"[^\w.-]+", "-", str(value))]
    parts += ["seed", arguments.seed]
    if arguments.first_image:
        parts += ["from", arguments.first_image]
    return "_".join(map(str, parts))


def main(arguments: Sample) -> None:
    """Samples and writes the images."""
    if arguments.distributed:
        sharding.start_processes()
    run = with_guide(load_run(arguments.workdir, **dataclasses.asdict(arguments.parameters)), arguments.sampler)
    out = epath.Path(arguments.out or f"{folder_of_outputs(arguments.workdir)}/{default_name(run.step, arguments)}")
    indices = range(arguments.first_image, arguments.first_image + arguments.num_images)
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
