"""Every wrong key of all layers is in one error, with what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from jp_train.config import load_config
from jp_train.errors import ConfigError


def error_of(tmp_path: Path, text: str, *overrides: str) -> str:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "run.yaml", overrides)
    return str(caught.value)


def test_unknown_keys_of_file_and_command_line_are_reported_together_each_with_its_own_suggestion(tmp_path):
    message = error_of(
        tmp_path, "stage: {steps: 30}\ncheckpoint: {every: 5}\n", "optimizer.warmup_step=3", "stage.freeze=[foo]"
    )
    first, *lines = message.split("\n  ")
    assert first == "4 keys:"
    assert [line.partition(": ")[0] for line in lines] == [str(tmp_path / "run.yaml")] * 2 + ["the command line"] * 2
    for line, key in zip(
        lines, ("stage.training_steps", "checkpoint.every_steps", "optimizer.warmup_steps"), strict=False
    ):
        assert line.endswith(f"; did you mean {key!r}?")


def test_a_key_that_resembles_none_is_answered_with_the_keys_of_its_section(tmp_path):
    assert error_of(tmp_path, "stage: {freeze: [foo]}\n").endswith(
        "unknown key 'stage.freeze'; keys of stage: name, trainable, training_steps, early_stop, batch_unit, "
        "batch_size, samples_per_row, mixture, ratio_unit, mix, template"
    )
    assert "keys of a configuration: preset, recipe, run_dir" in error_of(tmp_path, "", "zzz=1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stage: 3", "stage is a section, found 3; keys of stage: name, trainable"),
        ("stage:\noptimizer: {lr: 1e-3}", "stage is a section, found nothing; keys of stage: name, trainable"),
        ("model: {vision: [1]}", "model.vision is a section, found a list; keys of model.vision: hidden_size"),
        ("data: {sources: [{kind: text}]}",
         "data.sources is a section of named entries, `data.sources: {NAME: {...}}`, found a list"),
        ("data: {sources: {a: text.tar}}",
         "data.sources.a is a section, found 'text.tar'; keys of data.sources.a: kind"),
    ],
)  # fmt: skip
def test_a_plain_value_in_place_of_a_section_is_named_with_the_keys_that_belong_there(tmp_path, text, expected):
    assert expected in error_of(tmp_path, text)
