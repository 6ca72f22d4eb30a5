"""Keys that the schema does not have, and sections that are none: all of them in one error, each with what was
meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from jp_train.config.keys import keys
from jp_train.config.schema import RunConfig
from jp_train.errors import ConfigError, did_you_mean


def check_keys(layers: Sequence[tuple[str, DictConfig]]) -> None:
    """Raise ConfigError when a layer (its origin in words, its content) has keys that the schema does not have, or
    a plain value where a section belongs: all of them, with the nearest valid names."""
    problems = []
    for origin, layer in layers:
        content = OmegaConf.to_container(layer, resolve=False)
        if "${oc." in str(content):
            raise ConfigError(
                f"{origin}: `${{oc.env:...}}` is not allowed: the resolved configuration is stored and logged, and "
                "would carry the value with it; write the value, or leave it to the library that reads the environment "
                "itself"
            )
        problems += [f"{origin}: {problem}" for problem in _problems(content, RunConfig, "")]
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} keys:", *problems]))


def _problems(given: Any, kind: Any, name: str) -> Iterator[str]:
    """What is wrong with the keys of `given` and below, where the schema has `kind`."""
    if is_dataclass(kind):
        if not isinstance(given, Mapping):
            yield f"{name} is a section, found {_shown(given)}; {_keys_of(kind, name)}"
            return
        types = get_type_hints(kind)
        for key, value in given.items():
            dotted = f"{name}.{key}" if name else str(key)
            if key in types:
                yield from _problems(value, types[key], dotted)
            else:
                yield f"unknown key {dotted!r}{_nearest(dotted) or f'; {_keys_of(kind, name)}'}"
    elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
        if not isinstance(given, Mapping):
            yield f"{name} is a section of named entries, `{name}: {{NAME: {{...}}}}`, found {_shown(given)}"
            return
        for key, value in given.items():
            yield from _problems(value, get_args(kind)[1], f"{name}.{key}")


def _shown(given: Any) -> str:
    return "nothing" if given is None else "a list" if isinstance(given, list) else repr(given)


def _keys_of(kind: Any, name: str) -> str:
    return f"keys of {name or 'a configuration'}: {', '.join(field.name for field in fields(kind))}"


def _as_given(key: str, name: str) -> str:
    """A key of the schema with the names that `name` chooses where the schema has NAME, as far as the two agree."""
    parts, given = key.split("."), name.split(".")
    for number, (part, chosen) in enumerate(zip(parts, given, strict=False)):
        if part == "NAME":
            parts[number] = chosen
        elif part != chosen:
            break
    return ".".join(parts)


def _nearest(name: str) -> str:
    """`; did you mean ...?`: a key of the same section that has all words of `name` (`steps` of `training_steps`), then
    the nearest by whole dotted path, then by the last part under any parent."""
    valid = [_as_given(key.name, name) for key in keys()]
    section, _, last = name.rpartition(".")
    for key in valid:
        if key.rpartition(".")[0] == section and set(last.split("_")) <= set(key.rpartition(".")[2].split("_")):
            return f"; did you mean {key!r}?"
    leaves: dict[str, str] = {}
    for key in valid:
        leaves.setdefault(key.rsplit(".", 1)[-1], key)
    leaf = difflib.get_close_matches(last, leaves, n=1, cutoff=0.6)
    return did_you_mean(name, valid, cutoff=0.7) or (f"; did you mean {leaves[leaf[0]]!r}?" if leaf else "")
