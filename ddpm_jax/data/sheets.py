"""uint8 images as pictures to look at: grids, enlargement, PNG.

A grid shows the first three channels of images with more, and the first of two.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

COLUMNS = 8
MOST_COLUMNS = 16
DESCRIPTION = "Description"  # PNG's own word for it
LINE, MARGIN = 14, 3  # pixels of a line of text, and beside it


def to_pil(image: UInt8[np.ndarray, "H W C"]) -> Image.Image:
    """A uint8 image of 1 or 3 channels as a Pillow image."""
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def png_bytes(image: UInt8[np.ndarray, "H W C"], description: str = "") -> bytes:
    """A uint8 image of 1 or 3 channels, encoded as PNG. description: kept in the file (`description_of`)."""
    buffer, info = io.BytesIO(), PngInfo()
    if description:
        info.add_itxt(DESCRIPTION, description)
    to_pil(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def description_of(png: bytes) -> str:
    """The description that a PNG of `png_bytes` holds; empty without one, and for a file that is broken or very large."""
    broken = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    with contextlib.suppress(*broken), Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        return str(image.info.get(DESCRIPTION, ""))
    return ""


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


def class_grid(
    images: UInt8[np.ndarray, "N H W C"], labels: Int[np.ndarray, " N"], names: Sequence[str]
) -> UInt8[np.ndarray, "h w c"]:
    """An enlarged grid of images of classes, with their names: left of its rows where each row of 8 is of one class, else above
    its columns, of which each class has one where the labels repeat in turn.

    names: of the classes; their numbers where there are none.
    """
    names = [names[label] if label < len(names) else str(label) for label in labels.tolist()]
    by_row = all(len(set(names[i : i + COLUMNS])) == 1 for i in range(0, len(names), COLUMNS))
    period = next(p for p in range(1, len(labels) + 1) if (labels[p:] == labels[:-p]).all())
    by_column = not by_row and period <= MOST_COLUMNS
    columns = min(len(images), period * max(1, COLUMNS // period) if by_column else COLUMNS)
    tiles = grid(images, columns=columns)
    sheet = to_pil(enlarge(tiles, smallest=512 * tiles.shape[0] // max(tiles.shape[:2])))
    texts = names[:columns] if by_column else names[::COLUMNS] if by_row else []
    left = 2 * MARGIN + max(int(ImageDraw.Draw(sheet).textlength(name)) for name in texts) if by_row else 0
    named = Image.new(sheet.mode, (left + sheet.width, (LINE if by_column else 0) + sheet.height), "white")
    named.paste(sheet, (left, named.height - sheet.height))
    draw = ImageDraw.Draw(named)
    for i, text in enumerate(texts):
        x, y = (0, sheet.height * i // len(texts)) if by_row else (sheet.width * i // len(texts), 0)
        draw.text((x + MARGIN, y), text, fill="black")
    return np.asarray(named).reshape(named.height, named.width, -1)


def beside(left: UInt8[np.ndarray, "h w C"], right: UInt8[np.ndarray, "h w C"]) -> UInt8[np.ndarray, "h w2 C"]:
    """Two grids of equal size side by side, with 4 white columns between them."""
    between = np.full((left.shape[0], 4, left.shape[2]), 255, np.uint8)
    return np.concatenate([left, between, right], axis=1)


def enlarge(image: UInt8[np.ndarray, "H W C"], *, smallest: int = 512) -> UInt8[np.ndarray, "h w C"]:
    """Repeats pixels by a whole factor, so that the image is about `smallest` pixels high if it was smaller."""
    factor = max(1, smallest // image.shape[0])
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
