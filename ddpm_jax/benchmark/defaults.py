"""The default config as a config file, from which every other one can be said in options, to any version."""

from ddpm_jax.config import Config

config = Config()
