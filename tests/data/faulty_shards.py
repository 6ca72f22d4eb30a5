"""Shards with faults for the tests of verify, shards and the fuzz campaign: tars made by hand, and seeded damage to
samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.data_samples import SLOTS, conversation, json_bytes, npy, words

Member = tuple[str, bytes]


def raw_tar(path: Path, members: Iterable[Member], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar with exactly these (name, content) members, by Python's tarfile."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def picture(seed: int, form: str = "PNG", width: int = 12, height: int = 9, **options: object) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=form, **options)
    return buffer.getvalue()


FORMS = (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))


def sound(kind: str, seed: int) -> dict[str, bytes]:
    """The fields of a good sample of `kind` ("stored": generation with VQ ids)."""
    extension, form = FORMS[seed % 3]
    if kind == "text":
        return {"txt": words(seed, 6).encode()} if seed % 2 else {"json": json_bytes({"text": words(seed, 7)})}
    if kind == "stored":
        return {
            "json": json_bytes({"caption": words(seed, 5)}),
            "vq.npy": npy(((np.arange(SLOTS) + seed) % 64).astype(np.uint16)),
        }
    document = (
        conversation(f"<image>\n{words(seed, 4)}", words(seed + 9, 4))
        if kind == "understanding"
        else json_bytes({"caption": words(seed, 6)})
    )
    return {extension: picture(seed, form), "json": document}


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Damage as it happens: cut off, bits turned, a stretch zeroed, repeated, taken out or replaced."""
    if not data:
        return data
    changed = bytearray(data)
    at = int(random.integers(len(data)))
    length = int(random.integers(1, max(2, len(data) // 3)))
    match int(random.integers(6)):
        case 0:
            return bytes(changed[:at])
        case 1:
            for place in random.integers(len(data), size=int(random.integers(1, 9))):
                changed[place] ^= 1 << int(random.integers(8))
        case 2:
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        case 3:
            changed[at:at] = changed[at : at + length]
        case 4:
            del changed[at : at + length]
        case _:
            changed[at : at + length] = random.bytes(len(changed[at : at + length]))
    return bytes(changed)


NASTY_TEXT = (
    b"",
    b"   \n\t",
    b"\xff\xfe\xfa",
    b"caf\xe9",
    b"\xed\xa0\x80",
    "\u200b\ufeff".encode(),
    b"\0\0\0",
    "\U0001f600 <image> <|User|>".encode(),
    b"x" * 3000,
)
NASTY_JSON = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"[" * 50_000,
    b'{"a":' * 30_000,
    b'{"caption": ' + b"1" * 5000 + b"}",
    b'{"caption": 1e999, "text": NaN}',
    b'{"caption": "\\ud800", "text": "\\udfff"}',
    b'{"caption": "\\u0000", "text": "\\u0000"}',
    b'{"caption": "", "text": " "}',
    b'{"caption": null, "text": {}, "conversations": []}',
    b'{"conversations": [{"from": "human"}]}',
    b'{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": ""}]}',
    b'{"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "a"}]}',
    b'{"conversations": [["human", "a"], ["gpt", "b"]]}',
    b'{"conversations": {"0": 1}}',
    "\ufeff{}".encode(),
    b'{"caption": "a", "caption": 7}',
)


def object_npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}] * SLOTS, dtype=object), allow_pickle=True)
    return buffer.getvalue()


def nasty_npy() -> tuple[bytes, ...]:
    good = npy(np.zeros(SLOTS, np.uint16))
    return (
        b"",
        good[:40],
        good[:-1],
        npy(np.zeros(SLOTS + 1, np.uint16)),
        npy(np.zeros(SLOTS, np.int64)),
        npy(np.zeros((SLOTS, 1), np.uint16)),
        npy(np.full(SLOTS, 64, np.uint16)),
        npy(np.full(SLOTS, 65535, np.uint16)),
        npy(np.zeros(SLOTS, ">u2")),
        object_npy(),
        good.replace(f"({SLOTS},)".encode(), b"(" + b"9" * (len(str(SLOTS)) + 2) + b")"),
        b"\x93NUMPY\x09\x09" + good[8:],
        b"PK\x03\x04" + good,
    )
