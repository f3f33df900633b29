"""uint8 images as pictures to look at: grids, enlargement, PNG.

A grid shows the first three channels of images with more, and the first of two.
"""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def to_pil(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A uint8 image of 1 or 3 channels as a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png_bytes(image: UInt8[np.ndarray, "H W C"]) -> bytes:
    """A uint8 image of 1 or 3 channels, encoded as PNG."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def grid(
    images: UInt8[np.ndarray, "N H W C"], *, columns: int | None = None, gap: int = 1
) -> UInt8[np.ndarray, "h w c"]:
    """A grid of images, row by row, with `gap` black pixels between them. By default it is as square as possible.

    It has 1 or 3 channels.
    """
    images = images[..., : 3 if images.shape[-1] >= 3 else 1]
    N, H, W, C = images.shape
    columns = columns or int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    sheet = np.zeros((rows * (H + gap) - gap, columns * (W + gap) - gap, C), np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = image
    return sheet


def beside(
    left: UInt8[np.ndarray, "N H W C"], right: UInt8[np.ndarray, "N H W C"], *, gap: int = 4
) -> UInt8[np.ndarray, "h w c"]:
    """The grids of two sets of equally many images, side by side, with `gap` white columns between them."""
    sheets = grid(left), grid(right)
    between = np.full((sheets[0].shape[0], gap, sheets[0].shape[2]), 255, np.uint8)
    return np.concatenate([sheets[0], between, sheets[1]], axis=1)


def enlarge(image: UInt8[np.ndarray, "H W C"], *, smallest: int = 512) -> UInt8[np.ndarray, "h w C"]:
    """Repeats pixels by a whole factor, so that the image is about `smallest` pixels high if it was smaller."""
    factor = max(1, smallest // image.shape[0])
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
