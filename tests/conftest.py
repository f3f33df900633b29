"""Strict switches for every test: shapes checked, rank promotion and reused keys refused, eight CPU devices."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook

# Modules of pure functions only: a pytree's class is rebuilt with tracers and None inside, which checks must not see.
CHECKED = ("ddpm_jax.diffusion", "ddpm_jax.likelihood", "ddpm_jax.losses", "ddpm_jax.rng")
install_import_hook(CHECKED, "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield
