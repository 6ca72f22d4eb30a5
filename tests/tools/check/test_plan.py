"""The parts of the plan, against the files that they describe."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from jp_train.config import RunConfig
from jp_train.config.choices import Init
from jp_train.errors import CheckpointError, ConfigError
from jp_train.model.export import write_export
from jp_train.model.parameters import parameter_shapes
from jp_train.model.pretrained import init_fresh_vq
from jp_train.model.vq import VQTokenizer
from jp_train.tools.check import plan
from jp_train.tools.check.subject import Subject
from tests.model.janus_tiny import SIDE, tiny_config, tiny_model


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_starting_weights_are_compared_by_name_and_shape(tmp_path: Path, layout: str) -> None:
    cfg = RunConfig(model=tiny_config())
    model, vq = tiny_model(), VQTokenizer(cfg.model.vq, SIDE)
    init_fresh_vq(vq, 0)
    named = [*model.state_dict().items(), *((f"model.{name}", value) for name, value in vq.state_dict().items())]
    write_export(tmp_path / "export", model.janus_config, named, None, layout=layout)
    cfg.model.init_from = str(tmp_path / "export")
    found = {"init_from": cfg.model.init_from, "tensors": len(named)}
    assert plan.weights(Subject(config=cfg)) == {**found, "remark": ""}
    cfg.model.language.intermediate_size += 1
    with pytest.raises(CheckpointError, match=r"size is 48, ours 49 \(model.language.intermediate_size=48"):
        plan.weights(Subject(config=cfg))
    (tmp_path / "export" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"6 of another shape.*gate_proj"):
        plan.weights(Subject(config=cfg))
    cfg.model.language.intermediate_size -= 1
    assert "no config.json beside" in plan.weights(Subject(config=cfg))["remark"]


def test_parts_are_compared_with_the_model_and_what_stays_random_is_a_warning(tmp_path: Path) -> None:
    cfg = RunConfig(model=tiny_config())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path / "llama")
    cfg.model.init_parts.language_model = str(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"vision_model, gen_vision_model: frozen.*model\.init=random"):
        plan.weights(Subject(config=cfg))
    cfg.model.init = Init.random
    subject = Subject(config=cfg)
    tensors = plan.weights(subject)["init_parts"]["language_model"]["tensors"]
    assert tensors == sum(name.startswith(("model.language", "lm_head")) for name in parameter_shapes(cfg.model))
    assert "vision_model, gen_vision_model: frozen and random" in subject.warnings[0]
    cfg.model.language.vocab_size = 66
    with pytest.raises(CheckpointError, match=r"vocab_size is 64, ours 66"):
        plan.weights(Subject(config=cfg))
