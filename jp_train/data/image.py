"""Pictures as the two image paths want them (specification section 3): uint8 [3, H, W], normalised later on the device.

Both resize with PIL's bicubic filter, which antialiases. EXIF orientation is applied; transparency is composited on white; grey,
palette, CMYK and 16-bit pictures become RGB; of an animation the first frame is used. Mean and standard deviation 0.5 are the
model's business.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from jp_train.config.schema import Crop
from jp_train.errors import SkipSample

BACKGROUND = (127, 127, 127)
"""Canvas of the understanding path: int(0.5 * 255), the released processor's."""
MIN_SIDE = 14
"""The understanding path's short side is at least this many pixels."""

_FORMATS = ("JPEG", "PNG", "WEBP")
_DEFAULT_MAX_PIXELS = 100_000_000


def decode_rgb(data: bytes, max_pixels: int = _DEFAULT_MAX_PIXELS) -> Image.Image:
    """A picture file as an upright RGB image.

    Raises SkipSample when it cannot be decoded whole, is not JPEG, PNG or WebP, or has more than `max_pixels` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked before decoding
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise SkipSample(
                        f"picture of {image.width} x {image.height} pixels exceeds data.max_image_pixels {max_pixels}: refused "
                        f"before decoding"
                    )
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except SkipSample:
        raise
    except Exception as error:  # decoders raise many kinds on broken bytes: OSError, SyntaxError, struct.error, ...
        raise SkipSample(f"undecodable picture ({len(data)} bytes): {type(error).__name__}: {error}") from None


def load_understanding_image(data: bytes, size: int, max_pixels: int = _DEFAULT_MAX_PIXELS) -> np.ndarray:
    """uint8 [3, size, size]: long side resized to `size`, the other truncated (at least 14), centred on grey. Raises
    SkipSample."""
    return understanding_transform(decode_rgb(data, max_pixels), size)


def understanding_transform(image: Image.Image, size: int) -> np.ndarray:
    """The understanding path for a decoded RGB image, as the released processor computes it: int(side / long * size), not
    rounded."""
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
    data: bytes, size: int, crop: Crop = Crop.centre, uniform: float = 0.5, max_pixels: int = _DEFAULT_MAX_PIXELS
) -> np.ndarray:
    """uint8 [3, size, size]: short side resized to `size`, the long side cropped; `uniform` in [0, 1) places a random crop.
    Raises SkipSample."""
    return generation_transform(decode_rgb(data, max_pixels), size, crop, uniform, max_pixels)


def generation_transform(
    image: Image.Image, size: int, crop: Crop = Crop.centre, uniform: float = 0.5, max_pixels: int = _DEFAULT_MAX_PIXELS
) -> np.ndarray:
    """The generation path for a decoded RGB image. The whole image is resized, then cropped, so that no size shifts by part of a
    pixel."""
    shortest = min(image.size)
    width, height = (int(side * size / shortest) for side in image.size)
    if width * height > max_pixels:
        raise SkipSample(
            f"picture of {image.width} x {image.height} pixels is too long: with its short side at {size} it would have {width} x "
            f"{height} pixels, above data.max_image_pixels {max_pixels}"
        )
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    spare_x, spare_y = width - size, height - size
    if crop is Crop.centre:
        left, top = spare_x // 2, spare_y // 2
    else:
        left, top = int(uniform * (spare_x + 1)), int(uniform * (spare_y + 1))  # one of the two spares is 0
    return _channels_first(resized.crop((left, top, left + size, top + size)))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: keep the high byte, where convert("RGB") would clip
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _channels_first(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))
