"""What the config.json beside weights says about the model, and where the run's configuration differs from it.

Most of it no tensor's shape shows: the number of heads, the rotary base, the eps of the norms. Four layouts are read:
transformers' Janus, deepseek-ai's `multi_modality`, a plain Llama, and a plain SigLIP or VQ tokenizer of transformers;
beside them the config.yaml of a training checkpoint. A key that the file leaves out has the default of transformers'
class.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import JanusConfig, JanusVisionConfig, JanusVQVAEConfig, LlamaConfig, PreTrainedConfig, SiglipConfig
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

from jp_train.config.schema import LanguageConfig, ModelConfig, VisionConfig, VQConfig
from jp_train.errors import CheckpointError
from jp_train.files import stand_in_at
from jp_train.model.configuration import parts_of, rope_theta
from jp_train.model.weight_places import INDEX_FILE

PARTS = ("vision", "vq", "language")
"""Sections of `ModelConfig`."""

KEYS = {
    "language": {
        "hidden_size": "hidden_size",
        "intermediate_size": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "vocab_size": "vocab_size",
        "rms_norm_eps": "rms_norm_eps",
        "rope_theta": "rope_theta",
    },
    "vision": {
        "hidden_size": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
    },
    "vq": {
        "codebook_size": "num_embeddings",
        "embed_dim": "embed_dim",
        "base_channels": "base_channels",
        "channel_multiplier": "channel_multiplier",
        "res_blocks": "num_res_blocks",
        "latent_channels": "latent_channels",
    },
}
"""{section: {our key: config.json's}} of what is compared. `max_position_embeddings` decides nothing (rotary positions
have no table), and `mlp_ratio` shows in the shapes."""


@dataclass(kw_only=True)
class StoredModel:
    """What `file` says: the sections that it has, `unsupported` settings of each in words, and whether the text head is
    tied to the token embeddings."""

    file: Path
    sections: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    unsupported: dict[str, list[str]] = field(default_factory=dict)
    tied: bool = False

    def problems(self, model: ModelConfig, parts: Collection[str] = PARTS) -> list[str]:
        """Every difference of the sections `parts` from `model`, with the key to set, and what cannot be expressed."""
        found = []
        for part in parts:
            found += self.unsupported.get(part, [])
            ours = asdict(getattr(model, part))
            for key, name in KEYS[part].items():
                theirs = self.sections.get(part, {}).get(key, ours[key])
                if theirs != ours[key]:
                    set_to = f"[{','.join(map(str, theirs))}]" if isinstance(theirs, list) else theirs
                    found.append(f"{name} is {theirs}, ours {ours[key]} (model.{part}.{key}={set_to})")
        return found


def read_model_config(folder: str | Path) -> ModelConfig:
    """Model sizes from a folder's config.json (transformers' or the released form).

    Raises:
        CheckpointError: if there is no such file, it describes no Janus model, or one that cannot be built here.
    """
    file = Path(folder) / "config.json"
    stored = _of_whole(file, _read(file))
    if refused := [text for texts in stored.unsupported.values() for text in texts]:
        raise CheckpointError(f"{file} describes a model that is not supported: {'; '.join(refused)}")
    return ModelConfig(
        vision=VisionConfig(**stored.sections["vision"]),
        vq=VQConfig(**stored.sections["vq"]),
        language=LanguageConfig(**stored.sections["language"]),
    )


def stored_model(path: Path) -> StoredModel | None:
    """What lies beside the weights of a whole model at `path` (a file, a folder or a training checkpoint); None where
    nothing does.

    Raises:
        CheckpointError: if the configuration cannot be read, or is of no Janus model.
    """
    if (path / INDEX_FILE).is_file():
        return _of_checkpoint(path / "config.yaml")
    file = (path if path.is_dir() else path.parent) / "config.json"
    return _of_whole(file, _read(file)) if file.is_file() else None


def stored_part(path: Path, part: str) -> StoredModel | None:
    """What lies beside the weights at `path` of one section of PARTS, or of a whole model; None where nothing does.

    Raises:
        CheckpointError: if the configuration cannot be read, or is of another architecture.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file():
        return None
    raw = _read(file)
    model_type = raw.get("model_type")
    if model_type in ("janus", "multi_modality"):
        return _of_whole(file, raw)
    stored = StoredModel(file=file)
    if part == "language" and model_type in ("llama", None):
        _add_language(stored, _built(file, LlamaConfig, raw))
    elif part == "vision" and model_type == "siglip":
        _add_siglip(stored, _vision_of(_built(file, SiglipConfig, raw), file))
    elif part == "vision" and model_type == "siglip_vision_model":
        _add_siglip(stored, _built(file, SiglipVisionConfig, raw))
    elif part == "vision" and model_type == "janus_vision_model":
        _add_vision(stored, _built(file, JanusVisionConfig, raw))
    elif part == "vq" and model_type == "janus_vqgan":
        _add_vq(stored, _built(file, JanusVQVAEConfig, raw))
    elif path.is_dir():
        expected = {"language": "llama", "vision": "siglip, siglip_vision_model", "vq": "janus_vqgan"}[part]
        raise CheckpointError(
            f"{file} has model_type {model_type!r}; expected {expected}, or a whole Janus model (janus, "
            "multi_modality): another architecture cannot take its place"
        )
    else:
        return None  # of something else that lies in the same folder
    if raw.get("quantization_config"):
        stored.unsupported.setdefault(part, []).append("quantization_config: quantised weights cannot be trained")
    return stored


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} {stand_in_at(file) or f'cannot be read: {error}'}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    own = raw.get("jp_train")
    return own if isinstance(own, dict) else raw


