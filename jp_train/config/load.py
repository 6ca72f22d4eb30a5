"""Reading a run's configuration: defaults < preset < recipe < the YAML file < `key=value`, strict at every level.

A key that the schema does not know stops the run (unknown_keys.py): a misspelt `warmup_step` that is silently ignored
costs a 270K-step run. YAML is read by OmegaConf's safe loader; nothing in a configuration is executed, unless
`allow_code` lets a source name a function.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jp_train.config.deepspeed import with_file
from jp_train.config.schema import RunConfig
from jp_train.config.unknown_keys import check_keys
from jp_train.config.validate import validate
from jp_train.errors import ConfigError, one_of
from jp_train.files import write_atomically

PRESETS = Path(__file__).resolve().parent.parent / "presets"
SHARED_MODEL_FILE = "model.yaml"


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """The resolved, validated configuration of one run as plain dataclasses.

    `path`: a launch YAML (or a run folder's `config.yaml`); `overrides`: `key.sub=value` strings, later ones win.
    Raises ConfigError: unreadable file, unknown key (with the nearest valid one), wrong type, impossible combination.
    """
    merged = OmegaConf.structured(RunConfig)
    layers = config_layers(path, overrides)
    for origin, layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {_first_line(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error
    assert isinstance(config, RunConfig)
    if given_file := config.engine.deepspeed_config:
        file = _find("engine.deepspeed_config", given_file, beside=Path(path).parent)
        config.engine.deepspeed = with_file(config, file)
        config.engine.deepspeed_config = None  # what it says is part of the configuration from here on
    try:
        validate(config)
    except ConfigError as error:
        raise ConfigError(f"{error}{_elsewhere(str(error), layers)}") from None
    return config


def load_stored_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> RunConfig:
    """`load_config` of a file that a run has written: it is whole, and its preset and recipe may have changed since."""
    return load_config(path, ["preset=null", "recipe=null", *overrides])


def config_layers(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> list[tuple[str, DictConfig]]:
    """What is merged over the defaults, in this order, each with its origin in words; only keys of the schema.
    Raises ConfigError as `load_config`, but for wrong types and combinations."""
    path = Path(path)
    run = _read_yaml(path)
    given = _parse_overrides(overrides)
    # `preset=null` turns off the one that the file names: a run's config.yaml is whole without them
    preset, recipe = ((given if key in given else run).get(key) for key in ("preset", "recipe"))
    layers: list[tuple[str, DictConfig]] = []
    if preset:
        layers += [(f"preset {preset}", _read_yaml(file)) for file in preset_files(str(preset))]
    if recipe:
        layers.append((f"recipe {recipe}", _read_yaml(_find("recipe", str(recipe), beside=path.parent))))
    for origin, layer in layers:
        if "allow_code" in layer:
            raise ConfigError(f"{origin} sets allow_code, which only you can: give it in {path} or as an override")
    layers += [(str(path), run), ("the command line", given)]
    check_keys(layers)
    for _, layer in layers:
        _restore_off(layer, RunConfig)
    return layers


def key_origins(layers: Sequence[tuple[str, DictConfig]]) -> dict[str, str]:
    """{dotted key: the last layer that gives it}, sections too; what is not in it has its default."""

    def dotted(tree: Any, prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            yield f"{prefix}{key}"
            if isinstance(value, Mapping):
                yield from dotted(value, f"{prefix}{key}.")

    origins: dict[str, str] = {}
    for origin, layer in layers:
        origins |= dict.fromkeys(dotted(OmegaConf.to_container(layer, resolve=False)), origin)
    return origins


def _elsewhere(message: str, layers: Sequence[tuple[str, DictConfig]]) -> str:
    """Where values in `message` come from that are not in the user's own file: ` (KEY is from preset ...)`."""
    origins, own = key_origins(layers), [origin for origin, _ in layers[-2:]]
    named = dict.fromkeys(key for key in re.findall(r"\w+(?:\.\w+)+", message) if origins.get(key, own[0]) not in own)
    return f" ({', '.join(f'{key} is from {origins[key]}' for key in named)})" if named else ""


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML; reading it back gives an equal RunConfig. It names no recipe: that may have
    changed since, and would add its sources."""
    container = OmegaConf.to_container(OmegaConf.structured(replace(config, recipe=None)), enum_to_str=True)
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
        raise ConfigError(f"unknown preset {name!r}{one_of(name, preset_names())}")
    model = file.parent / SHARED_MODEL_FILE
    return [model, file] if model.exists() else [file]


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


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        key, sign, _ = text.partition("=")
        if not sign or not key or key.startswith("-"):
            raise ConfigError(f"{text!r} is not an override: write key=value, for example optimizer.lr=1e-4")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except OmegaConfBaseException as error:
        raise ConfigError(f"the command line: {_first_line(error)}") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"the command line: a value is no YAML (a `:` needs a space after it): {reason}") from error


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


def _find(key: str, name: str, beside: Path) -> Path:
    """The file that `key` names: as given, or relative to the folder (and its parents) of the YAML that names it."""
    candidates = [Path(name), *(folder / name for folder in (beside, *beside.resolve().parents))]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ConfigError(f"{key} {name!r} is neither a file here ({Path.cwd()}) nor beside {beside}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), None)
    return f"{key}: {lines[0]}" if key else lines[0]
