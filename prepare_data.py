"""Prepares or checks a data set: python prepare_data.py tfds:cifar10; python prepare_data.py SOURCE --check

SOURCE is what data.source takes: a folder or a zip file of pictures, or tfds:NAME[:split].
"""

from ddpm_jax.commands.cli import run

if __name__ == "__main__":
    run("prepare_data")
