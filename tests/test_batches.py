"""Reading ahead of the devices, what that holds in memory, and the order of evaluation; see test_data.py for the batches."""

import threading
import tracemalloc

import numpy as np
from test_data import mesh_of
from test_pictures import RNG, encoded
from tiny import tiny

from ddpm_jax.config import DataConfig
from ddpm_jax.data import batches, pictures, sources


def test_pictures_are_read_ahead_in_another_thread():
    threads, read = [], threading.Semaphore(0)

    def feed(first_step, num_steps):
        threads.append(threading.current_thread())
        read.release()
        return first_step, num_steps

    ahead = batches.read_ahead(feed, end=100)
    assert ahead(4, 2) == (4, 2)
    for _ in range(1 + batches.AHEAD):
        assert read.acquire(timeout=10)
    assert threading.main_thread() not in threads
    assert [ahead(step, 2) for step in (6, 8, 0, 2)] == [(6, 2), (8, 2), (0, 2), (2, 2)]


def test_nothing_is_read_beyond_the_last_step():
    read = threading.Semaphore(0)

    def feed(first_step, num_steps):
        read.release()
        return first_step, num_steps

    ahead = batches.read_ahead(feed, end=8)
    assert ahead(4, 2) == (4, 2)
    assert [read.acquire(timeout=wait) for wait in (10, 10, 0.2)] == [True, True, False]
    assert ahead(6, 2) == (6, 2)
    assert not read.acquire(timeout=0.2)


def test_the_hosts_memory_does_not_grow_with_the_number_of_pictures():
    """Ten times the pictures, each read once: what NumPy and Python hold at most stays the same, but for their order."""
    content = encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG")

    def most_held(size):
        many = pictures.Pictures(range(size), lambda i: bytes(content), lambda: None, {}, "")
        images = pictures.DecodedPictures(many, DataConfig(image_size=64, channels=3, workers=2))
        config = tiny(
            data={"cache": "none", "image_size": 64, "channels": 3}, train={"batch_size": 4, "steps": size // 4}
        )
        tracemalloc.start()
        try:
            feed = batches.make_feed(config, sources.Source(images, lambda: None, {}), mesh_of(1))
            for step in range(size // 4):
                feed(step, 1)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert most_held(400) - most_held(40) < 40 * 64 * 64 * 3
