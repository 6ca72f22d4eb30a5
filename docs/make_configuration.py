"""`python docs/make_configuration.py` writes configuration.md from jp_train/config/schema.py: every key with its
default, its values and the comment that stands under it there."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jp_train.config import schema
from jp_train.config.load import preset_names

PAGE = Path(__file__).with_name("configuration.md")
HEAD = (
    "Every key of a run's YAML with its default. `docs/make_configuration.py` writes this page from "
    "`jp_train/config/schema.py`: change the comments there, then run `make docs`. Numbers in brackets are "
    "[open points of the papers](open_points.md).",
    "Order of layers, later ones win: these defaults, the preset, the recipe, the YAML file, "
    "`key=value` on the command "
    "line. A key that is not on this page stops every command with the nearest valid name. Paths follow the **working "
    "directory**, not the place of the YAML; `data.sources.NAME.shards` follows `data.root`, and a `recipe` is also "
    "looked for beside the file that names it.",
)


def comments() -> dict[str, dict[str, str]]:
    """{class: {field or "": the string under it}} of schema.py."""
    assert schema.__file__ is not None
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(schema.__file__).read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = {"": ast.get_docstring(node) or ""}
        for field, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(below):
                texts[field.target.id] = below.value.value  # type: ignore[attr-defined]
        found[node.name] = {name: " ".join(text.split()) for name, text in texts.items()}
    return found


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def section(cls: Any, prefix: str, texts: dict[str, dict[str, str]]) -> Iterator[str]:
    """The lines of one dataclass and of those inside it."""
    types, defaults = get_type_hints(cls), cls()
    inner: list[tuple[Any, str]] = []
    yield f"## `{prefix.rstrip('.')}`" if prefix else "## The root"
    yield ""
    if about := texts[cls.__name__][""]:
        yield from (_wrapped(_linked(about)), "")
    for field in fields(cls):
        kind = types[field.name]
        text = texts[cls.__name__].get(field.name, "")
        if is_dataclass(kind):
            inner.append((kind, f"{prefix}{field.name}."))
            continue
        if get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            inner.append((get_args(kind)[1], f"{prefix}{field.name}.NAME."))
            continue
        what = f"- **`{prefix}{field.name}`** · {_values(kind, getattr(defaults, field.name))}"
        yield _wrapped(f"{what}: {_linked(text)}" if text else what, after="  ")
    yield ""
    for kind, name in inner:
        yield from section(kind, name, texts)


def _values(kind: Any, default: Any) -> str:
    if isinstance(default, Enum):
        default = default.value
    shown = json.dumps(default) if default is None or default == "" or isinstance(default, bool) else str(default)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"`{shown}`, of {', '.join(f'`{member.value}`' for member in kind)}"
    return f"`{shown}`"


def _linked(text: str) -> str:
    """Open points as links."""
    return re.sub(r"\[(\d+)\]", r"[[\1]](open_points.md)", text)


def page() -> str:
    """The whole page."""
    presets = f"Presets (`preset:`): {', '.join(f'`{name}`' for name in preset_names())}."
    paragraphs = ["# Configuration keys", *(_wrapped(text) for text in (*HEAD, presets))]
    return "\n\n".join(paragraphs) + "\n\n" + "\n".join(section(schema.RunConfig, "", comments())).rstrip() + "\n"


def _wrapped(text: str, after: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=after, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
