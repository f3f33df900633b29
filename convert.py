"""Weights in and out: python convert.py {from-diffusers,from-tensorflow,to-diffusers,export,inception} --help"""

from ddpm_jax.cli import run

if __name__ == "__main__":
    run("convert")
