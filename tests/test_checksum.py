"""The checksum of TensorBoard's records is CRC-32C, at every length."""

import numpy as np
import pytest
from tensorboardX import record_writer

from ddpm_jax.training.checksum import ROWS, crc32c, masked_crc32c

CONTENT = np.random.default_rng(0).bytes(2**18)


def test_the_check_value_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4, has the same polynomial
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("length", [0, 1, 1000, 32 * ROWS - 1, 32 * ROWS, 32 * ROWS + 1, 34 * ROWS - 1, 100_001, 2**18])
def test_it_is_what_tensorboard_writes(length):
    assert masked_crc32c(CONTENT[:length]) == record_writer.masked_crc32c(CONTENT[:length])
