"""Which starting weights are taken and which are refused, with weights that transformers and torch wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen2Config, Qwen2ForCausalLM

from jp_train.config.choices import GenEmbedInit, Init
from jp_train.config.schema import MODULES, InitPartsConfig, ModelConfig
from jp_train.errors import CheckpointError, ConfigError
from jp_train.model.export import write_export
from jp_train.model.freeze import VQ_MODULE
from jp_train.model.start_weights import EMBEDDINGS, HEAD, open_start, open_vq, without_weights
from jp_train.model.weight_files import WeightSource
from tests.model.janus_tiny import tiny_config
from tests.model.test_pretrained import make, tensors

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
STAGE1 = ("aligner", "gen_embed", "gen_aligner", "gen_head")
PARTS = {"language_model": "a", "vision_model": "b", "gen_vision_model": "c"}


def start_from(path: Path) -> WeightSource:
    """The language model at `path` in a stage that trains everything; the VQ stays random."""
    cfg = tiny_config()
    cfg.init, cfg.init_parts.language_model = Init.random, str(path)
    return open_start(cfg, MODULES).parts["language_model"]


def llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 4}, r"num_attention_heads is 4, ours 2 \(model.language.heads=4\)"),
        ({"vocab_size": 60}, r"vocab_size is 60, ours 64 \(model.language.vocab_size=60\)"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1 for 2 heads: grouped-query attention"),
        ({"attention_bias": True}, "attention_bias: biases"),
        (
            {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}},
            "rope scaling.*rms_norm_eps is 1e-05.*rope_theta is 100000.0",
        ),
    ],
)
def test_another_llama_is_refused_with_every_difference_at_once(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    llama(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        start_from(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 60}, "2 of another shape: .*embed_tokens.weight is"),
        ({"num_key_value_heads": 1}, "4 of another shape: .*k_proj.weight is"),
        ({"attention_bias": True}, "8 unexpected: .*q_proj.bias"),
    ],
)
def test_without_a_config_json_names_and_shapes_decide(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    llama(tmp_path, **changes)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        start_from(tmp_path)


def test_another_architecture_with_a_llamas_names_is_refused(tmp_path: Path) -> None:
    Qwen2ForCausalLM(Qwen2Config(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="model_type 'qwen2'; expected llama"):
        start_from(tmp_path)


def test_a_llama_without_its_head_is_incomplete_unless_it_is_tied(tmp_path: Path) -> None:
    LlamaModel(LlamaConfig(**SIZES)).save_pretrained(tmp_path / "untied")
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head.weight"):
        start_from(tmp_path / "untied")
    llama(tmp_path / "tied", tie_word_embeddings=True)
    assert start_from(tmp_path / "tied").equal(HEAD, EMBEDDINGS)


def test_a_tied_head_that_is_stored_must_be_the_embeddings(tmp_path: Path) -> None:
    """A .bin file of a tied model holds both names of the one tensor; transformers ignores a stored head."""
    state = llama(tmp_path, tie_word_embeddings=True).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert start_from(tmp_path).equal(HEAD, EMBEDDINGS)
    torch.save({**state, HEAD: state[HEAD] + 1}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but lm_head.weight is stored"):
        start_from(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("language.heads", 4, "model.language.heads=2"),
        ("language.rope_theta", 5e5, "model.language.rope_theta=10000.0"),
        ("language.rms_norm_eps", 1e-5, "model.language.rms_norm_eps=1e-06"),
        ("vision.heads", 4, "model.vision.heads=2"),
    ],
)
@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_an_own_export_is_refused_under_other_settings_that_no_shape_shows(
    tmp_path: Path, layout: str, key: str, value: float, message: str
) -> None:
    model, vq = make()
    write_export(tmp_path / "e", model.janus_config, tensors(model, vq), None, layout=layout)
    cfg = tiny_config()
    cfg.init_from = str(tmp_path / "e")
    assert open_start(cfg, STAGE1).remark() == ""
    setattr(getattr(cfg, key.split(".")[0]), key.split(".")[1], value)
    with pytest.raises(CheckpointError, match=message):
        open_start(cfg, STAGE1)


@pytest.mark.parametrize(
    ("trainable", "given", "refused"),
    [
        (STAGE1, {}, ["language_model", "vision_model", "gen_vision_model"]),
        (STAGE1, PARTS, []),
        (("language_model", *STAGE1), {}, ["vision_model", "gen_vision_model"]),
        (MODULES, {"gen_vision_model": "c"}, []),
        (("language_model",), PARTS, ["aligner", "gen_aligner", "gen_head"]),
    ],
)
def test_what_never_trains_must_have_weights(
    trainable: tuple[str, ...], given: dict[str, str], refused: list[str]
) -> None:
    cfg = ModelConfig(init_parts=InitPartsConfig(**given))
    assert without_weights(cfg, trainable) == refused
    cfg.gen_embed_init = GenEmbedInit.random
    assert without_weights(cfg, trainable) == refused + ["gen_embed"] * ("gen_embed" not in trainable)
    assert without_weights(ModelConfig(init_from="a"), trainable) == []


def test_frozen_modules_without_weights_are_refused_with_the_keys_to_set() -> None:
    cfg = tiny_config()
    with pytest.raises(ConfigError) as error:
        open_start(cfg, ("language_model", "gen_embed", "gen_aligner", "gen_head"))
    assert str(error.value) == (
        "vision_model, gen_vision_model, aligner: frozen and without weights, so random for the whole run. Set "
        "model.init_from for all weights, or model.init_parts.vision_model, model.init_parts.gen_vision_model for "
        "single parts, or stage.trainable with aligner; model.init=random trains like this on purpose"
    )
    with pytest.raises(ConfigError, match="gen_vision_model: frozen and without weights"):
        open_vq(cfg)
    cfg.init = Init.random
    assert open_start(cfg, STAGE1).parts == {} and open_vq(cfg) is None


def test_weights_without_a_config_json_are_named_as_compared_by_less(tmp_path: Path) -> None:
    llama(tmp_path / "llama")
    (tmp_path / "llama" / "config.json").unlink()
    torch.save(make()[1].vqmodel.state_dict(), tmp_path / "vq.pt")
    cfg = tiny_config()
    cfg.init_parts.gen_vision_model = str(tmp_path / "vq.pt")
    start = open_start(cfg, MODULES)
    assert start.remark() == "", "the shapes of a VQ show everything"
    assert sorted(open_vq(cfg).keys()) == sorted(start.parts[VQ_MODULE].keys())
    cfg.init_parts.language_model = str(tmp_path / "llama")
    remark = f" (no config.json beside {tmp_path / 'llama'}: heads, rope and eps were not compared)"
    assert open_start(cfg, MODULES).remark() == remark
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "vq.safetensors")
    cfg.init_parts.gen_vision_model = str(tmp_path / "vq.safetensors")
    with pytest.raises(CheckpointError, match="missing: model.vqmodel.encoder.conv_in.bias"):
        open_vq(cfg)
