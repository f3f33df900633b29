"""Encoded pictures (PNG, JPEG, WebP, BMP) and the uint8 images that they are decoded to.

Decoding, in this order:
1. The EXIF orientation is applied. Only the first frame of an animation is used.
2. 16-bit values keep their high byte. Transparent pixels are blended with white. Palettes and CMYK become RGB.
3. For data.channels=1 colours become luma, (299 R + 587 G + 114 B) / 1000; for 3 grey is repeated.
4. The largest centred square is cropped (rounding towards the top left).
5. It is resized to data.image_size with Pillow's bicubic filter, which antialiases when it shrinks.
"""

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from ddpm_jax.core.errors import UsageError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MAX_PIXELS = 2**26  # 8192 x 8192; Pillow warns of a decompression bomb beyond 1.3 times this


class PictureError(UsageError):
    """A picture that cannot be decoded. Attributes: `name` and `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"the picture {name} cannot be decoded ({reason}); mend or remove it, or list all such pictures with "
            "ddpm-jax prepare-data SOURCE --check and leave them out with --data.on-bad-image skip"
        )
        self.name = name
        self.reason = reason


def decode(content: bytes, image_size: int, channels: int) -> UInt8[np.ndarray, "S S C"]:
    """Decodes a picture as the module describes, to uint8 (image_size, image_size, channels).

    Raises ValueError for more than MAX_PIXELS pixels, and any error for a damaged picture.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"its {width} x {height} pixels are more than {MAX_PIXELS:,}")
        ImageOps.exif_transpose(picture, in_place=True)
        plain, mode = _without_depth_and_alpha(picture), "L" if channels == 1 else "RGB"
        # Skip steps that change nothing: Pillow would copy, which takes a tenth of the time of a 256x256 JPEG.
        if plain.mode != mode:
            plain = plain.convert(mode)
        side = min(plain.size)
        left, top = ((length - side) // 2 for length in plain.size)
        box = (left, top, left + side, top + side)
        if side != image_size:
            plain = plain.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
        elif plain.width != plain.height:
            plain = plain.crop(box)
        return np.frombuffer(plain.tobytes(), np.uint8).reshape(image_size, image_size, channels)


def _without_depth_and_alpha(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow itself keeps the high byte of 16-bit colours
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures of a folder, a zip file or a tfds data set.

    Attributes:
        names: The names in messages.
        read: Index -> encoded content; several threads call it.
        labels: () -> int (N,), or None if there are none.
        classes: () -> the classes' names; none if they have no names.
        identity: The fingerprint that a checkpoint records.
        stamp: A second fingerprint, for the cache alone. It changes whenever the content does, and may change more often, since
            it may use times.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    labels: Callable[[], np.ndarray | None]
    identity: dict[str, str | int]
    stamp: str
    classes: Callable[[], Sequence[str]] = tuple


class DecodedPictures:
    """Pictures as a uint8 array (N, S, S, C) whose rows are decoded at each read.

    Threads decode them. Pillow releases the GIL, so processes would only add the cost of moving images between them.
    """

    def __init__(self, pictures: Pictures, *, image_size: int, channels: int, workers: int):
        self.pictures = pictures
        self.shape = (len(pictures.names), image_size, image_size, channels)
        self.nbytes = len(pictures.names) * image_size * image_size * channels
        self._workers = workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers)

    def __len__(self) -> int:
        """The number of pictures."""
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> UInt8[np.ndarray, "n S S C"]:
        """The images at these indices, decoded in parallel. Raises PictureError for the first that fails."""
        images, errors = self.attempts(indices)
        if errors:
            raise errors[0]
        return images

    def attempts(self, indices: Sequence[int] | np.ndarray) -> tuple[UInt8[np.ndarray, "n S S C"], list[PictureError]]:
        """The images at these indices, decoded in parallel, and an error for each that fails, in order.

        Rows of failed images are undefined.
        """
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        errors: dict[int, PictureError] = {}
        rows = iter(enumerate(indices))  # each thread takes the next; a future for each would take more time

        def work():
            for row, i in rows:
                try:
                    images[row] = decode(self.pictures.read(i), *self.shape[2:])
                except Exception as error:  # a damaged picture can raise any error
                    reason = str(error).partition(" <_io.BytesIO")[0]  # Pillow names the buffer, which means nothing
                    errors[row] = PictureError(self.pictures.names[i], reason or type(error).__name__)

        for thread in [self._pool.submit(work) for _ in range(self._workers)]:
            thread.result()
        return images, [errors[row] for row in sorted(errors)]
