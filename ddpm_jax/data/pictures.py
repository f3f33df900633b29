"""Encoded pictures (PNG, JPEG, WebP, BMP, TIFF) and the images that they are decoded to, uint8 or float32.

Decoding, in this order:
1. The EXIF orientation is applied. Only the first frame of an animation is used. A TIFF file of several pages is one image: each
   page, as grey, is a channel.
2. 16-bit values keep their high byte; those of 32 bits must be 0 to 65535, and count like them. Transparent pixels are blended
   with white. Palettes and CMYK become RGB.
3. For data.channels=1 colours become luma, (299 R + 587 G + 114 B) / 1000; for 3 grey is repeated.
4. The largest centred part with the aspect of data.image_size is cropped (rounding towards the top left).
5. It is resized to data.image_size with Pillow's bicubic filter, which antialiases when it shrinks.

With data.value_range the image is grey and float32, on the scale of 16 bits: 16-bit values are kept, those of 8 bits are
multiplied by 257, luma and resized values are not rounded. Values of a TIFF file of 32 bits or with a sign, and floats, are kept
as they are. 16-bit colours and transparency are refused, since Pillow reads their high byte alone.
"""

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Shaped
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin

from ddpm_jax.config import DataConfig
from ddpm_jax.core.errors import UsageError

PAGED = (".tif", ".tiff")  # endings of files that may have several pages
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", *PAGED)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
SIXTEEN_BITS = 65535
FIRST_ON_ITS_SIDE = 5  # of the EXIF orientations 1 to 8
ORIENTED = re.compile(rb"exif|adobe\.xmp", re.IGNORECASE)  # in a PNG that may have an orientation
MAX_PIXELS = 2**26  # 8192 x 8192; Pillow warns of a decompression bomb beyond 1.3 times this


class PictureError(UsageError):
    """A picture that cannot be decoded, or that a sentence says is no good. Attributes: `name`, `reason` and `sentence`."""

    def __init__(self, name: str, reason: str, sentence: str = ""):
        super().__init__(
            sentence
            or f"the picture {name} cannot be decoded ({reason}); mend or remove it, or list all such pictures with "
            "ddpm-jax prepare-data SOURCE --check and leave them out with --data.on-bad-image skip"
        )
        self.name, self.reason, self.sentence = name, reason, sentence


Range = tuple[float, float] | None  # data.value_range


def decode(
    content: bytes, size: tuple[int, int], channels: int, value_range: Range = None
) -> Shaped[np.ndarray, "H W C"]:
    """Decodes a picture as the module describes, to (*size, channels): uint8, or float32 if there is a value_range.

    Raises ValueError for more than MAX_PIXELS pixels, a value outside of the range (without one, of 16 bits), 16-bit colours with
    a range, or other pages than channels, and any error for a damaged picture.
    """
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        pages = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
        _check_pages(pages, channels, value_range)
        if pages == 1:
            return _decode_page(picture, size, channels, value_range)
        images, sizes = [], set()
        for page in range(pages):
            picture.seek(page)
            sizes.add(picture.size)
            images.append(_decode_page(picture, size, 1, value_range))
        if len(sizes) > 1:
            raise ValueError(f"its pages have {len(sizes)} sizes, expected one")
        return np.concatenate(images, axis=-1)


def upright_size(content: bytes) -> tuple[int, int]:
    """The width and height of an encoded picture with its EXIF orientation applied. Raises any error for a damaged picture."""
    with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
        # Pillow has turned the size of a TIFF file itself. It decodes a whole PNG to look for EXIF data after the pixels.
        if picture.format == "TIFF" or (picture.format == "PNG" and not ORIENTED.search(content)):
            return picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= FIRST_ON_ITS_SIDE
        return picture.size[::-1] if turned else picture.size


def _check_pages(pages: int, channels: int, value_range: Range) -> None:
    """Raises ValueError if a picture with so many pages has not so many channels."""
    alone = (1,) if value_range else (1, 3)
    if pages > 1 and pages != channels:
        raise ValueError(f"its {pages} pages are as many channels, expected data.channels={channels}")
    if pages == 1 and channels not in alone:
        raise ValueError(f"it has one page, expected one for each of data.channels={channels}")


def _decode_page(
    picture: Image.Image, size: tuple[int, int], channels: int, value_range: Range
) -> Shaped[np.ndarray, "H W C"]:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"its {width} x {height} pixels are more than {MAX_PIXELS:,}")
    deep = ";16" in str(getattr(picture, "tile", "")) and picture.format != "BMP"  # whose BGR;16 are 16 bits a pixel
    if value_range is not None and not picture.mode.startswith("I") and deep:
        raise ValueError(
            "its colours or its transparency have 16 bits, of which data.value_range needs all and 8 can be read; store it as "
            "grey without transparency"
        )
    ImageOps.exif_transpose(picture, in_place=True)
    if value_range is not None:
        values = np.asarray(_resized(_grey_values(picture, value_range), size))
        return values.clip(*value_range)[..., None]  # the filter overshoots at edges
    plain, mode = _without_depth_and_alpha(picture), "L" if channels == 1 else "RGB"
    # Skip steps that change nothing: Pillow would copy, which takes a tenth of the time of a 256x256 JPEG.
    if plain.mode != mode:
        plain = plain.convert(mode)
    return np.frombuffer(_resized(plain, size).tobytes(), np.uint8).reshape(*size, channels)


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    (height, width), box = size, centre_box(picture.size, size)
    if (box[2] - box[0], box[3] - box[1]) != (width, height):
        return picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    return picture if picture.size == (width, height) else picture.crop(box)


