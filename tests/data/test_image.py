from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from jp_train.config.schema import Crop, ImageDecode
from jp_train.data.image import (
    decode_rgb,
    generation_transform,
    load_generation_image,
    load_understanding_image,
    understanding_transform,
)
from jp_train.errors import DataError, SkipSample
from tests.data.faulty_shards import mutated


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth random picture (noise would make every rounding visible, and photographs are smooth)."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def slow_bicubic(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Antialiased bicubic (a = -0.5), written from its definition, float64 [H, W, 3] -> [height, width, 3]."""

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        return np.where(x < 1, near, np.where(x < 2, far, 0.0))

    def matrix(old: int, new: int) -> np.ndarray:
        scale = old / new
        centres = (np.arange(new) + 0.5) * scale
        rows = kernel((np.arange(old) + 0.5 - centres[:, None]) / max(scale, 1.0))
        return rows / rows.sum(1, keepdims=True)

    wide = np.clip(np.round(np.einsum("tw,hwc->htc", matrix(pixels.shape[1], width), pixels.astype(float))), 0, 255)
    return np.clip(np.round(np.einsum("th,hwc->twc", matrix(pixels.shape[0], height), wide)), 0, 255)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (100, 7), (7, 100), (32, 32), (5, 5), (37, 91)])
def test_understanding_follows_its_definition(width, height):
    size = 48
    image = picture(width, height)
    longest = max(width, height)
    new_width, new_height = max(int(width / longest * size), 14), max(int(height / longest * size), 14)
    expected = np.full((size, size, 3), 127.0)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    expected[top : top + new_height, left : left + new_width] = slow_bicubic(np.asarray(image), new_width, new_height)
    got = understanding_transform(image, size)
    assert got.dtype == np.uint8 and got.shape == (3, size, size) and got.flags.c_contiguous
    assert np.abs(got.transpose(1, 2, 0) - expected).max() <= 1


def test_the_short_side_is_truncated_not_rounded():
    got = understanding_transform(Image.new("RGB", (100, 99), (255, 255, 255)), 50)  # 99 / 100 * 50 = 49.5
    assert (got[0] == 255).sum() == 50 * 49


def test_understanding_equals_the_processor_of_transformers_where_it_does_not_round():
    from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

    processor = JanusImageProcessorPil(do_normalize=False, do_rescale=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for width, height in [(96, 96), (192, 96), (64, 128), (768, 96)]:
        image = picture(width, height, width)
        theirs = processor(image, do_resize=True, size={"height": 384, "width": 384}, return_tensors="np")[
            "pixel_values"
        ][0]
        np.testing.assert_array_equal(understanding_transform(image, 384), theirs)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (100, 50), (33, 33), (64, 20)])
def test_generation_crops_the_resized_picture(width, height):
    size = 24
    image = picture(width, height)
    new_width, new_height = int(width * size / min(width, height)), int(height * size / min(width, height))
    resized = slow_bicubic(np.asarray(image), new_width, new_height)
    left, top = (new_width - size) // 2, (new_height - size) // 2
    got = generation_transform(image, size).transpose(1, 2, 0)
    assert np.abs(got - resized[top : top + size, left : left + size]).max() <= 1
    for uniform in (0.0, 0.4, math.nextafter(1, 0)):
        left, top = int(uniform * (new_width - size + 1)), int(uniform * (new_height - size + 1))
        got = generation_transform(image, size, Crop.random, uniform).transpose(1, 2, 0)
        assert np.abs(got - resized[top : top + size, left : left + size]).max() <= 1


def test_every_short_side_becomes_the_size_exactly():
    for side in (1, 3, 49, 98, 107, 383, 385, 1000, 1537):
        assert generation_transform(Image.new("RGB", (side, side + 3)), 96).shape == (3, 96, 96)


def test_transparency_is_composited_on_white():
    clear = Image.new("RGBA", (20, 20), (10, 20, 30, 0))
    half = Image.new("RGBA", (20, 20), (0, 0, 0, 128))
    assert (load_generation_image(encoded(clear), 16) == 255).all()
    assert np.abs(load_generation_image(encoded(half), 16).astype(int) - 127).max() <= 1
    palette = Image.new("P", (20, 20))
    palette.putpalette([200, 100, 50, 0, 0, 0])
    assert (load_understanding_image(encoded(palette, transparency=0), 16) == 255).all()
    assert load_understanding_image(encoded(palette), 16)[:, 0, 0].tolist() == [200, 100, 50]
    assert (load_generation_image(encoded(Image.new("LA", (20, 20), (9, 0))), 16) == 255).all()


