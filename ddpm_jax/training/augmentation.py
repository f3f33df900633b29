"""Random flips and turns of training images, by draws made before, so that they depend on neither devices nor batches' parts."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddpm_jax.config import TrainConfig

Images = Float[Array, "B H W C"]


def augment(
    options: TrainConfig, x_0: Images, flip: Bool[Array, " B"], flip_ud: Bool[Array, " B"], turn: Int[Array, " B"]
) -> Images:
    """The images after the augmentations that the options switch on.

    Args:
        options: train.flip, train.flip_ud and train.turn.
        x_0: The images; square for train.turn.
        flip: Which images are mirrored left to right.
        flip_ud: Which images are mirrored top to bottom, after that.
        turn: How many quarter turns, 0 to 3 and counterclockwise, each image makes last.

    Returns:
        Images of the same shape.
    """

    def where(chosen, changed):
        return jnp.where(chosen[:, None, None, None], changed, x_0)

    if options.flip:
        x_0 = where(flip, x_0[:, :, ::-1])
    if options.flip_ud:
        x_0 = where(flip_ud, x_0[:, ::-1])
    if options.turn:
        x_0 = where(turn >= 2, x_0[:, ::-1, ::-1])
        x_0 = where(turn % 2 == 1, x_0.swapaxes(1, 2)[:, ::-1])
    return x_0
