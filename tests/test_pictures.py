"""What becomes of a picture: every kind that Pillow knows ends as the uint8 image that the module's docstring describes."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ddpm_jax.data import pictures
from ddpm_jax.data.pictures import centre_box, decode, upright_size

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 6, 3), np.uint8)
GREYS = RNG.integers(0, 256, (6, 6), np.uint8)
WHITE = 255


def encoded(image, form="PNG", **options):
    """A picture file's content, of a Pillow image or an array."""
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def luma(rgb):
    """ITU-R 601 in whole numbers, rounded."""
    return ((rgb.astype(int) * [19595, 38470, 7471]).sum(-1) + 2**15) >> 16


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP"])
def test_lossless_pictures_keep_every_pixel(form):
    options = {"lossless": True} if form == "WEBP" else {}
    np.testing.assert_array_equal(decode(encoded(COLOURS, form, **options), (6, 6), 3), COLOURS)


def test_jpeg_is_near_its_pixels():
    smooth = np.add.outer(np.arange(16) * 8, np.arange(16) * 8).astype(np.uint8)
    image = decode(encoded(smooth, "JPEG", quality=95), (16, 16), 1)
    assert np.abs(image[..., 0].astype(int) - smooth).max() <= 4


def test_grey_is_repeated_and_colour_becomes_luma():
    np.testing.assert_array_equal(decode(encoded(GREYS), (6, 6), 3), GREYS[..., None].repeat(3, -1))
    np.testing.assert_array_equal(decode(encoded(GREYS), (6, 6), 1), GREYS[..., None])
    np.testing.assert_array_equal(decode(encoded(COLOURS), (6, 6), 1)[..., 0], luma(COLOURS))


def test_palette_becomes_its_colours():
    picture = Image.new("P", (6, 6))
    picture.putdata((GREYS % 4).reshape(-1).tolist())
    table = RNG.integers(0, 256, (4, 3), np.uint8)
    picture.putpalette(table.tobytes())
    np.testing.assert_array_equal(decode(encoded(picture), (6, 6), 3), table[GREYS % 4])


def test_black_and_white_becomes_0_and_255():
    bits = GREYS > 127
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(bits)), (6, 6), 1)[..., 0], bits * 255)


