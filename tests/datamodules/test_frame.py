import numpy as np
import pytest
from pictures import encoded, noise, plain
from PIL import Image

from lit_distill.datamodules.frame import Frame


@pytest.mark.parametrize("crop", ["exact", "center", "none"])
@pytest.mark.parametrize("kind", ["png", "webp", "bmp", "tiff"])
def test_pictures_of_the_right_size_keep_their_pixels(crop, kind):
    picture = noise(8)
    pixels = Frame(8, crop=crop).pixels(encoded(picture, kind, lossless=True))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, picture.transpose(2, 0, 1))


def test_the_middle_is_cut_out_without_computing():
    picture = noise(8, 13)
    pixels = Frame(8).pixels(encoded(picture))
    assert np.array_equal(pixels, picture[:, 2:10].transpose(2, 0, 1))


def test_the_middle_is_taken_of_wide_and_high_pictures():
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the square in the middle
    for picture in (wide, wide.transpose(1, 0, 2)):
        square = Frame(10).pixels(encoded(picture))[:, 3:-3, 3:-3]  # the edge sees what is beside
        assert np.array_equal(square, np.full((3, 4, 4), 200))
        squeezed = Frame(12, crop="none").pixels(encoded(picture))
        assert squeezed.max() >= 200 and squeezed.min() == 0
        assert 0.2 < (squeezed > 100).mean() < 0.45  # a third of it, as in the whole picture


def test_exact_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"has shape \(9, 8, 3\) .* not \(8, 8, 3\)"):
        Frame(8, crop="exact").pixels(encoded(noise(9, 8)))


def test_large_jpegs_are_reduced_while_they_are_decoded(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda image, *args: sizes.append(image.size) or resize(image, *args)
    )
    rows, columns = np.mgrid[:480, :640]
    picture = np.stack([rows / 2, columns / 3, 0 * rows], 2).astype(np.uint8)
    reduced = Frame(24).pixels(encoded(picture, "jpeg", quality=95)).astype(int)
    assert sizes == [(80, 60)]
    whole = Frame(24).pixels(encoded(picture)).astype(int)
    assert sizes[1] == (640, 480)
    assert np.abs(whole - reduced).mean() < 1


def test_grey_levels_and_colours():
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert np.array_equal(Frame(8, 3).pixels(encoded(grey)), np.stack([grey] * 3))
    assert np.array_equal(Frame(8, 1).pixels(encoded(grey)), grey[None])
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    assert np.array_equal(Frame(8, 1).pixels(encoded(red)), np.full((1, 8, 8), 76))  # 0.299 * 255
    palette = Image.fromarray(red).quantize(4)
    assert palette.mode == "P"
    assert np.array_equal(Frame(8).pixels(encoded(palette)), red.transpose(2, 0, 1))
    cmyk = Image.fromarray(red).convert("CMYK")
    assert np.array_equal(Frame(8).pixels(encoded(cmyk, "tiff")), red.transpose(2, 0, 1))
    two_levels = Image.fromarray(grey > 31)
    assert two_levels.mode == "1"
    assert np.array_equal(Frame(8, 1).pixels(encoded(two_levels))[0], (grey > 31) * 255)


def test_transparency_shows_white():
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[..., 3] = 255
    picture[:4, :, 3] = 0
    picture[:4, :, 1] = 99  # the colour under it is not seen
    pixels = Frame(8).pixels(encoded(picture))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 0).all()
    grey = Image.fromarray(picture).convert("LA")
    pixels = Frame(8, 1).pixels(encoded(grey))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 0).all()
    palette = Image.fromarray(picture).convert("RGB").quantize(4)
    clear = palette.getpixel((0, 0))
    pixels = Frame(8).pixels(encoded(palette, transparency=clear))
    assert (pixels[:, :4] == 255).all() and (pixels[:, 4:] == 0).all()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_of_16_bits_the_upper_8_are_kept(kind):
    levels = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    pixels = Frame(8, 1).pixels(encoded(levels, kind))
    assert np.array_equal(pixels[0], levels >> 8)


def test_more_than_16_bits_have_no_range():
    deep = np.full((8, 8), 70_000, np.int32)
    with pytest.raises(ValueError, match="more than 16 bits"):
        Frame(8, 1).pixels(encoded(deep, "tiff"))
    with pytest.raises(ValueError, match="floating point"):
        Frame(8, 1).pixels(encoded(deep.astype(np.float32), "tiff"))


def test_photographs_are_turned_upright():
    picture = noise(8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    pixels = Frame(8).pixels(encoded(picture, exif=exif))
    assert np.array_equal(pixels, np.rot90(picture, -1).transpose(2, 0, 1))


def test_several_frames_count_as_the_first():
    frames = [Image.fromarray(plain(level)) for level in (10, 200)]
    content = encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(Frame(8).pixels(content), np.full((3, 8, 8), 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "image_size=0"),
        ({"size": 8, "channels": 2}, "channels=2.*1 .grey. or 3"),
        ({"size": 8, "crop": "top"}, "crop='top'.*center, none, exact"),
    ],
)
def test_frames_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Frame(**options)
