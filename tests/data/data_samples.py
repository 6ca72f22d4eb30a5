"""What the data tests write into shards: small pictures, captions, dialogues and texts, all functions of a number."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

IMAGE_SIZE, PATCH = 32, 8
SLOTS = (IMAGE_SIZE // PATCH) ** 2


def png(seed: int, width: int = 40, height: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> Path:
    """A tar with the given (key, {extension: bytes}), written by webdataset."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
        for key, fields in samples:
            writer.write({"__key__": key, **fields})
    return path


def json_bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def conversation(question: str, answer: str) -> bytes:
    return json_bytes({"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]})


WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "statement",
    "value",
    "of",
    "object",
    "in",
    "Python",
    "class",
    "defines",
    "returns",
    "square",
    "circle",
    "and",
    "small",
    "large",
]


def words(seed: int, count: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, count)) + "."


def generation_samples(count: int, first: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"g{n:04d}", {"png": png(n), "json": json_bytes({"caption": f"{words(n, 3 + n % 5)} {words(n + 1, 4)}"})})
        for n in range(first, first + count)
    ]


def several_samples(count: int) -> list[tuple[str, dict[str, bytes]]]:
    """Sample n has n % 5 + 1 images: in turn each in its place in two questions, without a word where, in a text."""
    samples = []
    for n in range(count):
        images = n % 5 + 1
        files = {f"{number}.png": png(100 * n + number, 30, 50) for number in range(images)}
        if n % 3 == 2:
            parts = [words(n + number, 2) for number in range(images + 1)]
            files["json"] = json_bytes({"text": "<image>".join(parts)})
        else:
            marked = "<image> " * (n % 3 == 0)
            messages = [
                {"from": "human", "value": f"{marked * (images // 2)}{words(n, 4)}"},
                {"from": "gpt", "value": words(n + 9, 3)},
                {"from": "human", "value": f"{words(n + 1, 2)} {marked * (images - images // 2)}{words(n, 2)}"},
                {"from": "gpt", "value": words(n + 5, 4)},
            ]
            files["json"] = json_bytes({"conversations": messages})
        samples.append((f"s{n:04d}", files))
    return samples


def understanding_samples(count: int) -> list[tuple[str, dict[str, bytes]]]:
    return [
        (f"u{n:04d}", {"png": png(n, 30, 50), "json": conversation(f"<image>\n{words(n, 4)}", words(n + 9, 3 + n % 7))})
        for n in range(count)
    ]


def text_samples(count: int) -> list[tuple[str, dict[str, bytes]]]:
    return [(f"t{n:04d}", {"txt": words(n, 5 + 37 * (n % 9)).encode()}) for n in range(count)]


def npy(ids: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, ids)
    return buffer.getvalue()


def stored_samples(count: int) -> list[tuple[str, dict[str, bytes]]]:
    """Generation samples without a picture, with stored VQ ids."""
    return [
        (
            f"s{n:04d}",
            {"json": json_bytes({"caption": words(n, 5)}), "vq.npy": npy((np.arange(SLOTS) + n).astype(np.uint16))},
        )
        for n in range(count)
    ]