def test_cmyk_becomes_rgb():
    picture = Image.new("CMYK", (6, 6), (255, 0, 0, 0))  # full cyan
    image = decode(encoded(picture, "JPEG", quality=100), (6, 6), 3).astype(int)
    assert np.abs(image - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_pixels_are_laid_on_white(mode):
    alpha = np.full((6, 6), 255, np.uint8)
    alpha[:3] = 0
    if mode == "LA":
        content, colours = encoded(np.stack([GREYS, alpha], -1)), GREYS[..., None].repeat(3, -1)
    elif mode == "RGBA":
        content, colours = encoded(np.concatenate([COLOURS, alpha[..., None]], -1)), COLOURS
    else:  # a palette one of whose colours is transparent
        picture = Image.new("P", (6, 6), 1)
        picture.putpalette([9, 8, 7, 10, 20, 30])
        picture.paste(0, (0, 0, 6, 3))
        content, colours = encoded(picture, transparency=0), np.full((6, 6, 3), [10, 20, 30], np.uint8)
    expected = np.where(alpha[..., None] == 0, WHITE, colours)
    np.testing.assert_array_equal(decode(content, (6, 6), 3), expected)


def test_half_transparent_is_half_white():
    image = decode(encoded(np.full((6, 6, 4), [0, 100, 200, 128], np.uint8)), (6, 6), 3).astype(int)
    assert np.abs(image - [127, 177, 227]).max() <= 1


def png_16(channels):
    """A PNG of 16-bit values, which Pillow cannot write in colour, and its values (6, 6, channels)."""
    values = RNG.integers(0, 2**16, (6, 6, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 6, 6, 16, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return content, values.astype(int)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_keep_their_high_byte(channels):
    content, values = png_16(channels)
    np.testing.assert_array_equal(decode(content, (6, 6), channels), values >> 8)


def test_16_bits_with_alpha_are_laid_on_white():
    content, values = png_16(2)
    grey, alpha = values[..., 0] >> 8, (values[..., 1] >> 8) / 255
    assert np.abs(decode(content, (6, 6), 1)[..., 0] - (grey * alpha + 255 * (1 - alpha))).max() <= 1


@pytest.mark.parametrize("values", [[-1000, 30000], [0, 65536], [0, 2**31]])
def test_integers_beyond_16_bits_need_a_range_and_are_kept_with_one(values):
    picture = Image.fromarray(np.array([values], np.int64).astype(np.int32))
    content = bytearray(encoded(picture, "TIFF"))
    if values[1] == 2**31:  # Pillow writes no unsigned values of 32 bits: the tag SampleFormat, a short, from 2 to 1
        content[content.index(struct.pack("<HHI", 339, 3, 1)) + 8] = 1
    with pytest.raises(ValueError, match=rf"go from {values[0]} to {values[1]}, .*; they need data\.value_range"):
        decode(bytes(content), (1, 2), 1)
    image = decode(bytes(content), (1, 2), 1, (-1000.0, 2.0**31))
    np.testing.assert_array_equal(image[0, :, 0], np.array(values, np.float32))


def test_16_bits_whose_white_is_0_are_inverted_like_8_bits():
    values = np.array([[0, 300, 65535]], np.uint16)
    content = encoded(values, "TIFF", tiffinfo={262: 0})  # PhotometricInterpretation
    np.testing.assert_array_equal(decode(content, (1, 3), 1)[..., 0], (65535 - values) >> 8)
    np.testing.assert_array_equal(decode(content, (1, 3), 1, (0, 65535))[..., 0], 65535 - values)


def test_pixels_of_16_bits_are_no_colours_of_16_bits():
    """A BMP with 5 or 6 bits for each colour, without and with a range."""
    pixels = np.array([[0x0000, 0xFFFF]], "<u2")
    masks, header = (
        struct.pack("<3I", 0xF800, 0x07E0, 0x001F),
        struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0),
    )
    content = struct.pack("<2sIHHI", b"BM", 70, 0, 0, 66) + header + masks + pixels.tobytes()
    np.testing.assert_array_equal(decode(content, (1, 2), 1)[0, :, 0], [0, 255])
    np.testing.assert_array_equal(decode(content, (1, 2), 1, (0, 65535))[0, :, 0], [0, 65535])


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bits_whose_low_byte_cannot_be_read_are_refused_with_a_range(channels):
    with pytest.raises(ValueError, match=r"have 16 bits, of which data\.value_range needs all and 8 can be read"):
        decode(png_16(channels)[0], (6, 6), 1, (0, 65535))


def test_pages_are_turned_each_by_its_orientation():
    picture = Image.fromarray(GREYS[:3])
    buffer = io.BytesIO()
    picture.save(buffer, "TIFF", save_all=True, append_images=[picture], tiffinfo={274: 6})
    expected = decode(encoded(picture, "TIFF", tiffinfo={274: 6}), (6, 3), 1)
    np.testing.assert_array_equal(expected[..., 0], np.rot90(GREYS[:3], -1))
    np.testing.assert_array_equal(decode(buffer.getvalue(), (6, 3), 2), expected.repeat(2, -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_orientation_of_exif_is_honoured(orientation, form):
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8, :8] = 250  # the top left corner is bright, and the top right half so
    upright[:8, 8:] = 120
    stored = {  # which of its turns and flips the file holds, so that a viewer undoes it (EXIF 2.3, table of tag 0x0112)
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(np.ascontiguousarray(stored), form, exif=exif, **({} if form == "PNG" else {"quality": 95}))
    assert np.abs(decode(content, (16, 16), 3).astype(int) - upright).max() <= 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_upright_size_is_that_of_the_turned_picture(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    size = upright_size(encoded(COLOURS[:4], form, exif=exif))
    assert size == ((6, 4) if orientation < 5 else (4, 6))
    assert upright_size(encoded(COLOURS[:4], form)) == (6, 4)


def test_first_frame_of_an_animation_is_taken():
    frames = [Image.fromarray(np.full((6, 6, 3), value, np.uint8)) for value in (10, 200)]
    for form in ("PNG", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        content = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(decode(content, (6, 6), 3), np.full((6, 6, 3), 10))


@pytest.mark.parametrize(("height", "width"), [(6, 10), (10, 6), (6, 9), (9, 6)])
def test_the_centre_square_is_cut_out(height, width):
    image = RNG.integers(0, 256, (height, width, 3), np.uint8)
    top, left = (height - 6) // 2, (width - 6) // 2
    np.testing.assert_array_equal(decode(encoded(image), (6, 6), 3), image[top : top + 6, left : left + 6])


@pytest.mark.parametrize(
    ("picture", "box"),
    [
        ((6, 9), (0, 0, 6, 9)),  # 2:3 as it is
        ((6, 12), (0, 1, 6, 10)),  # too wide: cut left and right, one column more on the right
        ((12, 9), (3, 0, 9, 9)),  # too high
    ],
)
def test_the_centre_of_another_aspect_is_cut_out(picture, box):
    image, (top, left, bottom, right) = RNG.integers(0, 256, (*picture, 3), np.uint8), box
    np.testing.assert_array_equal(decode(encoded(image), (6, 9), 3), image[top:bottom, left:right])


@pytest.mark.parametrize("picture", [(300, 200), (200, 300), (4000, 30), (1, 500)])
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (48, 48)])
def test_the_box_is_inside_as_large_as_can_be_and_of_the_aspect(picture, size):
    left, top, right, bottom = centre_box(picture, size)
    width, height = right - left, bottom - top
    assert 0 <= left < right <= picture[0]
    assert 0 <= top < bottom <= picture[1]
    assert width == picture[0] or height == picture[1]
    assert abs(left - (picture[0] - right)) <= 1
    assert abs(top - (picture[1] - bottom)) <= 1
    exact = min(picture[0], picture[1] * size[1] / size[0]), min(picture[1], picture[0] * size[0] / size[1])
    assert abs(width - max(exact[0], 1)) < 1
    assert abs(height - max(exact[1], 1)) < 1


# ---- float32, with data.value_range

SIXTEEN_BITS = (0, 65535)


def test_16_bit_grey_is_kept_to_its_last_bit():
    content, values = png_16(1)
    image = decode(content, (6, 6), 1, SIXTEEN_BITS)
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, values)


def test_8_bits_are_widened_and_luma_is_not_rounded():
    np.testing.assert_array_equal(decode(encoded(GREYS), (6, 6), 1, SIXTEEN_BITS)[..., 0], GREYS * 257.0)
    exact = COLOURS.astype(float) @ [0.299, 0.587, 0.114] * 257
    np.testing.assert_allclose(decode(encoded(COLOURS), (6, 6), 1, SIXTEEN_BITS)[..., 0], exact, rtol=1e-6)


def test_values_between_pixels_are_not_rounded_when_16_bits_are_resized():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint16) * 7, (64, 64))
    row = decode(encoded(np.ascontiguousarray(ramp)), (16, 16), 1, SIXTEEN_BITS)[8, :, 0]
    centres = (np.arange(16) + 0.5) * 4 - 0.5  # of the small pixels, in places of the large ones
    np.testing.assert_allclose(row[2:-2], centres[2:-2] * 7, rtol=1e-5)  # 10.5 a step, and no whole numbers


def test_the_filter_does_not_leave_the_range():
    edge = np.zeros((8, 8), np.uint16)
    edge[:, 4:] = 65535
    image = decode(encoded(edge), (32, 32), 1, SIXTEEN_BITS)
    assert (image.min(), image.max()) == SIXTEEN_BITS


def test_values_outside_of_the_range_are_refused():
    content, values = png_16(1)
    message = (
        f"its values go from {values.min():g} to {values.max():g} on the scale of 16 bits, which data.value_range="
    )
    with pytest.raises(ValueError, match=message):
        decode(content, (6, 6), 1, (0, 4095))


def test_shrinking_is_antialiased():
    """Stripes finer than the smaller image's pixels become their mean, and not some of the stripes."""
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    inside = decode(encoded(stripes), (16, 16), 1)[2:-2, 2:-2]
    assert np.abs(inside.astype(int) - 127.5).max() <= 3


def test_resizing_keeps_a_ramp_straight():
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (64, 64))
    row = decode(encoded(np.ascontiguousarray(ramp)), (16, 16), 1)[8, :, 0].astype(float)
    centres = (np.arange(16) + 0.5) * 4 - 0.5  # of the small pixels, in places of the large ones
    np.testing.assert_allclose(row[2:-2], centres[2:-2] * 4, atol=1)