Config = TypeVar("Config", bound=PreTrainedConfig)


def _built(file: Path, kind: type[Config], raw: Mapping[str, Any]) -> Config:
    """transformers' configuration from JSON, whose classes raise many kinds of errors for values they do not take."""
    dropped = ("torch_dtype", "dtype", "model_type", "auto_map", "quantization_config")
    try:
        return kind.from_dict({key: value for key, value in raw.items() if key not in dropped})
    except Exception as error:
        raise CheckpointError(f"{file} is no {kind.__name__}: {' '.join(str(error).split())}") from error


def _of_checkpoint(file: Path) -> StoredModel:
    try:
        model = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]
        return StoredModel(file=file, sections={part: dict(model[part]) for part in PARTS})
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} is no configuration of a run: {error}") from error


def _of_whole(file: Path, raw: dict[str, Any]) -> StoredModel:
    stored = StoredModel(file=file)
    if raw.get("model_type") == "multi_modality":
        _add_released(stored, raw)
        return stored
    if raw.get("model_type") != "janus":
        raise CheckpointError(
            f"{file} has model_type {raw.get('model_type')!r}; expected 'janus' (transformers) or 'multi_modality' "
            "(deepseek-ai)"
        )
    vision, vq, text = parts_of(_built(file, JanusConfig, raw))
    _add_vision(stored, vision)
    _add_vq(stored, vq)
    _add_language(stored, text)
    return stored


def _add_released(stored: StoredModel, raw: dict[str, Any]) -> None:
    """Released files name a SigLIP and a VQ, which are jp_train's defaults; the 7B's language_config leaves keys out
    that have Llama's defaults."""
    try:
        vision, vq = raw["vision_config"]["params"], raw["gen_vision_config"]
        tower, tokenizer, language = vision["model_name"], vq["cls"], dict(raw["language_config"])
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{stored.file} describes no Janus or Janus-Pro: vision_config, gen_vision_config or language_config lacks "
            f"{error}"
        ) from error
    if tower != "siglip_large_patch16_384" or tokenizer != "VQ-16":
        raise CheckpointError(
            f"{stored.file} names the vision tower {tower!r} and the tokenizer {tokenizer!r}; siglip_large_patch16_384 "
            "and VQ-16 are known"
        )
    sizes = {"image_size": vision.get("image_size", 384)}
    stored.sections["vision"] = asdict(VisionConfig()) | sizes
    if vision.get("select_layer", -1) != -1 or vision.get("select_feature", "same") != "same":
        stored.unsupported["vision"] = [
            f"select_layer {vision.get('select_layer')}, select_feature {vision.get('select_feature')!r}: only all "
            "positions of the last layer (-1, 'same') are supported"
        ]
    given = vq.get("params") or {}
    codes = {"codebook_size": given.get("image_token_size", 16384), "embed_dim": given.get("n_embed", 8)}
    stored.sections["vq"] = asdict(VQConfig()) | codes
    _add_language(stored, _built(stored.file, LlamaConfig, language))


