"""What config.json beside weights says, against the files of released models and of transformers' classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from jp_train.config import load_config
from jp_train.config.load import save_config
from jp_train.config.schema import LanguageConfig, ModelConfig, RunConfig
from jp_train.errors import CheckpointError
from jp_train.model.configuration import build_config
from jp_train.model.stored_config import PARTS, read_model_config, stored_model, stored_part
from tests.model.janus_tiny import tiny_config


def projector(kind: str, width: int, inputs: int) -> dict[str, Any]:
    params = {"depth": 2, "input_dim": inputs, "n_embed": width, "projector_type": "mlp_gelu"}
    return {"cls": "MlpProjector", "model_type": kind, "params": params}


def released(width: int, language: dict[str, Any]) -> dict[str, Any]:
    """deepseek-ai/Janus-Pro-1B and -7B, but for the tokens' ids."""
    return {
        "aligner_config": projector("aligner", width, 1024),
        "architectures": ["MultiModalityCausalLM"],
        "gen_aligner_config": projector("gen_aligner", width, 8),
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": width, "image_token_size": 16384, "n_embed": width},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": 16384, "n_embed": 8},
        },
        "language_config": language,
        "model_type": "multi_modality",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": 384,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
            },
        },
    }


ONE_B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}
SEVEN_B = {
    "max_position_embeddings": 16384,
    "model_type": "llama",
    "num_hidden_layers": 30,
    "torch_dtype": "bfloat16",
    "vocab_size": 102400,
}
DEEPSEEK_LLM_7B = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 30,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "vocab_size": 102400,
}
SIGLIP_L = {
    "architectures": ["SiglipModel"],
    "initializer_factor": 1.0,
    "model_type": "siglip",
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "model_type": "siglip_text_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.37.0.dev0",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 384,
        "intermediate_size": 4096,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 16,
    },
}


def preset(folder: Path, name: str) -> ModelConfig:
    (folder / "run.yaml").write_text(f"preset: {name}\n")
    return load_config(folder / "run.yaml").model


def write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [("janus_pro_1b/stage2", released(2048, ONE_B)), ("janus_pro_7b/stage2", released(4096, SEVEN_B))],
)
def test_the_released_models_fit_their_presets_and_no_other(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    write(tmp_path, content)
    assert stored_model(tmp_path).problems(preset(tmp_path, name)) == []
    other = preset(tmp_path, "janus_pro_7b/stage2" if "1b" in name else "janus_pro_1b/stage2")
    assert len(stored_model(tmp_path).problems(other)) == 4  # width, FFN, layers, heads


@pytest.mark.parametrize(("part", "content"), [("language", DEEPSEEK_LLM_7B), ("vision", SIGLIP_L)])
def test_the_parts_that_the_7b_starts_from_fit_its_preset(tmp_path: Path, part: str, content: dict[str, Any]) -> None:
    stored = stored_part(write(tmp_path, content), part)
    assert stored.problems(preset(tmp_path, "janus_pro_7b/stage1"), [part]) == []


LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 8}, None),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, ours 2 (model.language.heads=4)"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, ours 10000.0 (model.language.rope_theta=500000.0)"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta is 500000.0, ours 10000.0"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, ours 1e-06 (model.language.rms_norm_eps=1e-05)"),
        ({"num_key_value_heads": 1}, "num_key_value_heads 1 for 2 heads: grouped-query attention is not supported"),
        ({"head_dim": 8}, "head_dim 8: only hidden_size / num_attention_heads (16)"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': the language model has 'silu'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope scaling (factor 4.0, rope_type linear)"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, "rope scaling (rope_type"),
        ({"attention_bias": True}, "attention_bias: biases"),
        ({"mlp_bias": True}, "mlp_bias: biases"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config: quantised weights"),
    ],
)
def test_a_llama_is_compared_key_by_key(tmp_path: Path, change: dict[str, Any], problem: str | None) -> None:
    problems = stored_part(write(tmp_path, LLAMA | change), "language").problems(tiny_config(), ["language"])
    assert len(problems) == (problem is not None)
    assert problem is None or problems[0].startswith(problem)


def test_keys_that_a_llama_leaves_out_have_the_defaults_of_transformers(tmp_path: Path) -> None:
    stored = stored_part(write(tmp_path, {"model_type": "llama"}), "language")
    ours = replace(tiny_config(), language=LanguageConfig(heads=16, rms_norm_eps=1e-5))
    assert [problem.split(" (")[0] for problem in stored.problems(ours, ["language"])] == [
        "hidden_size is 4096, ours 2048",
        "intermediate_size is 11008, ours 5632",
        "num_hidden_layers is 32, ours 24",
        "num_attention_heads is 32, ours 16",
        "vocab_size is 32000, ours 102400",
        "rms_norm_eps is 1e-06, ours 1e-05",
    ]


