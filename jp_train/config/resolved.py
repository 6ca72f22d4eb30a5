"""A configuration as `jp-train config` shows it: every key with its value, where that comes from, and what it means."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf

from jp_train.config.keys import Key, keys, meanings, section_of
from jp_train.config.load import config_layers, key_origins, load_config, preset_files, preset_names
from jp_train.config.schema import RunConfig
from jp_train.errors import ConfigError, did_you_mean

COLUMNS = 118


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A key of a resolved configuration. `origin`: the layer that its value comes from; None for a section, whose
    keys follow one `depth` deeper."""

    name: str
    depth: int
    meaning: str
    value: Any = None
    origin: str | None = None


def resolved(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[Entry]:
    """All keys of a configuration in the order of the schema. Raises as `load_config`."""
    config = load_config(path, overrides)
    values: Any = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return list(_entries(RunConfig, values, key_origins(config_layers(path, overrides))))


def _entries(
    owner: type, values: Mapping[str, Any], origins: Mapping[str, str], prefix: str = "", depth: int = 0
) -> Iterator[Entry]:
    types, texts = get_type_hints(owner), meanings()[owner.__name__]
    for field in fields(owner):
        name, value, kind = f"{prefix}{field.name}", values[field.name], types[field.name]
        meaning, section = texts.get(field.name, ""), section_of(kind)
        if section is not None and section is kind:
            yield Entry(name=name, depth=depth, meaning=meanings()[section.__name__][""])
            yield from _entries(section, value, origins, f"{name}.", depth + 1)
        elif section is not None and value:
            yield Entry(name=name, depth=depth, meaning=meaning)
            for part, settings in value.items():
                yield Entry(name=f"{name}.{part}", depth=depth + 1, meaning="")
                yield from _entries(section, settings, origins, f"{name}.{part}.", depth + 2)
        else:
            yield Entry(name=name, depth=depth, meaning=meaning, value=value, origin=origins.get(name, "default"))


def as_yaml(entries: Sequence[Entry]) -> str:
    """YAML that loads again: the meaning of each key above it, the origin of its value behind it."""
    lines = ["# Behind each value: where it comes from. Numbers in brackets: docs/open_points.md"]
    shown = set()
    for entry in entries:
        indent = "  " * entry.depth
        if not entry.depth:
            lines.append("")
        head = f"{indent}{_plain(entry.name.rpartition('.')[2])}:"
        if entry.meaning not in shown:
            lines += _wrapped(entry.meaning, f"{indent}# ")
        lines.append(head if entry.origin is None else f"{head} {_plain(entry.value)}  # {entry.origin}")
        shown.add(entry.meaning)
    return "\n".join(lines)


def as_json(entries: Sequence[Entry]) -> str:
    """One object: {dotted key: {value, from, meaning}}."""
    values = [entry for entry in entries if entry.origin is not None]
    return json.dumps({e.name: {"value": e.value, "from": e.origin, "meaning": e.meaning} for e in values})


def matching_keys(pattern: str) -> list[Key]:
    """The keys, without sections, whose dotted name has `pattern` in it. Raises ConfigError where there is none."""
    found = [key for key in keys() if key.section is None and pattern.lower() in key.name.lower()]
    if not found:
        raise ConfigError(f"no key has {pattern!r} in its name{did_you_mean(pattern, [key.field for key in keys()])}")
    return found


def keys_text(found: Sequence[Key]) -> str:
    """Each key with its default, the words that it accepts, and its meaning below."""
    lines = []
    for key in found:
        words = f"  # {' | '.join(key.choices)}" if key.choices else ""
        lines += [f"{key.name}: {_plain(key.default)}{words}", *_wrapped(key.meaning, "    ")]
    return "\n".join(lines)


def keys_json(found: Sequence[Key]) -> str:
    """One object: {dotted key: {default, choices, meaning}}."""
    about = {key.name: {"default": key.default, "choices": key.choices, "meaning": key.meaning} for key in found}
    return json.dumps(about)


def presets_text() -> str:
    """Every preset below its model, each with the sentence at the head of its file."""
    lines: list[str] = []
    for name in preset_names():
        model = f"{name.partition('/')[0]}: {_head(preset_files(name)[0])}"
        lines += [] if model in lines else [model]
        lines.append(f"  {name:<22} {_head(preset_files(name)[-1])}")
    return "\n".join(lines)


def presets_json() -> str:
    """One object: {name: the sentence at the head of its file}."""
    return json.dumps({name: _head(preset_files(name)[-1]) for name in preset_names()})


def _head(file: Path) -> str:
    return file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, COLUMNS, initial_indent=indent, subsequent_indent=indent)


def _plain(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=1 << 30, sort_keys=False).strip()
    return json.dumps(value) if "\n" in text else text[1:-1]
