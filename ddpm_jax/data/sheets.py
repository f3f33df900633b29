"""uint8 images as pictures to look at: side by side on a sheet, enlarged, as PNG."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def to_pil(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A uint8 image of 1 or 3 channels as a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png_bytes(image: UInt8[np.ndarray, "H W C"]) -> bytes:
    """A uint8 image of 1 or 3 channels as a PNG file's content."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def grid(
    images: UInt8[np.ndarray, "N H W C"], *, columns: int | None = None, gap: int = 1
) -> UInt8[np.ndarray, "h w C"]:
    """Images side by side, row by row, with `gap` black pixels between; as square as their number allows by default."""
    N, H, W, C = images.shape
    columns = columns or int(np.ceil(np.sqrt(N)))
    rows = -(-N // columns)
    sheet = np.zeros((rows * (H + gap) - gap, columns * (W + gap) - gap, C), np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (H + gap), i % columns * (W + gap)
        sheet[y : y + H, x : x + W] = image
    return sheet


def enlarge(image: UInt8[np.ndarray, "H W C"], *, smallest: int = 512) -> UInt8[np.ndarray, "h w C"]:
    """Repeats pixels until the image is at least about `smallest` pixels high, so that small images can be looked at."""
    factor = max(1, smallest // image.shape[0])
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