def test_grey_cmyk_and_sixteen_bit_pictures_become_rgb():
    assert (load_generation_image(encoded(Image.new("L", (20, 20), 77)), 16) == 77).all()
    assert load_generation_image(encoded(Image.new("CMYK", (20, 20)), "JPEG"), 16).min() >= 250
    sixteen = Image.fromarray(np.full((20, 20), 0x8000, np.uint16))
    assert (load_generation_image(encoded(sixteen), 16) == 0x80).all()
    assert (load_generation_image(encoded(Image.new("1", (20, 20), 1)), 16) == 255).all()


def test_exif_orientation_is_applied():
    image = picture(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    assert decode_rgb(encoded(image, "PNG", exif=exif)).size == (20, 40)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(
        load_generation_image(encoded(image, "PNG", exif=exif), 16), load_generation_image(encoded(upright), 16)
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"junk", encoded(picture(40, 40))[:90], encoded(picture(90, 90), "JPEG")[:400], b"GIF89a" + b"\0" * 50],
)
def test_broken_bytes_are_a_skip(data):
    with pytest.raises(SkipSample, match="undecodable"):
        load_understanding_image(data, 16)


def test_other_formats_are_a_skip():
    with pytest.raises(SkipSample, match="undecodable"):
        decode_rgb(encoded(picture(9, 9), "BMP"))


def test_a_picture_over_the_pixel_limit_is_refused_before_it_is_decoded(monkeypatch):
    data = encoded(Image.new("RGB", (200, 100)))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(SkipSample, match="max_image_pixels 19999"):
        load_generation_image(data, 16, max_pixels=19999)


def test_a_picture_whose_resized_form_would_be_huge_is_a_skip():
    with pytest.raises(SkipSample, match="too long"):
        load_generation_image(encoded(Image.new("RGB", (3000, 2))), 384, max_pixels=1_000_000)


def test_a_decompression_bomb_beyond_pillows_own_limit_is_a_skip():
    with pytest.raises(SkipSample):
        load_generation_image(encoded(Image.new("1", (20000, 10000))), 16)


