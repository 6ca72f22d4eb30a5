"""A record (an object of JSON, a row of CSV or Parquet) -> an entry, by the names of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jp_train.data.tools.importers.entries import Entry, Skip
from jp_train.types import Kind

IMAGE_MARKER_PREFIX = "<image>\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns of a record hold what.

    Text sources read `conversations` where a record has it, else `text`. Understanding sources read `conversations`, else `question` + `caption`
    (where `question` is named), else `caption`. Generation sources read `caption`.
    """

    image: str = "image"
    caption: str = "caption"
    question: str | None = None
    text: str = "text"
    conversations: str = "conversations"
    id: str = "id"

    def used(self, kind: Kind) -> list[str]:
        """Columns that an import of `kind` may read."""
        if kind is Kind.TEXT:
            return [self.text, self.conversations, "messages", self.id]
        if kind is Kind.GENERATION:
            return [self.image, self.caption, self.id]
        return [self.image, self.caption, *([self.question] if self.question else []), self.conversations, "messages", self.id]


def record_entry(record: Any, number: int, name: str, columns: Columns, kind: Kind) -> Entry:
    """The entry of a record; what is wrong with it becomes the entry's `skip`."""
    try:
        if not isinstance(record, Mapping):
            raise Skip("bad_record", f"a {type(record).__name__} instead of an object with named values")
        note = {**_note(record, columns, kind), "source_id": name}
        slug = record.get(columns.id)
        slug = str(slug) if isinstance(slug, (str, int)) else ""
        if kind is Kind.TEXT:
            return Entry(number=number, name=name, note=note, slug=slug)
        image = _image(record, columns)
        if image is None and "conversations" in note:
            return Entry(number=number, name=name, note=note, slug=slug, text_only=True)
        if image is None:
            raise Skip("no_image", f'"{columns.image}" is empty; the record has {_names(record)}')
        return Entry(number=number, name=name, note=note, image=image, slug=slug)
    except Skip as skip:
        return Entry(number=number, name=name, skip=skip)


def _note(record: Mapping, columns: Columns, kind: Kind) -> dict[str, Any]:
    conversations = record.get(columns.conversations)
    if conversations is None:
        conversations = record.get("messages")
    if conversations is not None and kind is not Kind.GENERATION:
        return {"conversations": _turns(conversations)}
    if kind is Kind.TEXT:
        return {"text": _value(record, columns.text)}
    if columns.question is not None and kind is Kind.UNDERSTANDING:
        question, answer = _value(record, columns.question), _value(record, columns.caption)
        return {"conversations": [{"from": "human", "value": IMAGE_MARKER_PREFIX + question}, {"from": "gpt", "value": answer}]}
    return {"caption": _value(record, columns.caption)}


def _turns(conversations: Any) -> Any:
    """Messages of `role` and `content` as `from` and `value`; anything else is left to the sample check."""
    if not isinstance(conversations, list):
        return conversations
    return [
        {"from": turn["role"], "value": turn.get("content")} if isinstance(turn, dict) and "role" in turn and "from" not in turn else turn
        for turn in conversations
    ]


def _value(record: Mapping, column: str) -> str:
    if column not in record:
        raise Skip("bad_record", f'no "{column}"; the record has {_names(record)}')
    value = record[column]
    if not isinstance(value, str):
        raise Skip("bad_record", f'"{column}" is a {type(value).__name__}, expected text')
    return value


def _image(record: Mapping, columns: Columns) -> str | bytes | None:
    image = record.get(columns.image)
    if isinstance(image, list):
        if len(image) > 1:
            raise Skip("multi_image", f'"{columns.image}" lists {len(image)} pictures; jp_train takes one a sample')
        image = image[0] if image else None
    if isinstance(image, Mapping):  # the Image feature of Hugging Face datasets
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if image is None or image == "" or image == b"":
        return None
    if not isinstance(image, (str, bytes)):
        raise Skip("bad_record", f'"{columns.image}" is a {type(image).__name__}, expected a path or the bytes of a picture')
    return image


def _names(record: Mapping) -> str:
    return ", ".join(f'"{name}"' for name in list(record)[:8]) or "nothing"
