"""A lower bound of the memory that training needs, computed from the config alone, without tracing or compiling.

A config that fits is never refused, since every number is a lower bound.
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from ddpm_jax.config import Config, num_labels
from ddpm_jax.core import room, sharding
from ddpm_jax.data.conditions import conditioning_of
from ddpm_jax.training.weights import tracked

FLOAT32 = 4  # bytes
STATE_COPIES = 4  # parameters, their EMA, Adam's two moments; further averages are counted by the config
INCEPTION_FEATURES = 2048

SMALLER_NETWORK = "lower model.ch, model.ch_mult or model.num_res_blocks, or split the state by train.fsdp"
SMALLER_BATCH = "lower train.batch_size or data.image_size, or raise train.accumulation"
SMALLER_EVALUATION = "lower train.batch_size or data.image_size"
SMALLER_GRID = "lower train.num_samples or data.image_size"
FEWER_SAMPLES = "lower train.eval_samples"


class Layer(NamedTuple):
    """A layer of the U-Net. size: (height, width) of its output."""

    kind: Literal["conv", "block", "attention"]
    size: tuple[int, int]
    channels_in: int
    channels: int

    @property
    def params(self) -> int:
        """The number of parameters, without a block's projection of the time embedding."""
        i, o = self.channels_in, self.channels
        shortcut = i * o + o if i != o else 0
        block = 2 * i + 9 * i * o + o + 2 * o + 9 * o * o + o + shortcut
        return {"conv": 9 * i * o + o, "attention": 2 * i + 4 * (i * o + o), "block": block}[self.kind]

    @property
    def values(self) -> int:
        """The number of values of its output for one image."""
        return math.prod(self.size) * self.channels

    def kept(self, remat: bool) -> int:
        """The number of values for one image that a block or attention keeps for the backward pass."""
        if remat:  # a block's input, which is the output of the layer before
            return self.values if self.kind == "block" else 0
        norms = math.prod(self.size) * (self.channels_in + self.channels)  # their inputs
        return {"conv": 0, "attention": 3 * self.values, "block": norms}[self.kind]  # of attention q, k and v


def _block(config: Config, size: tuple[int, int], channels_in: int, channels: int) -> Iterator[Layer]:
    yield Layer("block", size, channels_in, channels)
    if min(size) in config.model.attn_resolutions:
        yield Layer("attention", size, channels, channels)


def down_layers(config: Config) -> Iterator[Layer]:
    """The layers of the way down."""
    model, size, c = config.model, config.data.size, config.model.ch
    conditioning = conditioning_of(config.data)
    yield Layer("conv", size, config.data.channels + (conditioning.shape[-1] if conditioning else 0), c)
    for i, mult in enumerate(model.ch_mult):
        if i:
            size = size[0] // 2, size[1] // 2
            yield Layer("conv", size, c, c)
        for _ in range(model.num_res_blocks):
            yield from _block(config, size, c, c := model.ch * mult)


def skips(config: Config) -> list[Layer]:
    """The layers whose outputs, or those of their attention, are skip connections."""
    return [layer for layer in down_layers(config) if layer.kind != "attention"]


def layers(config: Config) -> Iterator[Layer]:
    """The layers of the config's U-Net in the order of `ddpm_jax.models.unet.UNet`, without the time embedding's."""
    yield from down_layers(config)
    model, left = config.model, skips(config)
    size, c = left[-1].size, left[-1].channels
    yield from (Layer("block", size, c, c), Layer("attention", size, c, c), Layer("block", size, c, c))
    for i, mult in reversed(list(enumerate(model.ch_mult))):
        for _ in range(model.num_res_blocks + 1):
            yield from _block(config, size, c + left.pop().channels, c := model.ch * mult)
        if i:
            size = size[0] * 2, size[1] * 2
            yield Layer("conv", size, c, c)
    learned = config.diffusion.variance in ("learned", "learned_range")
    yield Layer("conv", size, c, config.data.channels * (2 if learned else 1))


def count_params(config: Config) -> int:
    """The exact number of parameters of the config's U-Net."""
    ch, last = config.model.ch, config.model.ch * config.model.ch_mult[0]
    temb = ch * 4 * ch + 4 * ch + (4 * ch) ** 2 + 4 * ch
    projections = sum(4 * ch * layer.channels + layer.channels for layer in layers(config) if layer.kind == "block")
    labels = num_labels(config) * 4 * ch
    return temb + labels + projections + sum(layer.params for layer in layers(config)) + 2 * last  # norm_out


class Need(NamedTuple):
    """Bytes that one device holds at once in a phase of training. parts: bytes by the remedy that lowers them."""

    what: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def needs(config: Config, num_devices: int) -> list[Need]:
    """The least memory that each phase of training needs on each device. num_devices: devices of all processes."""
    train, data = config.train, config.data
    image = math.prod(data.size) * data.channels
    computed = np.dtype("float16").itemsize if config.model.dtype == "bfloat16" else FLOAT32
    for_gradient = computed * sum(layer.kept(config.model.remat) for layer in layers(config))
    for_output = computed * sum(layer.values for layer in skips(config))  # all held at the middle
    params = FLOAT32 * count_params(config)
    state = (STATE_COPIES + len(tracked(train))) * params // train.fsdp
    batch = train.batch_size // num_devices  # `config.check` ensures that it divides
    images = batch * train.steps_per_dispatch * min(FLOAT32, image)  # indices into the data set, or the images
    found = [
        Need(
            f"a training step of {count_params(config):,} parameters and batch {train.batch_size:,}",
            {
                SMALLER_NETWORK: state + params // train.fsdp,  # and the gradient
                SMALLER_BATCH: images + batch * image * FLOAT32 + batch // train.accumulation * for_gradient,
            },
        )
    ]
    if train.eval_every:
        evaluated = {SMALLER_NETWORK: state, SMALLER_EVALUATION: batch * for_output}
        if train.eval_samples:
            features = INCEPTION_FEATURES if train.eval_features == "inception" else image
            evaluated[FEWER_SAMPLES] = train.eval_samples * features * FLOAT32 // num_devices  # on the host
        found.append(Need(f"an evaluation with batch {train.batch_size:,}", evaluated))
    if train.sample_every or (train.eval_every and train.eval_samples):
        drawn = -(-train.num_samples // num_devices)
        grid = {SMALLER_NETWORK: state, SMALLER_GRID: drawn * (for_output + image * FLOAT32)}
        found.append(Need(f"a grid of train.num_samples={train.num_samples:,} images", grid))
    return found


def check_training(config: Config, mesh: Mesh) -> None:
    """Raises UsageError if the mesh's devices cannot hold the training of a config that `config.check` accepts.

    All processes must call it, and all raise if process 0 does.
    """
    need = max(needs(config, mesh.devices.size), key=lambda need: need.total)
    remedy = max(need.parts, key=lambda part: need.parts[part])
    sharding.first_decides(lambda: room.check_devices(mesh.local_devices, need.total, need.what, remedy))
