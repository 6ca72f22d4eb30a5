"""Read the smoke run's shards back whole, for the plain-PyTorch pretraining and for the judges.

The trainer itself reads shards through ``jp_train.data``; this module reads a small source into memory.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jp_train.errors import DataError


def read_source(folder: Path) -> Iterator[dict[str, bytes]]:
    """Yield the samples of a shard folder in order: ``__key__`` (str) and extension to bytes.

    Raises:
        DataError: if the folder holds no shards.
    """
    shards = sorted(Path(folder).glob("*.tar"))
    if not shards:
        raise DataError(f"no .tar shards in {folder}")
    for shard in shards:
        with tarfile.open(shard) as archive:
            sample: dict[str, Any] = {}
            for member in archive:
                key, _, extension = member.name.partition(".")
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample["__key__"] = key
                file = archive.extractfile(member)
                assert file is not None, "shards hold plain files only"
                sample[extension] = file.read()
            if sample:
                yield sample


def note_of(sample: dict[str, bytes]) -> dict[str, Any]:
    """The sample's ``json`` member."""
    return json.loads(sample["json"])


def image_of(sample: dict[str, bytes], side: int) -> np.ndarray:
    """The sample's image resized (bicubic, antialiased) to uint8 ``[side, side, 3]``; smoke images are square."""
    image = Image.open(io.BytesIO(sample["png"])).convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def texts_of(sample: dict[str, bytes]) -> list[str]:
    """Every text of a sample as the tokenizer will see it: caption, document, or questions and answers."""
    if "txt" in sample:
        return [sample["txt"].decode()]
    note = note_of(sample)
    if "caption" in note:
        return [note["caption"]]
    return [turn["value"].removeprefix("<image>\n") for turn in note["conversations"]]


def read_images(folders: list[Path], side: int, *, limit_each: int | None = None) -> np.ndarray:
    """Images of several sources as uint8 ``[n, side, side, 3]``, at most ``limit_each`` of each source."""
    images = []
    for folder in folders:
        for number, sample in enumerate(read_source(folder)):
            if limit_each is not None and number >= limit_each:
                break
            images.append(image_of(sample, side))
    return np.stack(images)
