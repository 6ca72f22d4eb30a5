"""Cross-field checks name the keys and the remedy."""

import pytest

from jp_train.config import load_config
from jp_train.config.schema import RunConfig
from jp_train.config.validate import validate
from jp_train.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["optimizer.lr=0"], "optimizer.lr"),
        (["optimizer.lr=-1"], "optimizer.lr"),
        (["data.pad_dropout=1.5"], "data.pad_dropout"),
        (["data.workers=-1"], "data.workers"),
        (["data.index_dir=s3://bucket/index"], "data.index_dir 's3://bucket/index' is no folder"),
        (["model.vision.patch_size=8"], "VQ stride"),
        (["model.vision.image_size=390"], "model.vision.patch_size=16 and a VQ stride of 16 gives 24.375"),
        (["data.seq_len=100"], "use at least 580"),
        (["stage.early_stop.at_step=400000"], "stage.training_steps 360000"),
        (["stage.early_stop.patience=3"], "validation.every_steps"),
        (["stage.mixture.text=-1"], "shares >= 0"),
        (["stage.trainable=[]"], "nothing would learn"),
        (
            ["data.sources.a.kind=text", "data.sources.a.shards=a.tar"],
            "no source in data.sources has kind understanding",
        ),
        (["data.sources.a.kind=text"], "shards is empty"),
        (
            ["data.sources.a.shards=a.tar", "data.sources.a.from_step=5", "data.sources.a.to_step=5"],
            "to_step must exceed",
        ),
        (["model.language.heads=7"], "model.language.heads"),
    ],
)
def test_an_impossible_combination_is_one_clear_error(tmp_path, overrides, expected):
    file = tmp_path / "run.yaml"
    file.write_text("preset: janus_pro_1b/stage2\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert expected in str(caught.value)


def test_the_defaults_are_possible_but_for_the_sources_and_a_change_in_place_is_checked_too():
    config = RunConfig()
    validate(config)
    config.optimizer.beta2 = 1.0
    with pytest.raises(ConfigError, match=r"optimizer.beta2 must lie in \[0, 1\), found 1.0"):
        validate(config)
