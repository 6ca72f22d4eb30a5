"""Folders of weights that are not what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jp_train.errors import CheckpointError
from jp_train.model.weight_files import open_part, open_weights


def test_a_folder_of_runs_names_the_run_that_was_meant(tmp_path: Path) -> None:
    for stage in ("stage1", "stage2", "stage3"):
        (tmp_path / "smoke" / stage / "export").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"did you mean \S+/smoke/stage3\?"):
        open_weights(tmp_path / "smoke")
    with pytest.raises(CheckpointError, match=r"no \*\.bin file$"):
        open_weights(tmp_path / "smoke" / "stage1" / "export")


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 4180000000\n"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>" * 20
REFUSAL = b'{"error": "Unauthorized"}'
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LFS_POINTER, "is a Git LFS pointer.*git lfs pull"),
        (PAGE, "is an HTML page"),
        (REFUSAL, "is a server's answer.*Unauthorized"),
        (b"", "is an empty file"),
    ],
)
def test_what_a_download_left_in_place_of_weights_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (open_weights, lambda path: open_part(path, "language_model")):
        with pytest.raises(CheckpointError, match=rf"{name} {message}"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map": {"a": "model-1.safeten', "is no whole JSON file"),
        (b"[1, 2]", 'has no "weight_map"'),
        (b'{"metadata": {}}', 'has no "weight_map"'),
        (b'{"weight_map": {}}', 'has no "weight_map"'),
        (b'{"weight_map": {"a": 3}}', 'has no "weight_map"'),
        (b"\xff\xfe", "is no whole JSON file"),
    ],
)
def test_a_broken_index_of_weights_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_weights(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "vq.pt"])
def test_weights_cut_short_at_any_byte_are_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    tensors = {"model.language_model.norm.weight": torch.ones(9), "lm_head.weight": torch.ones(4, 9)}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    whole = path.read_bytes()
    for end in {1, 2, 8, 9, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=name):
            open_part(path, "language_model")


def test_a_lora_adapter_is_no_model(tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 8)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="holds a LoRA adapter.*merge"):
        open_part(tmp_path, "language_model")
