"""Images as the two image paths want them (docs/model.md): uint8 [3, H, W], normalised later on the device.

Both resize with PIL's bicubic filter, which antialiases. EXIF orientation is applied; transparency is composited on
white; grey, palette, CMYK and 16-bit images become RGB; of an animation the first frame is used. The model applies mean
and standard deviation 0.5.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from jp_train.config.choices import Crop, ImageDecode
from jp_train.errors import DataError, SkipSample

BACKGROUND = (127, 127, 127)
"""Canvas of the understanding path: int(0.5 * 255), the released processor's."""
MIN_SIDE = 14
"""The understanding path's short side is at least this many pixels."""

TRANSFORM_VERSION = 1
"""Increase it when the generation path gives other pixels for any image: older stored VQ ids are then rejected."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_MAGICS = (b"\xff\xd8", b"\x89PNG", b"RIFF")
_ADDRESS = re.compile(r"( <[\w.]+ object)? at 0x[0-9a-fA-F]+>?")
"""The address of the file object in Pillow's messages; a reason must be the same in every process."""
_Result = TypeVar("_Result")
_SCANS = 16
"""A progressive JPEG with at most this many scans is always accepted; ordinary ones have 10."""
_JPEG = ("JPEG", "MPO")
_DIVISORS = (8, 4, 2)
_SPARE = 2
"""What scaled decoding leaves of a side is at least this many times what the resize makes of it: the bicubic filter
then decides the pixels."""
_ORIENTATION = 0x0112
_UPRIGHT: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEFAULT_MAX_PIXELS = 100_000_000

# Our own limit is checked before decoding. A filter set for the process, because changing filters around each image
# is not safe in threads; Pillow's remarks on odd but readable files would only fill the logs of the workers.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\..*")


def decode_rgb(
    data: bytes, max_pixels: int = _DEFAULT_MAX_PIXELS, *, enough: Callable[[tuple[int, int]], bool] | None = None
) -> Image.Image:
    """An image file as an upright RGB image. With `enough`, a JPEG may come at 1/2, 1/4 or 1/8 of its size, where that
    divides both sides and is `enough` (width, height).

    Raises:
        SkipSample: when it cannot be decoded whole, is not JPEG, PNG or WebP, or has more than `max_pixels` pixels.
        DataError: when the memory for an image within that limit is not there: that is no fault of the sample.
    """

    def decode(image: Image.Image) -> Image.Image:
        if enough is not None and image.format in _JPEG:
            _scale(image, enough)
        image.load()
        return _to_rgb(_upright(image))

    return _opened(data, max_pixels, decode)


def _opened(data: bytes, max_pixels: int, use: Callable[[Image.Image], _Result]) -> _Result:
    """The result of `use` on the opened image; every error becomes SkipSample or DataError."""
    pixels = 0
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            pixels = check_bomb(image, data, max_pixels)
            return use(image)
    except (SkipSample, DataError):
        raise
    except Image.DecompressionBombError as error:
        raise SkipSample(
            f"{error}; data.max_image_pixels is {max_pixels}: rejected before decoding", "picture_too_large"
        ) from None
    except MemoryError as error:
        if pixels:
            raise DataError(
                f"out of memory while decoding an image of {pixels} pixels; lower data.workers, data.prefetch_rows "
                "or data.max_image_pixels"
            ) from error
        raise SkipSample(
            f"undecodable image ({len(data)} bytes): it asks for more memory than there is", "picture_undecodable"
        ) from None
    except Exception as error:  # decoders raise many kinds on broken bytes: OSError, SyntaxError, struct.error, ...
        message = f"undecodable image ({len(data)} bytes): {type(error).__name__}: {_ADDRESS.sub('', str(error)[:200])}"
        if isinstance(error, UnidentifiedImageError) and not data.startswith(_MAGICS):
            raise SkipSample(f"{message}; JPEG, PNG and WebP are read", "picture_format") from None
        raise SkipSample(
            message, "picture_truncated" if "truncat" in message.lower() else "picture_undecodable"
        ) from None