def centre_box(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centred box of a picture (width, height) that has the aspect of a size (height, width).

    Returns (left, top, right, bottom).
    """
    (across, down), (height, width) = picture, size
    if across * height <= down * width:
        down = max(1, across * height // width)
    else:
        across = max(1, down * width // height)
    left, top = (picture[0] - across) // 2, (picture[1] - down) // 2
    return left, top, left + across, top + down


def _grey_values(picture: Image.Image, value_range: tuple[float, float]) -> Image.Image:
    """The picture as grey float32 values of 16 bits."""
    scale = "" if picture.mode == "F" else " on the scale of 16 bits"
    if picture.mode.startswith(("I", "F")):
        values = (np.asarray(picture) if picture.mode == "F" else _integers(picture)).astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("it has values that are not finite")
    else:
        values = np.asarray(_without_depth_and_alpha(picture).convert("F")) * np.float32(257)
    low, high = values.min(), values.max()
    if low < value_range[0] or high > value_range[1]:
        raise ValueError(
            f"its values go from {low:g} to {high:g}{scale}, which data.value_range={value_range} does not hold"
        )
    return Image.fromarray(values)


def _without_depth_and_alpha(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("its values are floats, which need data.value_range")
    if picture.mode.startswith("I"):  # grey of 16 or 32 bits; Pillow itself keeps the high byte of 16-bit colours
        values = _integers(picture)
        if values.min() < 0 or values.max() > SIXTEEN_BITS:
            raise ValueError(
                f"its values go from {values.min()} to {values.max()}, beyond the 0 to {SIXTEEN_BITS} of 16 bits; they need "
                "data.value_range"
            )
        return Image.fromarray((values >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture


def _integers(picture: Image.Image) -> Shaped[np.ndarray, "H W"]:
    """The values of a grey picture of 16 or 32 bits, with the sign and the black that a TIFF file's tags say."""
    values, tags = np.asarray(picture), getattr(picture, "tag_v2", {})
    if values.dtype == np.int32 and tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,)) == (1,):
        values = values.view(np.uint32)  # Pillow reads them as if they had a sign
    white_is_0 = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return SIXTEEN_BITS - values if white_is_0 else values  # Pillow inverts those of 8 bits alone


@dataclass(frozen=True)
class Pictures:
    """Encoded pictures of a folder, a zip file or a tfds data set.

    Attributes:
        names: The names in messages.
        read: Index -> encoded content; several threads call it.
        labels: () -> int (N,), or None if there are none.
        classes: () -> the classes' names; none if they have no names.
        identity: The fingerprint that a checkpoint records.
        stamp: A second fingerprint, for the cache and a resume's note. It changes whenever the content does, and may change more
            often, since it may use times.
    """

    names: Sequence[str]
    read: Callable[[int], bytes]
    labels: Callable[[], np.ndarray | None]
    identity: dict[str, str | int]
    stamp: str
    classes: Callable[[], Sequence[str]] = tuple


class DecodedPictures:
    """Pictures as an array (N, H, W, C), uint8 or float32, whose rows are decoded at each read.

    Threads decode them. Pillow releases the GIL, so processes would only add the cost of moving images between them.
    """

    def __init__(self, pictures: Pictures, config: DataConfig):
        self.pictures, self.value_range = pictures, config.value_range
        self.shape = (len(pictures.names), *config.size, config.channels)
        self.dtype = np.dtype(np.uint8 if self.value_range is None else np.float32)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._workers = config.workers or os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(self._workers)

    def __len__(self) -> int:
        """The number of pictures."""
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> Shaped[np.ndarray, "n H W C"]:
        """The images at these indices, decoded in parallel. Raises PictureError for the first that fails."""
        images, errors = self.attempts(indices)
        if errors:
            raise errors[0]
        return images

    def attempts(self, indices: Sequence[int] | np.ndarray) -> tuple[Shaped[np.ndarray, "n H W C"], list[PictureError]]:
        """The images at these indices, decoded in parallel, and an error for each that fails, in order.

        Rows of failed images are undefined.
        """
        images = np.empty((len(indices), *self.shape[1:]), self.dtype)
        errors: dict[int, PictureError] = {}
        rows = iter(enumerate(indices))  # each thread takes the next; a future for each would take more time

        def work():
            for row, i in rows:
                try:
                    images[row] = decode(self.pictures.read(i), self.shape[1:3], self.shape[3], self.value_range)
                except PictureError as error:
                    errors[row] = error
                except Exception as error:  # a damaged picture can raise any error
                    reason = str(error).partition(" <_io.BytesIO")[0]  # Pillow names the buffer, which means nothing
                    errors[row] = PictureError(self.pictures.names[i], reason or type(error).__name__)

        for thread in [self._pool.submit(work) for _ in range(self._workers)]:
            thread.result()
        return images, [errors[row] for row in sorted(errors)]
