"""Strict merge, nearest names, and a dump that reads back."""

from dataclasses import replace
from pathlib import Path

import pytest

from jp_train.config import dump_config, load_config, preset_names, save_config
from jp_train.errors import ConfigError


@pytest.fixture
def launch(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("preset: janus_pro_1b/stage2\nrecipe: recipe.yaml\noptimizer: {lr: 0.5}\n")
    (tmp_path / "recipe.yaml").write_text(
        "data:\n  pool_size: 7\n  sources:\n"
        "    captions: {kind: understanding, shards: 'c-{000..003}.tar'}\n"
        "    books: {kind: text, shards: b.tar}\n"
        "    art: {kind: generation, shards: a.tar, weight: 2}\n"
    )
    return file


def test_later_layers_win_in_the_order_preset_recipe_file_command_line(launch):
    config = load_config(launch, ["data.pool_size=9", "data.sources.art.weight=3"])
    assert config.stage.batch_size == 512  # preset
    assert config.data.sources["captions"].shards == "c-{000..003}.tar"  # recipe
    assert config.optimizer.lr == 0.5  # file over preset
    assert config.data.pool_size == 9 and config.data.sources["art"].weight == 3  # command line over recipe


def test_a_dumped_configuration_reads_back_equal_whatever_became_of_its_recipe(launch, tmp_path):
    config = load_config(launch)
    save_config(config, tmp_path / "out" / "config.yaml")
    with (tmp_path / "recipe.yaml").open("a") as recipe:
        recipe.write(
            "    more: {kind: text, shards: m.tar}\nvalidation: {sources: {held: {kind: text, shards: h.tar}}}\n"
        )
    assert load_config(tmp_path / "out" / "config.yaml") == replace(config, recipe=None)
    assert "batch_unit: packed" in dump_config(config)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.warmup_step=3", "did you mean 'optimizer.warmup_steps'"),
        ("stage.earlystop.at_step=3", "did you mean 'stage.early_stop'"),
        ("data.sources.art.wieght=3", "did you mean 'data.sources.art.weight'"),
        ("validation.sources.art.licence=3", "did you mean 'validation.sources.art.license'"),
        ("lr=3", "did you mean 'optimizer.lr'"),
        ("stage.steps=3", "did you mean 'stage.training_steps'"),
        ("checkpoint.every=3", "did you mean 'checkpoint.every_steps'"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("stage.batch_unit=rows", "expected one of [samples, packed]"),
        ("stage.trainable=[gen_heat]", "did you mean 'gen_head'"),
        ("preset=janus_pro_1b/stage4", "did you mean 'janus_pro_1b/stage3'"),
        ("nonsense", "write key=value"),
    ],
)
def test_a_mistyped_key_or_value_is_named_with_what_was_expected(launch, override, expected):
    with pytest.raises(ConfigError) as caught:
        load_config(launch, [override])
    assert expected in str(caught.value)


def test_a_value_that_contradicts_the_preset_is_answered_with_the_preset_and_the_way_out(launch):
    with pytest.raises(ConfigError) as caught:
        load_config(launch, ["stage.training_steps=30"])
    assert str(caught.value) == (
        "stage.early_stop.at_step 270000 must lie between 1 and stage.training_steps 30; stage.early_stop.at_step=null "
        "trains all of them (stage.early_stop.at_step is from preset janus_pro_1b/stage2)"
    )


def test_a_file_that_is_not_yaml_is_named(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1, 2\nb: }")
    with pytest.raises(ConfigError, match="bad.yaml"):
        load_config(bad)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")


def test_yaml_tags_that_would_run_code_are_rejected(tmp_path):
    evil = tmp_path / "evil.yaml"
    marker = tmp_path / "marker"
    evil.write_text(f"run_dir: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises(ConfigError):
        load_config(evil)
    assert not marker.exists()


def test_values_from_the_environment_are_rejected_because_the_configuration_is_logged(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hush")
    leak = tmp_path / "leak.yaml"
    leak.write_text("preset: janus_pro_1b/stage2\nrun_dir: ${oc.env:WANDB_API_KEY}\n")
    with pytest.raises(ConfigError, match="oc.env") as caught:
        load_config(leak)
    assert "hush" not in str(caught.value)


def test_every_preset_loads_alone(tmp_path):
    names = preset_names()
    assert {"janus_pro_1b/stage1", "janus_pro_7b/stage3", "janus_1b/stage2"} <= set(names)
    for name in names:
        file = tmp_path / "preset.yaml"
        file.write_text(f"preset: {name}\n")
        assert load_config(file).stage.name == name.rsplit("/")[-1]
