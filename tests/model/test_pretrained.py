"""Weights in and out, against transformers' own loading and against names written by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    JanusForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from jp_train.config.choices import Init
from jp_train.config.schema import MODULES, GenEmbedInit, LossConfig, ModelConfig, TokenizerConfig
from jp_train.errors import CheckpointError, ConfigError
from jp_train.model.configuration import build_config
from jp_train.model.export import write_export
from jp_train.model.freeze import module_of
from jp_train.model.janus_pro import JanusPro
from jp_train.model.pretrained import init_fresh, init_fresh_vq, load_weights, prepare_weights
from jp_train.model.stored_config import read_model_config
from jp_train.model.vq import VQTokenizer, unit_rows
from jp_train.model.weight_files import open_part, open_weights
from jp_train.types import Kind, SpecialTokens
from tests.model.janus_tiny import DIM, PLACEHOLDER, SIDE, pack, random_docs, tiny_config, tiny_model


class FakeTokenizer:
    cfg = TokenizerConfig()
    special = SpecialTokens(bos=0, eos=1, pad=2, boi=3, eoi=4, image_placeholder=PLACEHOLDER)

    def save(self, directory: Path) -> None:
        (Path(directory) / "tokenizer.model").write_bytes(b"x")


def make(seed: int = 0, unit: bool = False) -> tuple[JanusPro, VQTokenizer]:
    vq = VQTokenizer(tiny_config().vq, SIDE)
    init_fresh_vq(vq, seed)
    if not unit:
        vq.vqmodel.quantize.embedding.weight.mul_(torch.linspace(0.5, 2, len(vq.codebook)).unsqueeze(1))
    return tiny_model(seed=seed), vq


def tensors(model: JanusPro, vq: VQTokenizer) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.state_dict().items()
    yield from ((f"model.{name}", tensor) for name, tensor in vq.state_dict().items())


def export(path: Path, model: JanusPro, vq: VQTokenizer, **options) -> Path:
    options = {"dtype": torch.float32, "tokenizer": FakeTokenizer(), **options}
    write_export(path, model.janus_config, tensors(model, vq), **options)
    return path


def same(a: JanusPro, b: JanusPro) -> bool:
    return all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


# ----------------------------------------------------------------------------------------------------------------
# transformers


def test_an_hf_export_round_trips_bit_equal_and_keeps_the_vq_fingerprint(tmp_path: Path) -> None:
    model, vq = make()
    first = export(tmp_path / "run" / "export", model, vq)
    other, other_vq = make(seed=5)
    load_weights(other, other_vq, open_weights(tmp_path / "run"))  # a run folder stands for its export
    assert same(model, other)
    assert other_vq.fingerprint() == vq.fingerprint()
    second = export(tmp_path / "again", other, other_vq)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------------------------
# released layout


def released_by_hand(model: JanusPro, vq: VQTokenizer) -> dict[str, torch.Tensor]:
    """The released layout written out for the tiny model: 2 vision blocks, 4 VQ levels with 1 residual block."""
    s = {**model.state_dict(), **{f"model.{k}": v for k, v in vq.state_dict().items()}}
    out: dict[str, torch.Tensor] = {}
    tower, ours = "vision_model.vision_tower", "model.vision_model"
    out[f"{tower}.pos_embed"] = s[f"{ours}.embeddings.position_embedding.weight"][None]
    for w in ("weight", "bias"):
        out[f"{tower}.patch_embed.proj.{w}"] = s[f"{ours}.embeddings.patch_embedding.{w}"]
        out[f"{tower}.norm.{w}"] = s[f"{ours}.post_layernorm.{w}"]
        for n in range(2):
            block, layer = f"{tower}.blocks.{n}", f"{ours}.encoder.layers.{n}"
            out[f"{block}.attn.qkv.{w}"] = torch.cat([s[f"{layer}.self_attn.{p}_proj.{w}"] for p in "qkv"])
            out[f"{block}.attn.proj.{w}"] = s[f"{layer}.self_attn.projection_layer.{w}"]
            for i in (1, 2):
                out[f"{block}.norm{i}.{w}"] = s[f"{layer}.layer_norm{i}.{w}"]
                out[f"{block}.mlp.fc{i}.{w}"] = s[f"{layer}.mlp.fc{i}.{w}"]
        for name, module in (("aligner", "aligner"), ("gen_aligner", "generation_aligner")):
            out[f"{name}.layers.0.{w}"] = s[f"model.{module}.fc1.{w}"]
            out[f"{name}.layers.2.{w}"] = s[f"model.{module}.hidden_layers.0.{w}"]
        out[f"gen_head.output_mlp_projector.{w}"] = s[f"model.generation_head.proj_out.{w}"]
        out[f"gen_head.vision_head.{w}"] = s[f"model.generation_head.vision_head.{w}"]
    out["gen_embed.weight"] = s["model.generation_embeddings.weight"]
    out["language_model.lm_head.weight"] = s["lm_head.weight"]
    vq_renames = [("down.", "conv_blocks."), ("up.", "conv_blocks."), (".block.", ".res."), ("mid.block_1.", "mid.0.")]
    vq_renames += [("mid.attn_1.", "mid.1."), ("mid.block_2.", "mid.2.")]
    for name, tensor in s.items():
        if name.startswith("model.language_model."):
            out["language_model." + name.removeprefix("model.language_").replace("model.", "model.", 1)] = tensor
        if name.startswith("model.vqmodel."):
            rest = name.removeprefix("model.vqmodel.")
            for ours_part, theirs in vq_renames:
                if "sample." not in rest or ours_part in ("down.", "up."):
                    rest = rest.replace(f".{ours_part.lstrip('.')}", f".{theirs.lstrip('.')}", 1)
            out["gen_vision_model." + rest] = tensor
    return out


def test_a_released_checkpoint_loads_and_exports_back_bit_equal(tmp_path: Path) -> None:
    model, vq = make()
    released = {k: v.contiguous() for k, v in released_by_hand(model, vq).items()}
    extras = {
        "vision_model.vision_tower.attn_pool.latent": torch.ones(1, 1, 24),
        "vision_model.vision_tower.attn_pool.mlp.fc1.weight": torch.ones(4, 4),
        "gen_vision_model.quantize.codebook_used": torch.zeros(65536),
    }
    (tmp_path / "released").mkdir()
    save_file({**released, **extras}, tmp_path / "released" / "model.safetensors")
    other, other_vq = make(seed=3)
    load_weights(other, other_vq, open_weights(tmp_path / "released"))
    assert same(model, other)
    again = load_file(export(tmp_path / "out", other, other_vq, layout="deepseek") / "model.safetensors")
    assert set(again) == set(released)
    assert all(torch.equal(again[name], tensor) for name, tensor in released.items())
    assert read_model_config(tmp_path / "out") == tiny_config()


def test_a_released_bin_file_is_read_as_tensors_only(tmp_path: Path) -> None:
    model, vq = make()
    torch.save(released_by_hand(model, vq), tmp_path / "pytorch_model.bin")
    other, other_vq = make(seed=3)
    load_weights(other, other_vq, open_weights(tmp_path))
    assert same(model, other)


def test_the_configurations_of_the_released_models_are_understood(tmp_path: Path) -> None:
    parts = {
        "model_type": "multi_modality",
        "vision_config": {"params": {"model_name": "siglip_large_patch16_384"}},
        "gen_vision_config": {"cls": "VQ-16"},
    }
    seven = {
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_hidden_layers": 30,
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
    }
    (tmp_path / "config.json").write_text(json.dumps({**parts, "language_config": seven}))
    language = read_model_config(tmp_path).language
    assert (language.hidden_size, language.intermediate_size, language.layers, language.heads) == (4096, 11008, 30, 32)
    assert (language.vocab_size, language.max_position_embeddings) == (102400, 16384)
    item = {
        **seven,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps({**parts, "language_config": item}))
    assert read_model_config(tmp_path) == ModelConfig()


# --------------------------------------------------------------------------------------------------------------
# strictness


def test_missing_unexpected_and_misshaped_tensors_are_one_clear_error_and_change_nothing(tmp_path: Path) -> None:
    model, vq = make()
    state = dict(tensors(model, vq))
    state["model.aligner.fc1.wieght"] = state.pop("model.aligner.fc1.weight")
    state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()
    save_file(state, tmp_path / "model.safetensors")
    other, other_vq = make(seed=4)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(other, other_vq, open_weights(tmp_path))
    text = str(error.value)
    assert "1 missing: model.aligner.fc1.weight" in text
    assert "nearest to 'model.aligner.fc1.weight': 'model.aligner.fc1.wieght'" in text
    assert "1 unexpected: model.aligner.fc1.wieght" in text
    assert f"lm_head.weight is [63, {DIM}], the configuration says [64, {DIM}]" in text
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in before.items())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no \\*.safetensors"),
        ({"model.safetensors": b"garbage"}, "not a readable safetensors file"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'}, "the copy is incomplete"),
        ({"checkpoints/x": b""}, "run folder without export/"),
    ],
)
def test_unreadable_folders_name_the_cause(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        open_weights(tmp_path / "absent")


def test_a_folder_with_another_model_is_refused_with_what_was_found(tmp_path: Path) -> None:
    save_file({"bert.layer.0.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no Janus model.*found bert.layer.0.weight"):
        open_weights(tmp_path)


class Payload:
    def __reduce__(self):
        return (os.system, ("echo harm",))


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Payload()}, tmp_path / "vq.pt")
    with pytest.raises(CheckpointError, match="weights_only"):
        open_part(tmp_path / "vq.pt", "gen_vision_model")


# -------------------------------------------------------------------------------------------------------------- atomic
# export


# -------------------------------------------------------------------------------------------------------------- fresh
# and parts


def fresh(cfg: ModelConfig, seed: int = 0, **options) -> tuple[JanusPro, VQTokenizer, str]:
    model = JanusPro(cfg, LossConfig(), 1, False, PLACEHOLDER)
    vq = VQTokenizer(cfg.vq, SIDE)
    with torch.no_grad():
        for parameter in (*model.parameters(), *vq.parameters()):
            parameter.fill_(float("nan"))
    cfg = replace(cfg, init=Init.random)
    return model, vq, prepare_weights(model, vq, cfg, trainable=MODULES, seed=seed, **options)


def test_fresh_weights_follow_the_rules_whatever_construction_left() -> None:
    cfg = ModelConfig(
        vision=tiny_config().vision, vq=tiny_config().vq, language=tiny_config().language, adaptor_init_std=0.05
    )
    model, vq, messages = fresh(cfg)
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        if name.endswith("bias"):
            assert p.abs().max() == 0, name
        elif p.ndim == 1:
            assert (p == 1).all(), name
        elif module_of(name) == "gen_embed":
            assert torch.equal(p, vq.codebook)
        else:
            expected = 0.02 if module_of(name) in ("language_model", "vision_model") else 0.05
            assert p.std().item() == pytest.approx(expected, rel=0.25), name
    assert all(torch.isfinite(p).all() for p in vq.parameters())
    assert "gen_embed: codebook" in messages


def test_fresh_weights_depend_on_seed_and_name_alone() -> None:
    cfg = tiny_config()
    torch.manual_seed(1)
    a, _, _ = fresh(cfg)
    torch.manual_seed(2)
    b, _, _ = fresh(cfg)
    c, _, _ = fresh(cfg, seed=1)
    assert same(a, b)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    cfg.gen_embed_init = GenEmbedInit.random
    d, vq, _ = fresh(cfg)
    rows = d.model.generation_embeddings.weight
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(rows)))
    assert not torch.equal(rows, vq.codebook)


def test_parameters_are_written_inside_their_gather_and_only_by_the_writer() -> None:
    entered: list[int] = []

    @contextmanager
    def gather(parameters: list[nn.Parameter]) -> Iterator[None]:
        entered.extend(id(p) for p in parameters)
        yield

    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    init_fresh(model, 0.02, 0, gather=gather, is_writer=False)
    assert entered == [id(p) for p in model.parameters()]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_a_stage_starts_from_a_llama_a_siglip_and_a_vq_file(tmp_path: Path) -> None:
    cfg = tiny_config()
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=DIM, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64,
            tie_word_embeddings=False,
            rms_norm_eps=1e-6,
        )
    ).eval()  # fmt: skip
    llama.save_pretrained(tmp_path / "llama")
    siglip_config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        hidden_act="gelu",
    )
    siglip = SiglipVisionModel(siglip_config).eval()
    with torch.no_grad():
        for p in siglip.parameters():
            p.copy_(torch.randn(p.shape) * 0.2)
    siglip.save_pretrained(tmp_path / "siglip")
    source_model, source_vq = make(seed=9)
    released = released_by_hand(source_model, source_vq)
    llamagen = {
        k.removeprefix("gen_vision_model."): v for k, v in released.items() if k.startswith("gen_vision_model.")
    }
    torch.save({"model": {**llamagen, "quantize.codebook_used": torch.zeros(65536)}, "steps": 3}, tmp_path / "vq16.pt")

    cfg.init_parts.language_model = str(tmp_path / "llama")
    cfg.init_parts.vision_model = str(tmp_path / "siglip")
    cfg.init_parts.gen_vision_model = str(tmp_path / "vq16.pt")
    model, vq, messages = fresh(cfg)
    assert all(name in messages for name in ("llama", "siglip", "vq16.pt"))
    doc = random_docs(2, [Kind.TEXT])
    image = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
    pixels = (image.float() / 255 - 0.5) / 0.5
    with torch.no_grad():
        assert (
            model.lm_head(model.hidden_states(pack(doc))) - llama(torch.tensor([doc[0].ids])).logits[0]
        ).abs().max() < 1e-5
        ours = model.model.vision_model(pixels).last_hidden_state
        assert (ours - siglip(pixels).last_hidden_state).abs().max() < 1e-4
    assert vq.fingerprint() == source_vq.fingerprint()
    assert torch.equal(model.model.generation_embeddings.weight, unit_rows(source_vq.vqmodel.quantize.embedding.weight))


def test_a_vq_folder_and_a_whole_export_serve_as_parts_too(tmp_path: Path) -> None:
    source, source_vq = make(seed=9)
    source_vq.vqmodel.save_pretrained(tmp_path / "vq")
    export(tmp_path / "whole", source, source_vq)
    source.model.vision_model.save_pretrained(tmp_path / "vision")
    cfg = tiny_config()
    cfg.init_parts.gen_vision_model = str(tmp_path / "vq")
    cfg.init_parts.language_model = str(tmp_path / "whole")
    cfg.init_parts.vision_model = str(tmp_path / "vision")
    model, vq, _ = fresh(cfg)
    assert vq.fingerprint() == source_vq.fingerprint()
    for name, tensor in model.state_dict().items():
        if module_of(name) in ("language_model", "vision_model"):
            assert torch.equal(tensor, source.state_dict()[name]), name


def test_a_llama_with_tied_embeddings_lends_them_to_the_untied_text_head(tmp_path: Path) -> None:
    tied = LlamaConfig(
        hidden_size=DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    llama = LlamaForCausalLM(tied)
    llama.save_pretrained(tmp_path / "tied")
    cfg = tiny_config()
    cfg.init_parts.language_model = str(tmp_path / "tied")
    model, _, _ = fresh(cfg)
    assert torch.equal(model.lm_head.weight, llama.model.embed_tokens.weight)
    assert model.lm_head.weight.data_ptr() != model.model.language_model.embed_tokens.weight.data_ptr()


def test_a_part_of_another_size_and_a_contradiction_are_errors(tmp_path: Path) -> None:
    small = LlamaConfig(hidden_size=16, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    LlamaForCausalLM(small).save_pretrained(tmp_path / "small")
    cfg = tiny_config()
    cfg.init_parts.language_model = str(tmp_path / "small")
    with pytest.raises(CheckpointError, match=r"hidden_size is 16, ours 32 \(model.language.hidden_size=16\)"):
        fresh(cfg)
    (tmp_path / "small" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="of another shape"):
        fresh(cfg)
    cfg.init_from = str(tmp_path)
    with pytest.raises(ConfigError, match=r"remove model.init_parts.language_model"):
        fresh(cfg)


def test_init_from_takes_every_weight_from_an_export(tmp_path: Path) -> None:
    model, vq = make(seed=6)
    cfg = tiny_config()
    cfg.init_from = str(export(tmp_path / "e", model, vq))
    loaded, loaded_vq, messages = fresh(cfg)
    assert same(model, loaded)
    assert loaded_vq.fingerprint() == vq.fingerprint()
    assert messages == f"all weights from {tmp_path / 'e'}"


def test_the_released_map_covers_every_tensor_of_the_full_size_model() -> None:
    from jp_train.model import layouts

    with torch.device("meta"):
        names = list(JanusForConditionalGeneration(build_config(ModelConfig(), 0)).state_dict())
    released = [layouts.to_released(name) for name in names]
    assert len(names) == 964
    distinct = {key for key, _ in released}
    # q, k and v of 24 blocks join: two tensors less for weight and for bias
    assert len(distinct) == len(names) - 2 * 2 * 24
    back = {name for key in distinct for name, _ in layouts.from_released(key)}
    assert back == set(names)
    pooling_and_codebook_used = 882 - len(distinct)  # the released file holds 882 tensors
    assert pooling_and_codebook_used == 14
