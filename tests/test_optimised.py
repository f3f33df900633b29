"""Part of the tests once more, at the optimisation level that users run: all others run without (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

# Networks, gradients, a sampler and the bound, each against its reference in float64.
AGAIN = [
    "test_unet.py::test_network_matches_numpy",
    "test_unet.py::test_attention_block_matches_numpy_and_has_one_head",
    "test_convolution.py::test_gradients_in_a_scan_match_the_plain_convolution_outside",
    "test_training.py::test_optimizer_is_clip_adam_warmup_and_flat_ema",
    "test_samplers.py::test_the_papers_chain_samples_gaussian_data_with_the_right_mean_and_variance",
    "test_likelihood.py::test_bound_of_gaussian_data_has_the_expected_terms",
    "test_losses.py::test_losses_have_their_closed_form",
    "test_fusion.py::test_the_program_that_jaxlib_computes_wrongly_is_right_with_its_product_apart",
]


def test_numbers_are_right_at_the_optimisation_level_that_users_run():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *AGAIN],
        cwd=TESTS,
        env=os.environ | {"DDPM_JAX_TESTS_OPTIMISED": "1", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
