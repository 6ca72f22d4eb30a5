"""`jp-train config`: the shown configuration is the one that runs, with the truth about where values come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.config import load_config, preset_names
from jp_train.config.keys import keys
from jp_train.config.resolved import (
    as_json,
    as_yaml,
    keys_json,
    keys_text,
    matching_keys,
    presets_json,
    presets_text,
    resolved,
)
from jp_train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = sorted([*(ROOT / "launch").glob("*.yaml"), *(ROOT / "examples").glob("*/*.yaml")])
GIVEN = [
    "data.system_prompt='say \"no\": #1\\n'",
    "logging.wandb.tags=[off,1e-4]",
    "data.vq_ids=off",
    "optimizer.eps=1e-9",
]


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("preset: janus_pro_1b/stage2\nrecipe: recipe.yaml\noptimizer: {lr: 0.5}\n")
    (tmp_path / "recipe.yaml").write_text(
        "data:\n  pool_size: 7\n  sources:\n    'und: a': {kind: understanding, shards: u.tar, license: 'CC 4.0'}\n"
        "    books: {kind: text, shards: b.tar}\n    art: {kind: generation, shards: a.tar}\n"
    )
    return file


@pytest.mark.parametrize("overrides", [[], GIVEN], ids=["file", "overrides"])
@pytest.mark.parametrize("comments", [True, False])
def test_the_shown_configuration_loads_to_an_equal_one(launch, tmp_path, comments, overrides):
    text = as_yaml(resolved(launch, overrides))
    if not comments:
        lines = [line.rpartition("  # ")[0] or line for line in text.splitlines()]
        text = "\n".join(line for line in lines if not line.strip().startswith("#"))
    (tmp_path / "shown.yaml").write_text(text)
    assert load_config(tmp_path / "shown.yaml") == load_config(launch, overrides)


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.stem)
def test_every_shipped_configuration_is_shown_as_it_loads(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "shown.yaml").write_text(as_yaml(resolved(file)))
    assert load_config(tmp_path / "shown.yaml") == load_config(file)


def test_each_value_says_which_layer_it_comes_from(launch):
    found = json.loads(as_json(resolved(launch, ["data.pool_size=9", "stage.early_stop.at_step=null"])))
    origin = {name: about["from"] for name, about in found.items()}
    assert {origin[key] for key in ("stage.batch_size", "optimizer.warmup_steps")} == {"preset janus_pro_1b/stage2"}
    assert origin["data.sources.und: a.license"] == "recipe recipe.yaml"
    assert origin["optimizer.lr"] == origin["preset"] == str(launch)
    assert origin["data.pool_size"] == origin["stage.early_stop.at_step"] == "the command line"
    assert origin["seed"] == origin["data.sources.art.weight"] == "default"
    assert found["data.pool_size"]["value"] == 9


def test_the_meaning_of_a_key_stands_above_it(launch):
    lines = as_yaml(resolved(launch)).splitlines()
    at = lines.index("  batch_unit: packed  # preset janus_pro_1b/stage2")
    assert lines[at - 1] == "  # [1] what `batch_size` counts: documents, or packed rows of `data.seq_len` tokens."


def test_keys_are_listed_with_default_words_and_meaning_and_filtered_by_name():
    everything = keys_text(matching_keys(""))
    assert all(f"{key.name}: " in everything for key in keys() if key.section is None)
    (unit,) = matching_keys("ratio_UNIT")
    assert (
        keys_text([unit]) == "stage.ratio_unit: samples  # samples | tokens\n    [2] what the mixture's shares count."
    )
    assert json.loads(keys_json([unit]))["stage.ratio_unit"]["choices"] == ["samples", "tokens"]
    with pytest.raises(ConfigError, match="no key has 'warm_up' in its name; did you mean 'warmup_"):
        matching_keys("warm_up")


def test_every_preset_is_listed_with_what_it_is_for():
    text, heads = presets_text(), json.loads(presets_json())
    assert set(heads) == set(preset_names())
    assert all(f"  {name:<22} {head}" in text and len(head) > 20 for name, head in heads.items())
    assert "tiny: The 1B's modules" in text
