"""Measures samplers, the train step and the data feed: python benchmark.py CONFIG-or-WORKDIR --samplers ddim --steps 50"""

from ddpm_jax.commands.cli import run

if __name__ == "__main__":
    run("benchmark")
