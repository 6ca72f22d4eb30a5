"""`python docs/make_configuration.py` writes configuration.md from jp_train/config/schema.py: every key with its
default, its values and the comment that stands under it there."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

from jp_train.config.keys import Key, keys, meanings
from jp_train.config.load import preset_names
from jp_train.config.schema import RunConfig

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


def lines() -> Iterator[str]:
    """Every section with its keys."""
    sections: dict[str, list[Key]] = {"": []}
    kinds: dict[str, type] = {"": RunConfig}
    for key in keys():
        if key.section is None:
            sections[key.name.rpartition(".")[0]].append(key)
        else:
            name = f"{key.name}.NAME" if get_origin(key.kind) is dict else key.name
            sections[name], kinds[name] = [], key.section
    for name, members in sections.items():
        yield f"## `{name}`" if name else "## The root"
        yield ""
        if about := meanings()[kinds[name].__name__][""]:
            yield from (_wrapped(_linked(about)), "")
        for key in members:
            head = f"- **`{key.name}`** · {_values(key)}"
            yield _wrapped(f"{head}: {_linked(key.meaning)}" if key.meaning else head, after="  ")
        if members:
            yield ""


def _values(key: Key) -> str:
    default = key.default
    shown = json.dumps(default) if default is None or default == "" or isinstance(default, bool) else str(default)
    return f"`{shown}`" + (f", of {', '.join(f'`{word}`' for word in key.choices)}" if key.choices else "")


def _linked(text: str) -> str:
    """Open points as links."""
    return re.sub(r"\[(\d+)\]", r"[[\1]](open_points.md)", text)


def page() -> str:
    """The whole page."""
    presets = f"Presets (`preset:`): {', '.join(f'`{name}`' for name in preset_names())}."
    paragraphs = ["# Configuration keys", *(_wrapped(text) for text in (*HEAD, presets))]
    return "\n\n".join(paragraphs) + "\n\n" + "\n".join(lines()).rstrip() + "\n"


def _wrapped(text: str, after: str = "") -> str:
    return textwrap.fill(text, 118, subsequent_indent=after, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