TOWER = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"hidden_act": "gelu"}, None),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, ours 2 (model.vision.heads=4)"),
        ({"patch_size": 4}, "patch_size is 4, ours 8 (model.vision.patch_size=4)"),
        ({"image_size": 32}, "image_size is 32, ours 16 (model.vision.image_size=32)"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05: the vision tower has 1e-6"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu': the vision tower has 'gelu'"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_siglip_is_compared_alone_and_within_its_pair(
    tmp_path: Path, whole: bool, change: dict[str, Any], problem: str | None
) -> None:
    tower = {"intermediate_size": 48, "model_type": "siglip_vision_model"} | TOWER | change
    content = {"model_type": "siglip", "vision_config": tower} if whole else tower
    problems = stored_part(write(tmp_path, content), "vision").problems(tiny_config(), ["vision"])
    assert problems == ([] if problem is None else [problem])


def test_a_siglip_for_rectangles_is_refused(tmp_path: Path) -> None:
    stored = stored_part(
        write(tmp_path, TOWER | {"model_type": "siglip_vision_model", "image_size": [16, 32]}), "vision"
    )
    assert "image_size [16, 32]: only squares" in stored.problems(tiny_config(), ["vision"])[0]


@pytest.mark.parametrize(
    ("section", "key", "value", "problem"),
    [
        ("text_config", "num_attention_heads", 4, "num_key_value_heads 2 for 4 heads"),
        ("text_config", "rms_norm_eps", 1e-5, "model.language.rms_norm_eps=1e-05"),
        ("vision_config", "num_attention_heads", 4, "model.vision.heads=4"),
        ("vision_config", "hidden_act", "gelu_pytorch_tanh", "hidden_act 'gelu_pytorch_tanh'"),
        ("vision_config", "use_qk_norm", True, "use_qk_norm True"),
        ("vq_config", "channel_multiplier", [1, 1, 2, 2], "model.vq.channel_multiplier=[1,1,2,2]"),
        ("vq_config", "double_latent", True, "double_latent"),
        ("vq_config", "hidden_act", "relu", "the generation aligner and head have 'gelu'"),
    ],
)
def test_a_whole_model_of_transformers_is_compared_in_all_its_parts(
    tmp_path: Path, section: str, key: str, value: Any, problem: str
) -> None:
    content = build_config(tiny_config(), 5).to_dict()
    write(tmp_path, content)
    assert stored_model(tmp_path).problems(tiny_config()) == [] and read_model_config(tmp_path) == tiny_config()
    content[section][key] = value
    assert any(problem in text for text in stored_model(write(tmp_path, content)).problems(tiny_config()))


def test_a_whole_model_in_place_of_a_part_lends_what_it_says_about_that_part(tmp_path: Path) -> None:
    content = build_config(tiny_config(), 5).to_dict()
    content["text_config"]["rms_norm_eps"] = 1e-5
    write(tmp_path, content)
    assert stored_part(tmp_path, "vision").problems(tiny_config(), ["vision"]) == []
    assert len(stored_part(tmp_path, "language").problems(tiny_config(), ["language"])) == 1


def test_the_vq_tokenizer_of_transformers_is_compared(tmp_path: Path) -> None:
    content = build_config(tiny_config(), 5).to_dict()["vq_config"]
    assert content["model_type"] == "janus_vqgan"
    assert stored_part(write(tmp_path, content), "vq").problems(tiny_config(), ["vq"]) == []
    problems = stored_part(write(tmp_path, content | {"embed_dim": 4}), "vq").problems(tiny_config(), ["vq"])
    assert problems == ["embed_dim is 4, ours 8 (model.vq.embed_dim=4)"]


def test_a_training_checkpoint_is_compared_by_its_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "partitions.json").touch()
    cfg = RunConfig(model=tiny_config())
    save_config(cfg, tmp_path / "config.yaml")
    assert stored_model(tmp_path).problems(tiny_config()) == []
    cfg.model.language.heads, cfg.model.vision.heads = 4, 4
    save_config(cfg, tmp_path / "config.yaml")
    assert stored_model(tmp_path).problems(tiny_config()) == [
        "num_attention_heads is 4, ours 2 (model.vision.heads=4)",
        "num_attention_heads is 4, ours 2 (model.language.heads=4)",
    ]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": 3}))
    with pytest.raises(CheckpointError, match="no configuration of a run"):
        stored_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'; expected llama"),
        (LLAMA | {"num_attention_heads": 3}, "is no LlamaConfig: .*not a multiple"),
        (LLAMA | {"rms_norm_eps": "small"}, "is no LlamaConfig: .*rms_norm_eps"),
        (LLAMA | {"rope_scaling": {"type": "linear"}}, "is no LlamaConfig"),
        ({"model_type": "multi_modality", "vision_und_enc_config": {}}, "no Janus or Janus-Pro.*vision_config"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_one_error(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        stored_part(write(tmp_path, content), "language")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 41\n", "Git LFS pointer"),
        (b'{"model_type": "ll', "cannot be read"),
        (b"[]", "no JSON object"),
    ],
)
def test_a_config_json_that_is_none_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    for read in (stored_model, read_model_config, lambda path: stored_part(path, "vq")):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)


def test_a_file_is_compared_with_what_lies_beside_it_only_where_that_is_of_its_kind(tmp_path: Path) -> None:
    write(tmp_path, LLAMA | {"rms_norm_eps": 1e-5})
    stored = stored_part(tmp_path / "model.safetensors", "language")
    assert len(stored.problems(tiny_config(), PARTS)) == 1
    assert stored_part(tmp_path / "vq16.pt", "vq") is None
    (tmp_path / "config.json").unlink()
    assert stored_part(tmp_path, "language") is None and stored_model(tmp_path) is None