def test_small_pictures_are_enlarged():
    image = decode(encoded(np.full((3, 5, 3), 77, np.uint8)), (16, 16), 3)
    np.testing.assert_array_equal(image, np.full((16, 16, 3), 77))


def test_absurdly_large_pictures_are_refused_before_they_are_decoded(monkeypatch):
    assert pictures.MAX_PIXELS < Image.MAX_IMAGE_PIXELS  # so that Pillow's own warning comes later
    monkeypatch.setattr(pictures, "MAX_PIXELS", 35)
    with pytest.raises(ValueError, match=r"^its 6 x 6 pixels are more than 35$"):
        decode(encoded(COLOURS), (6, 6), 3)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 36)
    assert decode(encoded(COLOURS), (6, 6), 3).shape == (6, 6, 3)


def pages(*arrays):
    """A TIFF file with a page for each array."""
    first, *rest = map(Image.fromarray, arrays)
    buffer = io.BytesIO()
    first.save(buffer, "TIFF", save_all=True, append_images=rest)
    return buffer.getvalue()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_page_of_a_tiff_file_is_a_channel(count):
    arrays = RNG.integers(0, 256, (count, 6, 9), np.uint8)
    np.testing.assert_array_equal(decode(pages(*arrays), (6, 9), count), arrays.transpose(1, 2, 0))
    for channels in (1, 4):
        with pytest.raises(
            ValueError, match=rf"its {count} pages are as many channels, expected data.channels={channels}"
        ):
            decode(pages(*arrays), (6, 9), channels)


