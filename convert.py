"""Weights in and out: python convert.py --help lists the ways"""

from ddpm_jax.commands.cli import run

if __name__ == "__main__":
    run("convert")
