"""Image data: sources, the order of images, and batches on the devices."""

from ddpm_jax.data.batches import make_feed
from ddpm_jax.data.order import batch_indices, epoch_order
from ddpm_jax.data.sources import SOURCES, Source, open_source

__all__ = ["SOURCES", "Source", "batch_indices", "epoch_order", "make_feed", "open_source"]
