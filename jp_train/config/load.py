"""Reading a run's configuration: defaults < preset < recipe < the YAML file < `key=value`, strict at every level.

A key that the schema does not know stops the run with the nearest valid name: a misspelt `warmup_step` that is silently
ignored costs a 270K-step run. YAML is read by OmegaConf's safe loader; nothing in a configuration is executed.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jp_train.config.schema import RunConfig
from jp_train.config.validate import validate
from jp_train.errors import ConfigError, did_you_mean
from jp_train.files import write_atomically

PRESETS = Path(__file__).resolve().parent.parent / "presets"
SHARED_MODEL_FILE = "model.yaml"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved, validated configuration of one run as plain dataclasses.

    `path`: a launch YAML (or a run folder's `config.yaml`); `overrides`: `key.sub=value` strings, later ones win.
    Raises ConfigError: unreadable file, unknown key (with the nearest valid one), wrong type, impossible combination.
    """
    path = Path(path)
    run = _read_yaml(path)
    given = _parse_overrides(overrides)
    # `preset=null` turns off the one that the file names: a run's config.yaml is whole without them
    preset, recipe = ((given if key in given else run).get(key) for key in ("preset", "recipe"))

    layers: list[tuple[str, DictConfig]] = []
    if preset:
        layers += [(str(file), _read_yaml(file)) for file in preset_files(str(preset))]
    if recipe:
        layers.append((str(recipe), _read_yaml(_find(str(recipe), beside=path.parent))))
    layers += [(str(path), run), ("the command line", given)]

    merged = OmegaConf.structured(RunConfig)
    for origin, layer in layers:
        check_keys(layer, origin)
        _restore_off(layer, RunConfig)
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {_first_line(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    assert isinstance(config, RunConfig)
    validate(config)
    return config


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; reading it back gives an equal RunConfig (without preset and recipe files)."""
    container = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return OmegaConf.to_yaml(OmegaConf.create(container))


def save_config(config: RunConfig, path: str | os.PathLike[str]) -> None:
    """Write `dump_config` to `path` (atomically: a reader never sees half a file)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_config(config), writer=str(os.getpid()))


def preset_names() -> list[str]:
    """Names that `preset:` accepts."""
    return sorted(
        str(file.relative_to(PRESETS).with_suffix(""))
        for file in PRESETS.glob("*/*.yaml")
        if file.name != SHARED_MODEL_FILE
    )


def preset_files(name: str) -> list[Path]:
    """Files of one preset in merge order: the model shared by its stages, then the stage."""
    file = PRESETS / f"{name}.yaml"
    if name not in preset_names():
        raise ConfigError(
            f"unknown preset {name!r}{_nearest(name, preset_names())}; presets: {', '.join(preset_names())}"
        )
    model = file.parent / SHARED_MODEL_FILE
    return [model, file] if model.exists() else [file]


def check_keys(layer: DictConfig, origin: str) -> None:
    """Raise ConfigError for the first key of `layer` that the schema does not have."""
    plain = OmegaConf.to_container(layer, resolve=False)
    if "${oc." in str(plain):
        raise ConfigError(
            f"{origin}: `${{oc.env:...}}` is not allowed: the resolved configuration is stored and logged, and would "
            "carry the value with it; write the value, or leave it to the library that reads the environment itself"
        )
    for key in _unknown_keys(plain, RunConfig, ""):
        valid = list(_all_keys(RunConfig, ""))
        raise ConfigError(f"{origin}: unknown key {key!r}{_nearest(key, valid)}")


def _unknown_keys(given: Any, schema: Any, prefix: str) -> Iterator[str]:
    if is_dataclass(schema):
        if not isinstance(given, dict):
            return  # a wrong type: OmegaConf's own message names it
        types = get_type_hints(schema)
        for key, value in given.items():
            if key not in types:
                yield f"{prefix}{key}"
            else:
                yield from _unknown_keys(value, types[key], f"{prefix}{key}.")
    elif get_origin(schema) is dict and isinstance(given, dict):
        for key, value in given.items():
            yield from _unknown_keys(value, get_args(schema)[1], f"{prefix}{key}.")


def _restore_off(given: Any, schema: Any) -> None:
    """YAML reads a bare `off` as the boolean false: where the schema has an enumeration with that member, put the
    word back."""
    if not isinstance(given, DictConfig):
        return
    written = OmegaConf.to_container(given, resolve=False)
    assert isinstance(written, dict)
    types = get_type_hints(schema) if is_dataclass(schema) else {}
    for key in list(given):
        kind = get_args(schema)[1] if get_origin(schema) is dict else types.get(key)
        if isinstance(kind, type) and issubclass(kind, Enum):
            if written.get(key) is False and "off" in kind.__members__:
                given[key] = "off"
        elif kind is not None and (is_dataclass(kind) or get_origin(kind) is dict):
            _restore_off(given._get_node(key), kind)


def _all_keys(schema: Any, prefix: str) -> Iterator[str]:
    types = get_type_hints(schema)
    for field in fields(schema):
        yield f"{prefix}{field.name}"
        kind = types[field.name]
        if is_dataclass(kind):
            yield from _all_keys(kind, f"{prefix}{field.name}.")
        elif get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            yield from _all_keys(get_args(kind)[1], f"{prefix}{field.name}.NAME.")


def _nearest(name: str, valid: Sequence[str]) -> str:
    """`; did you mean ...?`: a key of the same section that has all words of `name` (`steps` of `training_steps`), then
    the nearest by whole dotted path, then by the last part under any parent."""
    section, _, last = name.rpartition(".")
    for key in valid:
        if key.rpartition(".")[0] == section and set(last.split("_")) <= set(key.rpartition(".")[2].split("_")):
            return f"; did you mean {key!r}?"
    leaves: dict[str, str] = {}
    for key in valid:
        leaves.setdefault(key.rsplit(".", 1)[-1], key)
    leaf = difflib.get_close_matches(last, leaves, n=1, cutoff=0.6)
    return did_you_mean(name, valid, cutoff=0.7) or (f"; did you mean {leaves[leaf[0]]!r}?" if leaf else "")


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        key, sign, _ = text.partition("=")
        if not sign or not key or key.startswith("-"):
            raise ConfigError(f"{text!r} is not an override: write key=value, for example optimizer.lr=1e-4")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the command line: {_first_line(error)}") from error


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except Exception as error:  # the YAML library raises its own family; all mean "not readable as YAML"
        raise ConfigError(f"{path}: not a readable YAML file: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level, found a {type(loaded).__name__}")
    return loaded


def _find(name: str, beside: Path) -> Path:
    """A recipe's file: as given, or relative to the folder (and its parents) of the YAML that names it."""
    candidates = [Path(name), *(folder / name for folder in (beside, *beside.resolve().parents))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"recipe {name!r} is neither a file here ({Path.cwd()}) nor beside {beside}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    return f"{key}: {lines[0]}" if key else lines[0]
