"""Every key of the schema: words that it accepts, and the way through a file and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from jp_train.config import choices, dump_config, load_config
from jp_train.config.schema import MODULES, RunConfig

CHOICES = [
    kind for kind in vars(choices).values() if isinstance(kind, type) and issubclass(kind, Enum) and kind is not Enum
]


def word_keys(schema: Any, prefix: str = "") -> Iterator[tuple[str, type[Enum]]]:
    """(dotted key, its enumeration) of every key whose value is a word."""
    types = get_type_hints(schema)
    for field in fields(schema):
        kind = types[field.name]
        if isinstance(kind, type) and issubclass(kind, Enum):
            yield f"{prefix}{field.name}", kind
        elif is_dataclass(kind):
            yield from word_keys(kind, f"{prefix}{field.name}.")
        elif get_origin(kind) is dict and prefix == "validation.":  # data.sources have the same class
            yield from word_keys(get_args(kind)[1], f"{prefix}{field.name}.s.")


KEYS = dict(word_keys(RunConfig))


def test_each_choice_is_written_as_it_is_named_and_some_key_takes_it() -> None:
    assert all(member.name == member.value for kind in CHOICES for member in kind)
    assert set(KEYS.values()) == set(CHOICES)


def flow(tree: dict[str, Any]) -> str:
    """YAML in one line, with bare words as people write them."""
    items = (f"{key}: {flow(value) if isinstance(value, dict) else value}" for key, value in tree.items())
    return f"{{{', '.join(items)}}}"


@pytest.mark.parametrize("number", range(max(map(len, KEYS.values()))))
def test_every_word_that_a_key_accepts_survives_a_file_and_the_way_back(number: int, tmp_path: Path) -> None:
    """Also `off`, which is a boolean in YAML. Member `number` of every key, counted from another one for each key."""
    words = {key: list(kind)[(number + shift) % len(kind)] for shift, (key, kind) in enumerate(KEYS.items())}
    if words["data.vq_ids"] is choices.VqIds.require:  # impossible with `random`, which has its turn in another file
        words["data.crop"] = choices.Crop.centre
    tree: dict[str, Any] = {"preset": "tiny/stage1", "validation": {"sources": {"s": {"shards": "s.tar"}}}}
    for key, word in words.items():
        *parents, leaf = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[leaf] = word.value
    (tmp_path / "run.yaml").write_text(flow(tree))
    config = load_config(tmp_path / "run.yaml")
    (tmp_path / "back.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "back.yaml") == config
    for key, word in words.items():
        value: Any = config
        for part in key.split("."):
            value = value[part] if isinstance(value, dict) else getattr(value, part)
        assert value is word, key


def test_the_modules_that_may_learn_are_those_of_the_learning_rate_factors() -> None:
    assert {field.name for field in fields(RunConfig().optimizer.lr_scale)} == set(MODULES)
