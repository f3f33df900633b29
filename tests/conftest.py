"""Strict switches for every test: shapes checked, rank promotion and reused keys refused, eight CPU devices."""

import gc
import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if "DDPM_JAX_TESTS_OPTIMISED" not in os.environ:  # as test_optimised.py sets it
    # Compiling is most of what the tests cost; the optimisation of kernels is not what they are about.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"

from jaxtyping import install_import_hook

# Modules of pure functions only: a pytree's class is rebuilt with tracers and None inside, which checks must not see.
CHECKED = (
    "ddpm_jax.diffusion.process",
    "ddpm_jax.diffusion.bound",
    "ddpm_jax.diffusion.losses",
    "ddpm_jax.core.rng",
)
install_import_hook(CHECKED, "beartype.beartype")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
# Programs that several tests compile are compiled once, also over the workers of pytest-xdist and from run to run.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "compiled"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

# Tracing makes very many objects. Python's collector would visit them, and all that is imported, again and again.
gc.freeze()
gc.set_threshold(50_000, 10, 10)


def pytest_configure(config):
    """Turns off kernels that are slow to compile, in the default suite alone, before JAX starts its backend.

    The slow tests keep them. They hold programs of different lengths to the same bits, which these kernels decide.
    """
    quick = config.option.markexpr == "not slow" and "DDPM_JAX_TESTS_OPTIMISED" not in os.environ
    if quick and importlib.metadata.version("jaxlib").startswith("0.10."):  # 0.12 ends the process at the first one
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_experimental_ynn_fusion_type="


@pytest.fixture
def x64():
    """Runs a test in float64."""
    with jax.enable_x64(True):
        yield
