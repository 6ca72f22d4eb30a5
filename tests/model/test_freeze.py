from __future__ import annotations

import pytest

from jp_train.config.schema import MODULES
from jp_train.errors import ConfigError
from jp_train.model.freeze import module_of, set_trainable
from tests.model.janus_tiny import tiny_model


def test_exactly_the_listed_modules_learn_and_the_rest_is_frozen() -> None:
    model = tiny_model()
    report = set_trainable(model, ["gen_head", "language_model"])
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {
        n for n in model.state_dict() if n.startswith(("model.generation_head.", "model.language_model.", "lm_head."))
    }
    assert learning == expected == set(report.trainable_names)
    assert sum(report.trainable.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert set(report.trainable) == {"gen_head", "language_model"}
    assert "gen_head" in report.describe()


def test_a_later_call_replaces_an_earlier_one() -> None:
    model = tiny_model()
    set_trainable(model, MODULES)
    set_trainable(model, ["aligner"])
    assert {module_of(n) for n, p in model.named_parameters() if p.requires_grad} == {"aligner"}


def test_every_parameter_belongs_to_one_module_of_the_schema() -> None:
    assert {module_of(name) for name in tiny_model().state_dict()} == set(MODULES)
    assert module_of("module.lm_head.weight") == "language_model"
    assert module_of("model.language_model.embed_tokens.weight") == "language_model"
    assert module_of("model.vqmodel.encoder.conv_in.weight") == "gen_vision_model"
    with pytest.raises(KeyError, match="belongs to none"):
        module_of("model.other.weight")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gen_aligne"], "did you mean 'gen_aligner'"),
        (["gen_vision_model"], "never trained here"),
        ([], "at least one of"),
        (["aligner", "aligner"], "each module that learns once"),
    ],
)
def test_wrong_names_are_a_config_error(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_trainable(tiny_model(), names)
