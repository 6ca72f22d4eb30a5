"""Exported folders, against transformers' own loading and against the released names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import JanusForConditionalGeneration

from jp_train.errors import CheckpointError
from jp_train.model.export import write_export
from jp_train.model.pretrained import load_weights
from jp_train.model.stored_config import read_model_config
from jp_train.model.weight_files import open_weights
from jp_train.types import Kind
from tests.model.janus_tiny import PLACEHOLDER, SIDE, pack, random_docs, tiny_config
from tests.model.test_pretrained import FakeTokenizer, export, make, released_by_hand, same, tensors


@pytest.mark.parametrize("shard_bytes", [5 * 2**30, 50_000])
def test_transformers_loads_an_export_without_missing_or_unexpected_keys(tmp_path: Path, shard_bytes: int) -> None:
    model, vq = make()
    folder = export(tmp_path / "export", model, vq, max_shard_bytes=shard_bytes)
    assert (len(list(folder.glob("*.safetensors"))) > 1) is (shard_bytes < 10**6)
    loaded, info = JanusForConditionalGeneration.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert loaded.config.tie_word_embeddings is False
    assert loaded.config.text_config.tie_word_embeddings is False
    assert loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    doc = random_docs(1, [Kind.TEXT])
    with torch.no_grad():
        assert (
            loaded.eval()(torch.tensor([doc[0].ids])).logits[0] - model.lm_head(model.hidden_states(pack(doc)))
        ).abs().max() < 1e-4


def test_transformers_encodes_the_same_vq_ids_from_an_export(tmp_path: Path) -> None:
    model, vq = make()
    loaded = JanusForConditionalGeneration.from_pretrained(export(tmp_path / "e", model, vq), dtype=torch.float32)
    images = torch.randint(0, 256, (6, 3, SIDE, SIDE), dtype=torch.uint8)
    theirs = loaded.model.vqmodel.encode(images.float() / 127.5 - 1).image_tokens.view(6, -1)
    assert torch.equal(theirs, vq.encode(images))


def test_trained_weights_take_the_dtype_and_vq_weights_keep_float32(tmp_path: Path) -> None:
    model, vq = make()
    stored = load_file(export(tmp_path / "e", model, vq, dtype=torch.bfloat16) / "model.safetensors")
    kinds = {(name.startswith("model.vqmodel."), tensor.dtype) for name, tensor in stored.items()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}


def test_special_ids_reach_the_configuration_files(tmp_path: Path) -> None:
    folder = export(tmp_path / "e", *make(), run_config="seed: 7\n")
    config, generation = (json.loads((folder / n).read_text()) for n in ("config.json", "generation_config.json"))
    assert (config["image_token_id"], config["text_config"]["bos_token_id"], config["text_config"]["eos_token_id"]) == (
        PLACEHOLDER,
        0,
        1,
    )
    assert config["text_config"]["pad_token_id"] is None
    assert generation["generation_kwargs"] == {"boi_token_id": 3, "temperature": 1.0}
    assert (folder / "tokenizer.model").exists()
    assert (folder / "jp_train.yaml").read_text() == "seed: 7\n"
    assert read_model_config(folder) == tiny_config()


def test_the_deepseek_export_has_exactly_the_released_names_and_tensors(tmp_path: Path) -> None:
    model, vq = make()
    stored = load_file(export(tmp_path / "d", model, vq, layout="deepseek") / "model.safetensors")
    expected = released_by_hand(model, vq)
    assert set(stored) == set(expected)
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


def test_a_failed_export_leaves_the_earlier_one_and_nothing_beside_it(tmp_path: Path) -> None:
    model, vq = make()
    folder = export(tmp_path / "export", model, vq)
    before = (folder / "model.safetensors").read_bytes()
    for lost in ("lm_head.weight", "model.vqmodel.quantize.embedding.weight"):
        some = [(k, v) for k, v in tensors(model, vq) if k != lost]
        with pytest.raises(CheckpointError, match=f"1 tensors missing \\({lost}"):
            write_export(folder, model.janus_config, some, FakeTokenizer(), dtype=torch.float32)
    some = [(k, v) for k, v in tensors(model, vq) if "k_proj" not in k or "vision" not in k]
    with pytest.raises(CheckpointError, match="lacks one of q, k and v"):
        write_export(folder, model.janus_config, some, FakeTokenizer(), layout="deepseek")
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_an_export_replaces_an_earlier_one_and_only_the_writer_writes(tmp_path: Path) -> None:
    export(tmp_path / "e", *make())
    model, vq = make(seed=2)
    export(tmp_path / "e", model, vq)
    other, other_vq = make(seed=3)
    load_weights(other, other_vq, open_weights(tmp_path / "e"))
    assert same(model, other)
    assert [p.name for p in tmp_path.iterdir()] == ["e"]
    seen: list[str] = []
    write_export(
        tmp_path / "none",
        model.janus_config,
        ((seen.append(k) or k, v) for k, v in tensors(model, vq)),
        None,
        is_writer=False,
    )
    assert len(seen) == len(list(tensors(model, vq)))
    assert not (tmp_path / "none").exists()
