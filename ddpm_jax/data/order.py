"""The order of the images: a pure function of (seed, step), for any number of devices and processes.

The order of epoch e is the permutation that sorts the 64-bit words of Philox(seed, e). Batches are cut from the sequence of all
epochs, so a batch may span two. A run can resume at any step without stored state.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` images in one epoch, int64 (size,): a stable argsort of Philox words.

    It does not depend on NumPy's version, unlike `Generator.permutation`.
    """
    words = np.random.Philox(key=[seed, epoch]).random_raw(size)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(seed: int, first_step: int, num_steps: int, batch_size: int, size: int) -> np.ndarray:
    """The images of the steps from first_step on: int64 (num_steps, batch_size), in 0 .. size-1."""
    places = np.arange(first_step * batch_size, (first_step + num_steps) * batch_size)
    epochs = places // size
    indices = np.empty_like(places)
    for epoch in range(epochs[0], epochs[-1] + 1):
        inside = epochs == epoch
        indices[inside] = epoch_order(seed, int(epoch), size)[places[inside] % size]
    return indices.reshape(num_steps, batch_size)
