"""Batches for the compiled steps: from a data set on the devices, which then only gets places, or from the host."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from ddpm_jax import room, sharding
from ddpm_jax.config import Config
from ddpm_jax.data.order import batch_indices
from ddpm_jax.data.sources import Source
from ddpm_jax.errors import UsageError

DEVICE_CACHE_BYTES = 2**30
AHEAD = 2  # dispatches that the host reads while the devices compute

Feed = Callable[[int, int], tuple[Array, Array | None]]


def on_device(config: Config, source: Source) -> bool:
    """Whether the data set is kept on the devices: data.cache, where auto means up to 1 GiB."""
    if config.data.cache == "auto":
        return source.images.nbytes <= DEVICE_CACHE_BYTES
    return config.data.cache == "device"


def make_feed(config: Config, source: Source, mesh: Mesh) -> Feed:
    """(first_step, num_steps) -> what `make_train_step`'s function takes after the state; the same batches for any cache.

    Raises UsageError where the data set has no room on the devices, or the batches none on the host. What it returns raises
    PictureError at the step that takes a picture which cannot be decoded.
    """
    batch_size, size = config.train.batch_size, len(source)
    layout = sharding.split(mesh, axis=1)

    def indices(first_step, num_steps):
        return batch_indices(config.seed, first_step, num_steps, batch_size, size)

    if on_device(config, source):
        assert isinstance(source.images, np.ndarray)  # open_source decodes what goes to the devices
        _check_devices(source.images.nbytes, mesh)
        dataset = _put(source.images, sharding.replicated(mesh))

        def places(first_step, num_steps):
            return _put(indices(first_step, num_steps).astype(np.int32), layout), dataset

        return places

    dispatch = config.train.steps_per_dispatch * batch_size * source.images.nbytes // size
    room.check_memory(
        (1 + AHEAD) * dispatch * len(mesh.local_devices) // mesh.devices.size,
        f"reading {1 + AHEAD} dispatches ahead, of {config.train.steps_per_dispatch} batches of {batch_size} images each,",
        "lower train.batch_size, train.steps_per_dispatch or data.image_size",
    )

    def images(first_step, num_steps):
        wanted = indices(first_step, num_steps)

        def read(part):  # the steps and places of one device; other processes' devices are not asked for here
            chosen = wanted[part[:2]]
            return source.read(chosen.reshape(-1)).reshape(*chosen.shape, *source.images.shape[1:])

        return jax.make_array_from_callback((*wanted.shape, *source.images.shape[1:]), layout, read), None

    return read_ahead(images, config.train.steps)


def _check_devices(needed: int, mesh: Mesh) -> None:
    """Raises UsageError where a data set of `needed` bytes has no room on this process's devices, as far as they tell."""
    remedy = "use --data.cache host"
    if mesh.devices.flat[0].platform == "cpu":  # whose memory is the host's
        room.check_memory(needed, "the data set on the devices", remedy)
    for device in mesh.local_devices:
        stats = device.memory_stats() or {}
        free = stats.get("bytes_limit", 0) - stats.get("bytes_in_use", 0)
        if "bytes_limit" in stats and needed > free:
            raise UsageError(
                f"the data set needs {room.gib(needed)} on each device, and {room.gib(free)} are free on {device}; {remedy}"
            )


def _put(array: np.ndarray, layout: NamedSharding) -> Array:
    """The array on the devices; each process puts the parts of its own (device_put would refuse those of others)."""
    return jax.make_array_from_callback(array.shape, layout, lambda part: array[part])


def read_ahead(feed: Feed, end: int) -> Feed:
    """The same feed, which begins with the dispatches that follow the one asked for, up to step `end`, in other threads.

    What they raise is raised when they are asked for.
    """
    threads = ThreadPoolExecutor(2)  # so that the next is begun where all that is left of one is its last pictures
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
