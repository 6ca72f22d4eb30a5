"""The keys of the schema with what stands under them there: for `jp-train config`, docs/configuration.md and nearest
names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jp_train.config import schema
from jp_train.config.schema import RunConfig


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key or section. `name`: dotted, with NAME where users choose a name; `kind`: its type; `owner`: the
    dataclass that has it; `section`: the dataclass of its own keys, None for a value."""

    name: str
    kind: Any
    owner: type
    section: type | None

    @property
    def field(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def default(self) -> Any:
        """Enumerations as their words."""
        value = getattr(self.owner(), self.field)
        return value.value if isinstance(value, Enum) else value

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it accepts; empty for numbers, texts and lists."""
        is_choice = isinstance(self.kind, type) and issubclass(self.kind, Enum)
        return tuple(member.value for member in self.kind) if is_choice else ()

    @property
    def meaning(self) -> str:
        """What the schema says about it; empty where the name says all."""
        return meanings()[self.owner.__name__].get(self.field, "")


def keys(owner: type = RunConfig, prefix: str = "") -> Iterator[Key]:
    """All keys in the order of the schema, each section before its keys."""
    types = get_type_hints(owner)
    for field in fields(owner):
        kind = types[field.name]
        name, section = f"{prefix}{field.name}", section_of(kind)
        yield Key(name=name, kind=kind, owner=owner, section=section)
        if section is not None:
            yield from keys(section, f"{name}." if section is kind else f"{name}.NAME.")


def section_of(kind: Any) -> type | None:
    """The dataclass of a section's keys, or of each of its named entries; None for the type of a value."""
    inner: Any = get_args(kind)[1] if get_origin(kind) is dict else kind
    return inner if isinstance(inner, type) and is_dataclass(inner) else None


@cache
def meanings() -> dict[str, dict[str, str]]:
    """{class: {field, or "" for the class: the string under it}} of schema.py."""
    assert schema.__file__ is not None
    result: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(schema.__file__).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = {"": ast.get_docstring(node) or ""}
        for field, below in zip(node.body, node.body[1:], strict=False):
            if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                texts[field.target.id] = str(below.value.value)
        result[node.name] = {name: " ".join(text.split()) for name, text in texts.items()}
    return result
