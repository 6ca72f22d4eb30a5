"""Images, videos and sound that a record has and an import does not read: such a record is no conversation of text."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from jp_train.data.dialogue import MEDIA_MARKER

_KEY = re.compile(r"(?P<image>image|img|picture)|video|audio|sound|media", re.IGNORECASE)
_ANSWERS = ("gpt", "assistant")


def is_media(key: str) -> bool:
    """Whether a column's name says that it has images, videos or sound."""
    return _KEY.match(key) is not None


def unread_media(record: Mapping[str, Any], read: Collection[str], turns: Any, remedy: str) -> str:
    """What a record shows besides the columns in `read`, or that a question of `turns` has the place of an image, a
    video or sound; with what to do (`remedy`, for images, takes the name of the column as `{}`). Empty for none."""
    for key, value in record.items():
        match = _KEY.match(key) if isinstance(key, str) and key not in read else None
        if match and not _is_empty(value):
            return f'"{key}" is not read: {remedy.format(key) if match["image"] else "only images and text are"}'
    for turn in turns if isinstance(turns, list) else ():
        if not isinstance(turn, Mapping) or turn.get("from") in _ANSWERS or not isinstance(turn.get("value"), str):
            continue
        if marker := MEDIA_MARKER.search(turn["value"]):
            return f"a question has {marker[0]}, and nothing that is read has what it stands for"
    return ""


def _is_empty(value: Any) -> bool:
    """Nothing, at any depth: null, "", [], {"bytes": null, "path": null}, 0."""
    if isinstance(value, Mapping):
        return all(map(_is_empty, value.values()))
    return all(map(_is_empty, value)) if isinstance(value, list) else not value