def _add_language(stored: StoredModel, text: LlamaConfig) -> None:
    heads = text.num_attention_heads
    refused = []
    if text.num_key_value_heads != heads:
        refused.append(
            f"num_key_value_heads {text.num_key_value_heads} for {heads} heads: grouped-query attention is not "
            "supported"
        )
    if text.head_dim != text.hidden_size // heads:
        refused.append(
            f"head_dim {text.head_dim}: only hidden_size / num_attention_heads ({text.hidden_size // heads}) is "
            "supported"
        )
    if text.hidden_act != "silu":
        refused.append(f"hidden_act {text.hidden_act!r}: the language model has 'silu'")
    rope = dict(text.rope_parameters or {})
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        scaling = ", ".join(f"{key} {value}" for key, value in rope.items() if key not in ("type", "rope_theta"))
        refused.append(f"rope scaling ({scaling}) is not supported")
    refused += [
        f"{name}: biases of the language model are not supported"
        for name in ("attention_bias", "mlp_bias")
        if getattr(text, name, False)
    ]
    stored.unsupported["language"] = refused
    stored.tied = bool(text.tie_word_embeddings)
    sizes = {key: getattr(text, name) for key, name in KEYS["language"].items() if key != "rope_theta"}
    stored.sections["language"] = sizes | {
        "rope_theta": rope_theta(text),
        "max_position_embeddings": text.max_position_embeddings,
    }


def _vision_of(siglip: SiglipConfig, file: Path) -> SiglipVisionConfig:
    vision = siglip.vision_config
    if not isinstance(vision, SiglipVisionConfig):
        raise CheckpointError(f"{file} has a {type(vision).__name__} as vision tower; expected a SigLIP")
    return vision


def _add_siglip(stored: StoredModel, vision: SiglipVisionConfig) -> None:
    # SigLIP was trained with the tanh form of GELU; Janus and Janus-Pro took it over with the exact one, and so does
    # this (docs/model.md)
    _add_tower(stored, vision, vision.intermediate_size / vision.hidden_size, ("gelu", "gelu_pytorch_tanh"))


def _add_vision(stored: StoredModel, vision: JanusVisionConfig) -> None:
    _add_tower(stored, vision, float(vision.mlp_ratio), ("gelu",))
    if vision.use_qk_norm or not vision.attention_bias:
        stored.unsupported["vision"].append(
            f"use_qk_norm {vision.use_qk_norm}, attention_bias {vision.attention_bias}: only attention with biases and "
            "without norms of queries and keys is supported"
        )


def _add_tower(
    stored: StoredModel, vision: JanusVisionConfig | SiglipVisionConfig, mlp_ratio: float, activations: tuple[str, ...]
) -> None:
    refused = []
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(vision, name), int):
            refused.append(f"{name} {getattr(vision, name)}: only squares, given as one number, are supported")
    if vision.hidden_act not in activations:
        refused.append(f"hidden_act {vision.hidden_act!r}: the vision tower has {activations[0]!r}")
    if vision.layer_norm_eps != 1e-6:
        refused.append(f"layer_norm_eps {vision.layer_norm_eps}: the vision tower has 1e-6")
    stored.unsupported["vision"] = refused
    sizes = {key: getattr(vision, name) for key, name in KEYS["vision"].items()}
    stored.sections["vision"] = sizes | {"mlp_ratio": mlp_ratio}


def _add_vq(stored: StoredModel, vq: JanusVQVAEConfig) -> None:
    refused = []
    if vq.double_latent:
        refused.append("double_latent is not supported")
    if vq.hidden_act != "gelu":
        refused.append(f"hidden_act {vq.hidden_act!r}: the generation aligner and head have 'gelu'")
    stored.unsupported["vq"] = refused
    sizes = {key: getattr(vq, name) for key, name in KEYS["vq"].items()}
    stored.sections["vq"] = sizes | {"channel_multiplier": list(vq.channel_multiplier)}
