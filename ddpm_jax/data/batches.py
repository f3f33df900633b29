"""Batches for the compiled steps: indices into a data set on the devices, or images from the host."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from ddpm_jax.config import Config
from ddpm_jax.core import room, sharding
from ddpm_jax.data.order import batch_indices
from ddpm_jax.data.sources import Source

DEVICE_CACHE_BYTES = 2**30
AHEAD = 2  # dispatches that the host reads while the devices compute

Feed = Callable[[int, int], tuple[Any, Any]]


def on_device(config: Config, source: Source) -> bool:
    """Whether the devices hold the data set: data.cache, where auto means up to 1 GiB."""
    if config.data.cache == "auto":
        return source.rows.nbytes <= DEVICE_CACHE_BYTES
    return config.data.cache == "device"


def make_feed(config: Config, source: Source, mesh: Mesh) -> Feed:
    """Makes the feed of a run: (first_step, num_steps) -> the arguments of the train step after the state.

    The batches do not depend on data.cache.

    Args:
        config: The run's config.
        source: The training images.
        mesh: The devices that the batches are split over.

    Returns:
        The feed: (batches, dataset), as `make_train_step` takes them. It raises PictureError at the step that needs a picture
        that cannot be decoded.

    Raises:
        UsageError: If the data set does not fit on the devices, the batches do not fit on the host, or the images have no
            labels of the config's classes.
    """
    batch_size, size = config.train.batch_size, len(source)
    layout, labels = sharding.split(mesh, axis=1), source.labels_of(config.model.num_classes)
    rows = source.rows

    def indices(first_step, num_steps):
        return batch_indices(config.seed, first_step, num_steps, batch_size, size)

    if on_device(config, source):
        assert isinstance(source.images, np.ndarray)  # open_source has decoded it
        room.check_devices(mesh.local_devices, rows.nbytes, "the data set", "use --data.cache host")
        dataset: Any = _put(rows, sharding.replicated(mesh))
        if labels is not None:
            dataset = dataset, _put(labels, sharding.replicated(mesh))

        def places(first_step, num_steps):
            return _put(indices(first_step, num_steps).astype(np.int32), layout), dataset

        return places

    dispatch = config.train.steps_per_dispatch * batch_size * rows.nbytes // size
    room.check_memory(
        (1 + AHEAD) * dispatch * len(mesh.local_devices) // mesh.devices.size,
        f"reading {1 + AHEAD} dispatches ahead, of {config.train.steps_per_dispatch} batches of {batch_size} images each,",
        "lower train.batch_size, train.steps_per_dispatch or data.image_size",
    )

    def images(first_step, num_steps):
        wanted = indices(first_step, num_steps)

        def read(part):  # one device's steps and indices; called for this process's devices only
            chosen = wanted[part[:2]]
            return source.read_rows(chosen.reshape(-1)).reshape(*chosen.shape, *rows.shape[1:])

        batches = jax.make_array_from_callback((*wanted.shape, *rows.shape[1:]), layout, read)
        return batches if labels is None else (batches, _put(labels[wanted], layout)), None

    return read_ahead(images, config.train.steps)


def _put(array: Any, layout: NamedSharding) -> jax.Array:
    """Puts an array on the devices. Each process puts its own devices' parts, since device_put refuses other processes'."""
    return jax.make_array_from_callback(array.shape, layout, lambda part: array[part])


def read_ahead(feed: Feed, end: int) -> Feed:
    """The feed with read-ahead: threads prepare the next dispatches, up to step `end`.

    An error is raised when its dispatch is requested.
    """
    threads = ThreadPoolExecutor(2)  # the next dispatch starts while the last pictures of one are still decoded
    waiting: dict[tuple[int, int], Future] = {}

    def call(first_step, num_steps):
        following = range(first_step + num_steps, end, num_steps)[:AHEAD]
        wanted = [(step, num_steps) for step in (first_step, *following)]
        for other in waiting.keys() - set(wanted):
            waiting.pop(other).cancel()
        for dispatch in wanted:
            if dispatch not in waiting:
                waiting[dispatch] = threads.submit(feed, *dispatch)
        return waiting.pop(wanted[0]).result()

    return call
