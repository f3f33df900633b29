"""Samples images from a run: python sample.py WORKDIR --num-images 64 --seed 0 --out samples"""

from ddpm_jax.commands.cli import run

if __name__ == "__main__":
    run("sample")
