"""The order of the images: a pure function of (seed, step), the same for any number of devices and processes.

Epoch e is the permutation that sorts the 64-bit words of Philox(seed, e); the epochs are laid end to end and cut into batches,
so the last images of an epoch share a batch with the first of the next. Nothing has to be stored to continue at any step.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` images in one epoch, int64 (size,): a stable argsort of Philox words, fixed across NumPy versions
    (which `Generator.permutation` is not).
    """
    words = np.random.Philox(key=[seed, epoch]).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(seed: int, first_step: int, num_steps: int, batch_size: int, size: int) -> np.ndarray:
    """Which images the steps first_step, ..., first_step + num_steps - 1 take: int64 (num_steps, batch_size) in 0 .. size-1."""
    places = np.arange(first_step * batch_size, (first_step + num_steps) * batch_size)
    epochs = places // size
    indices = np.empty_like(places)
    for epoch in range(epochs[0], epochs[-1] + 1):
        inside = epochs == epoch
        indices[inside] = epoch_order(seed, int(epoch), size)[places[inside] % size]
    return indices.reshape(num_steps, batch_size)


def plain_order(size: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of evaluation: every image once, in its own order, the last batch padded with the last image.

    Returns the indices, int64 (num_batches, batch_size), and a mask of the same shape, False where an image only pads.
    """
    places = np.arange(-(-size // batch_size) * batch_size).reshape(-1, batch_size)
    return np.minimum(places, size - 1), places < size