def _scale(image: Image.Image, enough: Callable[[tuple[int, int]], bool]) -> None:
    """Have the decoder make a smaller image of an opened JPEG. Only whole divisors, so that no pixel shifts by a
    part of one."""
    for divisor in _DIVISORS:
        size = (image.width // divisor, image.height // divisor)
        if (size[0] * divisor, size[1] * divisor) == image.size and enough(size):
            image.draft(None, size)
            return


def check_header(data: bytes, max_pixels: int = _DEFAULT_MAX_PIXELS) -> None:
    """Raises SkipSample for an image file whose header alone shows that it cannot be used; its pixels are not
    decoded."""
    _opened(data, max_pixels, lambda image: None)


def check_bomb(image: Image.Image, data: bytes, max_pixels: int) -> int:
    """The pixels of an image file that is opened and not yet decoded.

    Raises SkipSample when decoding it would take more than `max_pixels` allow: in memory, or in time (a progressive
    JPEG may pass over its pixels thousands of times).
    """
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise SkipSample(
            f"image of {image.width} x {image.height} pixels exceeds data.max_image_pixels {max_pixels}: rejected "
            "before decoding",
            "picture_too_large",
        )
    scans = data.count(b"\xff\xda") if image.format in _JPEG else 0
    if (scans - _SCANS) * pixels > max_pixels:
        raise SkipSample(
            f"JPEG of {image.width} x {image.height} pixels with {scans} scans: more work than data.max_image_pixels "
            f"{max_pixels} allows; rejected before decoding",
            "picture_too_large",
        )
    return pixels


def load_understanding_image(
    data: bytes, size: int, max_pixels: int = _DEFAULT_MAX_PIXELS, decode: ImageDecode = ImageDecode.exact
) -> np.ndarray:
    """uint8 [3, size, size]: long side resized to `size`, the other truncated (at least 14), centred on grey. Raises
    SkipSample."""
    enough = None if decode is ImageDecode.exact else lambda sides: max(sides) >= _SPARE * size
    return understanding_transform(decode_rgb(data, max_pixels, enough=enough), size)


def understanding_transform(image: Image.Image, size: int) -> np.ndarray:
    """The understanding path for a decoded RGB image, as the released processor computes it: int(side / long *
    size), not rounded."""
    longest = max(image.size)
    width, height = (max(int(side / longest * size), MIN_SIDE) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    side = max(width, height)
    if width != height:
        canvas = Image.new("RGB", (side, side), BACKGROUND)
        canvas.paste(resized, ((side - width) // 2, (side - height) // 2))
        resized = canvas
    return _channels_first(resized)


def load_generation_image(
    data: bytes,
    size: int,
    crop: Crop = Crop.centre,
    uniform: float = 0.5,
    max_pixels: int = _DEFAULT_MAX_PIXELS,
    decode: ImageDecode = ImageDecode.exact,
) -> np.ndarray:
    """uint8 [3, size, size]: short side resized to `size`, the long side cropped; `uniform` in [0, 1) places a
    random crop. Raises SkipSample."""
    enough = None if decode is ImageDecode.exact else lambda sides: min(sides) >= _SPARE * size
    return generation_transform(decode_rgb(data, max_pixels, enough=enough), size, crop, uniform, max_pixels)


def generation_transform(
    image: Image.Image, size: int, crop: Crop = Crop.centre, uniform: float = 0.5, max_pixels: int = _DEFAULT_MAX_PIXELS
) -> np.ndarray:
    """The generation path for a decoded RGB image: what CROPS has for `crop`."""
    return _channels_first(CROPS[crop](image, size, uniform, max_pixels))


def _cropped(image: Image.Image, size: int, max_pixels: int, start: Callable[[int], int]) -> Image.Image:
    """The whole image is resized, then cropped, so that no size shifts by part of a pixel. `start` maps the pixels
    that a side has over `size` to the first one that stays."""
    shortest = min(image.size)
    width, height = (int(side * size / shortest) for side in image.size)
    if width * height > max_pixels:
        raise SkipSample(
            f"image of {image.width} x {image.height} pixels is too long: with its short side at {size} it would "
            f"have {width} x {height} pixels, above data.max_image_pixels {max_pixels}",
            "picture_too_long",
        )
    left, top = start(width - size), start(height - size)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


CROPS: dict[Crop, Callable[[Image.Image, int, float, int], Image.Image]] = {
    Crop.centre: lambda image, size, uniform, most: _cropped(image, size, most, lambda spare: spare // 2),
    Crop.random: lambda image, size, uniform, most: _cropped(
        image, size, most, lambda spare: int(uniform * (spare + 1))
    ),
}
"""(RGB image, side, `uniform` in [0, 1) of the document, most pixels) -> the image that a value of `data.crop` makes of
it, [side, side]. Stored VQ ids are those of `centre`; they are not used with another value."""


def _upright(image: Image.Image) -> Image.Image:
    """The image turned upright by its EXIF orientation. Unreadable EXIF data is ignored: the pixels are still good."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION))
    except Exception:  # as many kinds as there are ways to break a header
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, where convert("RGB") would clip
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
