"""An image of a source -> the bytes that go into the shard.

JPEG, PNG and WebP (by their first bytes, whatever the file is called) are copied byte for byte. BMP, GIF, TIFF, PPM and
JPEG 2000 become PNG without a change of any pixel that training sees; of an animation the first frame. Paths are opened
only inside the image folder.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import warnings
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps

from jp_train.data.image import decode_rgb
from jp_train.data.samples import MAX_IMAGE_BYTES
from jp_train.errors import DataError, SkipSample
from jp_train.tools.importers.entries import Skip

_CONVERTED = ("BMP", "GIF", "TIFF", "PPM", "JPEG2000")
_URL = re.compile(r"[a-z][a-z0-9+]+://", re.IGNORECASE)
_KEPT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Modes that PNG stores as they are."""


def image_extension(data: bytes) -> str | None:
    """`jpg`, `png` or `webp` by the first bytes, or None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def refuse_outside(folder: Path, path: str) -> None:
    """Raises Skip for a path that names no file, or whose text alone shows that it leaves the folder."""
    if "\0" in path or not path:
        raise Skip("image_missing", f"the path {path!r} names no file")
    refuse_address(path)
    path = _below(folder, path)
    if os.path.isabs(path) or ".." in path.split("/"):
        raise Skip("image_outside", f"the path {path!r} leaves the image folder {folder}")


def refuse_address(path: str) -> None:
    """Raises Skip for `http://…` and the like."""
    if _URL.match(path):
        raise Skip("image_missing", f"{path[:200]!r} is an address: download the images first (img2dataset)")


def read_inside(folder: Path, path: str) -> bytes:
    """The bytes of `folder/path`. A path that names no file is also read as Windows writes it, and percent-encoded.

    Raises:
        Skip: for a path that leads out of the folder (absolute, `..`, a link), a missing or over-large file, or no
        regular file.
        DataError: for an I/O error, which is never a reason to skip.
    """
    missing: Skip | None = None
    for spelling in dict.fromkeys((path, path.replace("\\", "/"), unquote(path.replace("\\", "/")))):
        refuse_outside(folder, spelling)
        try:
            return _read(folder, _below(folder, spelling))
        except Skip as skip:
            if skip.fault != "image_missing":
                raise
            missing = missing or skip
    assert missing is not None
    raise missing


def _below(folder: Path, path: str) -> str:
    """An absolute path inside the folder, from there on."""
    return path.removeprefix(f"{folder.absolute()}{os.sep}")


def _read(folder: Path, path: str) -> bytes:
    full = os.path.join(folder, path)
    try:
        real = os.path.realpath(full, strict=True)
        root = _real_folder(str(folder))
        if os.path.commonpath([real, root]) != root:
            raise Skip("image_outside", f"{path!r} is a link that leaves the image folder {folder}: it leads to {real}")
        status = os.stat(real)
        if not stat.S_ISREG(status.st_mode):
            raise Skip("image_no_file", f"{path!r} in {folder} is not a regular file")
        if status.st_size > MAX_IMAGE_BYTES:
            raise Skip(
                "image_too_large", f"{path!r} has {status.st_size:,} bytes; at most {MAX_IMAGE_BYTES:,} are taken"
            )
        with open(real, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise Skip("image_missing", f"{path!r} does not exist in {folder}") from None
    except OSError as error:
        if error.errno in _BAD_NAME:
            raise Skip("image_missing", f"{path[:200]!r} in {folder} cannot be a file: {error.strerror}") from None
        raise DataError(
            f"cannot read image {full}: {error}. An I/O error is never skipped: "
            "correct the disk, mount or permission, then run the same "
            "command again; it resumes"
        ) from error
    except UnicodeEncodeError:
        raise Skip("not_unicode", f"the path {path!r} holds characters that no file name has") from None


_BAD_NAME = {errno.ENAMETOOLONG, errno.ELOOP}


@lru_cache(maxsize=8)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def shard_image(data: bytes, max_pixels: int, *, decode: bool) -> tuple[str, bytes, bool]:
    """(extension, bytes, whether converted) of an image.

    By default the header is read (format, size); `decode` decodes the image whole, which also finds truncated ones.

    Raises:
        Skip: for an image that cannot be decoded, or has more than `max_pixels` pixels.
    """
    extension = image_extension(data)
    try:
        if extension is None:
            return "png", _to_png(data, max_pixels), True
        if decode:
            decode_rgb(data, max_pixels)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]) as image:
                    _check_pixels(image, max_pixels)
        return extension, data, False
    except Skip:
        raise
    except SkipSample as error:
        raise Skip("image_too_large" if "exceeds" in str(error) else "image_undecodable", _message(error)) from None
    except Exception as error:  # decoders raise many kinds on broken bytes
        raise Skip(
            "image_undecodable",
            f"{len(data):,} bytes that start with {data[:8].hex(' ') or 'nothing'}: {_message(error)}",
        ) from None


def _message(error: Exception) -> str:
    """The error's message without PIL's memory address: what is skipped must read the same after a resume."""
    return re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", str(error))


def _check_pixels(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise Skip(
            "image_too_large",
            f"{image.width} x {image.height} pixels; at most {max_pixels:,} are taken (--max-image-pixels)",
        )


def _to_png(data: bytes, max_pixels: int) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(data), formats=_CONVERTED) as image:
            _check_pixels(image, max_pixels)
            image.load()
            upright = ImageOps.exif_transpose(image)
            out = io.BytesIO()
            _png_mode(upright).save(out, "PNG")
            return out.getvalue()


def _png_mode(image: Image.Image) -> Image.Image:
    """The image in a mode that PNG holds without loss; colour spaces that PNG lacks become RGB, as they would in
    training."""
    if image.mode in _KEPT_MODES:
        return image
    if image.mode.startswith("I"):  # 16 bits in 16 or in 32
        values = np.asarray(image)
        if values.min() >= 0 and values.max() < 1 << 16:
            return Image.fromarray(values.astype("<u2"))
    if image.mode in ("I", "F"):
        raise Skip(
            "image_undecodable",
            f"pixels of mode {image.mode} have no lossless PNG: convert the image to 8 or 16 bits a channel",
        )
    return image.convert("RGBA" if image.mode in ("PA", "La", "RGBa") else "RGB")