def test_a_tiff_file_of_one_page_is_a_picture_like_others():
    np.testing.assert_array_equal(decode(encoded(COLOURS, "TIFF"), (6, 6), 3), decode(encoded(COLOURS), (6, 6), 3))
    with pytest.raises(ValueError, match=r"it has one page, expected one for each of data\.channels=4"):
        decode(encoded(COLOURS, "TIFF"), (6, 6), 4)


@pytest.mark.parametrize(("dtype", "scale"), [(np.float32, 1e-3), (np.uint16, 60_000)])
def test_values_of_pages_are_kept_with_a_range(dtype, scale):
    arrays = (RNG.random((4, 6, 9)) * scale).astype(dtype)
    image = decode(pages(*arrays), (6, 9), 4, (0.0, float(scale)))
    assert image.dtype == np.float32
    np.testing.assert_array_equal(image, arrays.astype(np.float32).transpose(1, 2, 0))


def test_pages_that_are_no_image_are_refused():
    small, large = np.zeros((6, 6), np.uint8), np.zeros((6, 8), np.uint8)
    with pytest.raises(ValueError, match="its pages have 2 sizes"):
        decode(pages(small, large), (6, 6), 2)
    with pytest.raises(ValueError, match=r"its values are floats, which need data\.value_range"):
        decode(pages(small.astype(np.float32)), (6, 6), 1)
    with pytest.raises(ValueError, match="values that are not finite"):
        decode(pages(np.full((6, 6), np.nan, np.float32)), (6, 6), 1, (0.0, 1.0))


def test_other_formats_are_not_even_tried():
    for form in ("GIF", "PPM"):
        with pytest.raises(Image.UnidentifiedImageError):
            decode(encoded(COLOURS, form), (6, 6), 3)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_pictures_cut_short_raise(form):
    content = encoded(RNG.integers(0, 256, (32, 32, 3), np.uint8), form)
    for left in (0, 3, 20, len(content) // 2, len(content) * 9 // 10):
        with pytest.raises(Exception, match=r".+"):
            decode(content[:left], (32, 32), 3)
