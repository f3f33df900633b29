"""Samples images from a run: python sample.py WORKDIR --num-images 64 --seed 0 --out samples"""

import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from etils import epath
from tqdm import tqdm

from ddpm_jax import cli
from ddpm_jax.errors import UsageError
from ddpm_jax.generate import generate_batches, make_generator, sample_key
from ddpm_jax.reporting import enlarge, grid, png_bytes
from ddpm_jax.workdir import load_run


@dataclass(frozen=True)
class Arguments:
    """Sample images from a run: single PNGs, a grid of the first 64 and an .npz of all, uint8."""

    num_images: int = 64
    """How many images; image i of a seed is the same in any number of them."""
    seed: int = 0
    """Seed of every draw, 0 to 4294967295."""
    out: str = ""
    """Folder that the images are written to; default WORKDIR/generated/STEP_SEED."""
    weights: Literal["ema", "raw"] = "ema"
    """The moving average of the parameters, or the parameters themselves."""
    step: int | None = None
    """The checkpoint's step; default the newest."""
    batch_size: int = 64
    """Images computed together; changes speed only."""
    unverified: bool = False
    """Use the checkpoint even if its manifest is missing or does not match."""


def main() -> None:
    """Parses the command line, samples and writes."""
    if {"-h", "--help"} & set(sys.argv):
        tyro.cli(Arguments, prog="sample.py WORKDIR", args=["--help"])
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise UsageError("no workdir was given; run sample.py WORKDIR, and sample.py --help for the options")
    workdir = sys.argv[1]
    arguments = tyro.cli(Arguments, prog=f"sample.py {workdir}", args=sys.argv[2:])
    for name in ("num_images", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is too small; use 1 or more")
    if not 0 <= arguments.seed < 2**32:
        raise UsageError(f"--seed {arguments.seed} is outside of 0 .. 4294967295; choose another")
    run = load_run(workdir, step=arguments.step, weights=arguments.weights, unverified=arguments.unverified)
    out = epath.Path(arguments.out or f"{workdir}/generated/step_{run.step}_seed_{arguments.seed}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    batches = generate_batches(
        make_generator(run.config, run.mesh),
        run.params,
        sample_key(arguments.seed),
        range(arguments.num_images),
        batch_size=arguments.batch_size,
        num_devices=run.mesh.devices.size,
    )
    done = []
    with tqdm(total=arguments.num_images, unit="image") as bar:
        for indices, images in batches:
            for i, image in zip(indices, images, strict=True):
                (out / f"{i:06d}.png").write_bytes(png_bytes(image))
            done.append(images)
            bar.update(len(images))
    every = np.concatenate(done)
    with (out / "images.npz").open("wb") as file:
        np.savez(file, images=every)
    (out / "grid.png").write_bytes(png_bytes(enlarge(grid(every[:64]))))
    print(f"{len(every)} images of step {run.step}: {out}/images.npz; the first ones side by side: {out}/grid.png")


if __name__ == "__main__":
    cli.run(main)