def progressive_bomb(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan comes `scans` times more: a small file that takes minutes to decode."""
    data = encoded(picture(side, side), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


def test_a_jpeg_that_passes_over_its_pixels_thousands_of_times_is_refused_before_decoding(monkeypatch):
    ordinary = encoded(picture(64, 64), "JPEG", progressive=True)
    assert decode_rgb(ordinary, max_pixels=64 * 64).size == (64, 64)
    data = progressive_bomb(64, 2000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(SkipSample, match="scans") as caught:
        decode_rgb(data, max_pixels=1_000_000)
    assert caught.value.fault == "picture_too_large"


def test_exif_that_cannot_be_read_turns_nothing_and_loses_no_picture():
    image = picture(40, 20)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x" * 40
    blob = exif.tobytes()
    for at in range(6, len(blob), 3):
        for broken in (blob[:at], blob[:at] + b"\xff" * 4 + blob[at + 4 :]):
            assert sorted(decode_rgb(encoded(image, "JPEG", exif=broken)).size) == [20, 40]
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        data = encoded(image, "PNG", exif=exif)
        np.testing.assert_array_equal(
            np.asarray(decode_rgb(data)), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        )


def test_of_an_animation_the_first_frame_is_used_and_a_stereo_jpeg_is_a_jpeg():
    frames = [Image.new("RGB", (20, 20), colour) for colour in ((200, 10, 10), (10, 200, 10), (10, 10, 200))]
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("MPO", {})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        got = load_generation_image(data, 16)
        assert np.abs(got[:, 0, 0].astype(int) - [200, 10, 10]).max() <= 3
    for form in ("GIF", "TIFF", "ICO", "BMP", "PPM"):
        with pytest.raises(SkipSample) as caught:
            decode_rgb(encoded(frames[0], form))
        assert caught.value.fault == "picture_format"


BOMBS = """
import io, resource, sys, zlib, struct
from PIL import Image
from jp_train.data.image import load_generation_image, load_understanding_image
from jp_train.errors import SkipSample

def saved(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def png(width, height, *chunks):
    head = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return head + b"".join(chunks) + chunk(b"IEND", b"")

zeros = zlib.compress(bytes(200 << 20), 9)
exif = Image.Exif()
exif[0x0112] = 6
bombs = [
    png(60000, 60000, chunk(b"IDAT", zeros)),
    png(1, 1, chunk(b"IDAT", zeros)),
    png(8, 8, chunk(b"zTXt", b"a\\0\\0" + zeros), chunk(b"IDAT", zeros)),
    png(8, 8, chunk(b"iCCP", b"a\\0\\0" + zeros), chunk(b"IDAT", zeros)),
    png(8, 8, chunk(b"iTXt", b"a\\0\\1\\0\\0\\0" + zeros), chunk(b"IDAT", zeros)),
    saved(Image.new("1", (16000, 16000)), "PNG"),
    saved(Image.new("L", (9000, 9000)), "JPEG", quality=1),
    saved(Image.new("L", (1500, 600)), "JPEG", quality=1, exif=exif),
    b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes([2, 0, 0, 0])
    + b"\\xff\\x3f\\x00" * 2 + b"ANIM" + bytes(8),
]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
del zeros
outcomes = []
for data in bombs:
    for load in (load_generation_image, load_understanding_image):
        try:
            load(data, 32, max_pixels=1_000_000)
            outcomes.append("read")
        except SkipSample as reason:
            outcomes.append(reason.fault)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, *outcomes)
"""


def test_no_bomb_takes_more_memory_than_the_pixel_limit_allows():
    """1,000,000 pixels at most: the peak may grow by a few copies of that, not by the gigabytes that the files ask
    for."""
    answer = subprocess.run([sys.executable, "-c", BOMBS], capture_output=True, text=True, timeout=120, check=True)
    grown, *outcomes = answer.stdout.split()
    assert int(grown) < 100 * 1024, outcomes  # KiB
    assert outcomes[0] == outcomes[10] == outcomes[12] == "picture_too_large" and outcomes[14] == "read"
    assert all(outcome == "read" or outcome.startswith("picture_") for outcome in outcomes)


def test_a_lack_of_memory_is_no_fault_of_the_sample(monkeypatch):
    def no_memory(self):
        raise MemoryError

    data = encoded(picture(9, 9))
    monkeypatch.setattr(Image.Image, "transpose", no_memory)
    monkeypatch.setattr("jp_train.data.image._to_rgb", no_memory)
    with pytest.raises(DataError, match="out of memory while decoding an image of 81 pixels; lower data.workers"):
        decode_rgb(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "MPO", "progressive"])
def test_damaged_pictures_are_read_or_skipped_and_nothing_else(form):
    frames = [picture(24, 18, seed) for seed in range(2)]
    options = (
        {"save_all": True, "append_images": frames[1:]}
        if form == "MPO"
        else {"progressive": True}
        if form == "progressive"
        else {}
    )
    data = encoded(frames[0], "JPEG" if form == "progressive" else form, **options)
    random = np.random.default_rng(1)
    read = 0
    for _ in range(300):
        try:
            assert load_understanding_image(mutated(data, random), 16, max_pixels=100_000).shape == (3, 16, 16)
            read += 1
        except SkipSample as reason:
            assert reason.fault.startswith("picture_")
    assert 0 < read < 300


def smooth(width: int, height: int) -> Image.Image:
    """Colours that change as slowly as most of a photograph's, with one sharp edge."""
    x, y = np.meshgrid(np.arange(width) / 40, np.arange(height) / 25)
    pixels = np.stack([128 + 100 * np.sin(x), 128 + 100 * np.cos(y), 128 + 60 * np.sin(x + y)], axis=2)
    pixels[:, width // 3 :] -= 20
    return Image.fromarray(pixels.astype(np.uint8))


def fast(load, data: bytes, size: int) -> np.ndarray:
    return load(data, size, decode=ImageDecode.fast)


@pytest.mark.parametrize(
    "options",
    [{}, {"subsampling": 0}, {"progressive": True}, {"mode": "L"}, {"mode": "CMYK"}, {"turn": 6}, {"turn": 7}],
)
def test_fast_decoding_stays_close_to_exact_and_does_decode_less(options):
    options = dict(options)
    mode, turn = options.pop("mode", "RGB"), options.pop("turn", 1)
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(smooth(640, 512).convert(mode), "JPEG", quality=92, exif=exif, **options)
    for load in (load_generation_image, load_understanding_image):
        exact, got = load(data, 64).astype(int), fast(load, data, 64)
        assert 0 < np.abs(exact - got).max() <= 12
        assert np.abs(exact - got).mean() < 1
    assert sorted(decode_rgb(data, enough=lambda sides: min(sides) >= 128).size) == [128, 160]


@pytest.mark.parametrize(
    ("width", "height", "form"),
    [(255, 512, "JPEG"), (641, 512, "JPEG"), (640, 513, "JPEG"), (640, 512, "PNG"), (640, 512, "WEBP")],
)
def test_fast_decoding_is_exact_where_halving_would_lose_too_much_or_shift_pixels_or_is_not_offered(
    width, height, form
):
    data = encoded(smooth(width, height), form)
    np.testing.assert_array_equal(fast(load_generation_image, data, 128), load_generation_image(data, 128))
    if (width, height) != (255, 512):
        np.testing.assert_array_equal(fast(load_understanding_image, data, 128), load_understanding_image(data, 128))


def test_fast_decoding_refuses_what_exact_decoding_refuses():
    data = encoded(smooth(640, 512), "JPEG")
    for broken in (data[: len(data) // 2], data[:40]):
        with pytest.raises(SkipSample, match="undecodable"):
            fast(load_generation_image, broken, 64)
    with pytest.raises(SkipSample, match="rejected before decoding"):
        load_generation_image(data, 64, max_pixels=640 * 512 - 1, decode=ImageDecode.fast)
