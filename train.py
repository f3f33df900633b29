"""Trains a diffusion model: python train.py configs/digits.py --workdir runs/digits [--any.field value]

The same command again continues where the run stopped.
"""

from ddpm_jax.commands.cli import run

if __name__ == "__main__":
    run("train")
