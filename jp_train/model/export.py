"""Weights out: one folder that transformers (or the released code) loads, written beside its final place and renamed
when whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from omegaconf import OmegaConf
from transformers import JanusConfig, JanusForConditionalGeneration

from jp_train.config.schema import DataConfig, TokenizerConfig
from jp_train.errors import CheckpointError
from jp_train.files import fsync
from jp_train.model import layouts
from jp_train.model.configuration import parts_of, rope_theta
from jp_train.model.partition_files import StreamedShard
from jp_train.model.processor_files import write_json, write_processor_files
from jp_train.model.sampling import GENERATION_FILE, Sampling
from jp_train.model.vq import unit_rows
from jp_train.types import SpecialTokens

Layout = Literal["hf", "deepseek"]

RUN_CONFIG = "jp_train.yaml"
"""The resolved configuration of the run that made an export: templates, system prompt and token strings for
inference."""

CODEBOOK = "model.vqmodel.quantize.embedding.weight"


class SavedTokenizer(Protocol):
    """What an export needs of a tokenizer (``data.tokenizer.Tokenizer`` has it)."""

    cfg: TokenizerConfig
    special: SpecialTokens

    def save(self, directory: Path) -> Any: ...


def write_export(
    path: str | Path,
    janus_config: JanusConfig,
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    tokenizer: SavedTokenizer | None,
    *,
    layout: Layout = "hf",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 5 * 2**30,
    run_config: str | None = None,
    sampling: Sampling | None = None,
    is_writer: bool = True,
) -> None:
    """Write a whole model (trained module and VQ tokenizer) to folder ``path``; replaces an earlier export.

    Complete or absent: everything goes to a folder beside, is fsynced, and is renamed into place at the end.

    Args:
        named_tensors: canonical names with tensors, each whole when it is yielded.  Under ZeRO-3 every rank iterates
            (the iterator gathers), and only the writer keeps anything.
        tokenizer: its files are saved along, and its special ids go into config.json and generation_config.json; None
            leaves them out.
        layout: ``hf`` for ``JanusForConditionalGeneration.from_pretrained``; ``deepseek`` for the released code (which
            needs a non-strict load, because the unused attention pooling of SigLIP is not stored).
        dtype: of the trained weights.  VQ tensors keep float32: they are never trained, and every id depends on their
            last bits.  In the hf layout the codebook rows are stored with unit length, since transformers' ``encode``
            does not normalise them; the deepseek layout keeps them as they are.
        run_config: the run's configuration as YAML, stored for ``inference.load_for_inference``.
        sampling: defaults of image generation (None: the paper's).

    Raises:
        CheckpointError: if tensors are missing or unknown; no folder appears then.
    """
    if not is_writer:
        for _ in named_tensors:
            pass
        return
    path = Path(path)
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    seen: set[str] = set()
    try:
        tensors = _converted(named_tensors, seen, layout, dtype)
        _write_shards(beside, _released(tensors) if layout == "deepseek" else tensors, max_shard_bytes)
        _check_complete(janus_config, seen)
        _write_configs(
            beside, janus_config, tokenizer, layout, dtype, sampling or Sampling(), _system_prompt(run_config)
        )
        if run_config is not None:
            (beside / RUN_CONFIG).write_text(run_config, encoding="utf-8")
        for item in (*beside.rglob("*"), beside):
            fsync(item)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _replace(beside, path)


def _write_configs(
    folder: Path,
    janus_config: JanusConfig,
    tokenizer: SavedTokenizer | None,
    layout: Layout,
    dtype: torch.dtype,
    sampling: Sampling,
    system_prompt: str,
) -> None:
    special = tokenizer.special if tokenizer is not None else None
    config = _hf_config(janus_config, special, dtype) if layout == "hf" else _released_config(janus_config, dtype)
    write_json(folder / "config.json", config)
    if tokenizer is None:
        return
    write_json(folder / GENERATION_FILE, _generation_config(tokenizer.special, sampling))
    tokenizer.save(folder)
    vision = parts_of(janus_config).vision
    write_processor_files(
        folder,
        tokenizer.cfg,
        tokenizer.special,
        released=layout == "deepseek",
        slots=vision.num_image_tokens,
        side=_side(janus_config),
        system_prompt=system_prompt,
    )


def _side(janus_config: JanusConfig) -> int:
    side = parts_of(janus_config).vision.image_size
    assert isinstance(side, int)
    return side


def _system_prompt(run_config: str | None) -> str:
    """Of the run, or Janus-Pro's."""
    prompt = OmegaConf.select(OmegaConf.create(run_config or "{}"), "data.system_prompt")
    return DataConfig().system_prompt if prompt is None else str(prompt)


def _converted(
    named_tensors: Iterable[tuple[str, torch.Tensor]], seen: set[str], layout: str, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in named_tensors:
        name = name.removeprefix("module.")
        if name in seen:
            raise CheckpointError(f"export: tensor {name!r} was given twice")
        seen.add(name)
        frozen = name.startswith("model.vqmodel.")
        tensor = tensor.detach().to(device="cpu", dtype=torch.float32 if frozen else dtype)
        if name == CODEBOOK and layout == "hf":
            tensor = unit_rows(tensor)
        yield name, tensor.contiguous().clone()


def _released(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Released names; q, k and v wait for each other and are joined."""
    waiting: dict[str, dict[layouts.Piece, torch.Tensor]] = {}
    fused = (layouts.Piece.QUERY, layouts.Piece.KEY, layouts.Piece.VALUE)
    for name, tensor in tensors:
        try:
            released, piece = layouts.to_released(name)
        except KeyError:
            raise CheckpointError(f"export: tensor {name!r} has no place in the released layout") from None
        if piece is layouts.Piece.WHOLE:
            yield released, tensor
        elif piece is layouts.Piece.FIRST_ROW:
            yield released, tensor.unsqueeze(0)
        else:
            parts = waiting.setdefault(released, {})
            parts[piece] = tensor
            if len(parts) == len(fused):
                yield released, torch.cat([parts[p] for p in fused])
                del waiting[released]
    if waiting:
        raise CheckpointError(f"export: {sorted(waiting)[0]} lacks one of q, k and v")


def _write_shards(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], max_shard_bytes: int) -> None:
    """model.safetensors, or numbered shards of at most ``max_shard_bytes`` with their index; holds one tensor in
    memory."""
    shards: list[list[str]] = []
    total = 0
    shard: StreamedShard | None = None
    for name, tensor in tensors:
        if shard is not None and (shard.size + tensor.nbytes > max_shard_bytes or not shard.fits(name, tensor)):
            shard.close()
            shard = None
        if shard is None:
            shard = StreamedShard(folder / f"shard-{len(shards)}")
            shards.append(shard.names)
        shard.add(name, tensor)
        total += tensor.nbytes
    if shard is not None:
        shard.close()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _check_complete(janus_config: JanusConfig, seen: set[str]) -> None:
    with torch.device("meta"):
        expected = set(JanusForConditionalGeneration(_plain(janus_config)).state_dict())
    missing, unknown = sorted(expected - seen), sorted(seen - expected)
    if missing or unknown:
        raise CheckpointError(
            f"export: {len(missing)} tensors missing ({', '.join(missing[:4])}), {len(unknown)} unknown "
            f"({', '.join(unknown[:4])}): "
            "give the trained module's and the VQ tokenizer's tensors under transformers' names"
        )


def _plain(janus_config: JanusConfig) -> JanusConfig:
    """A copy without jp_train's attention function, which a reader does not have."""
    return JanusConfig.from_dict(janus_config.to_dict())


def _hf_config(janus_config: JanusConfig, special: SpecialTokens | None, dtype: torch.dtype) -> dict[str, Any]:
    config = _plain(janus_config).to_dict()
    config["architectures"] = ["JanusForConditionalGeneration"]
    for part in (config, config["text_config"]):
        part["tie_word_embeddings"] = False
        part["dtype"] = str(dtype).removeprefix("torch.")
    if special is not None:
        config["image_token_id"] = special.image_placeholder
        # pad_token_id stays unset: with it, the embedding row of the pad token would be frozen at zero
        config["text_config"].update(bos_token_id=special.bos, eos_token_id=special.eos)
    return config


def _generation_config(special: SpecialTokens, sampling: Sampling) -> dict[str, Any]:
    """What transformers' ``generate`` reads: ids and guidance; the temperature of images is for `jp-train generate`."""
    return {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "pad_token_id": special.pad,
        "do_sample": True,  # the likeliest code of every image position makes no picture
        **sampling.keys({"boi_token_id": special.boi}),
    }


def _released_config(janus_config: JanusConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of ``MultiModalityCausalLM``.  The key ``jp_train`` adds the sizes that the released classes
    hard-code."""
    vision, vq, text = parts_of(janus_config)
    width = text.hidden_size

    def module(cls: str, model_type: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": model_type, "params": params}

    def projector(model_type: str, input_dim: int) -> dict[str, Any]:
        return module(
            "MlpProjector", model_type, depth=2, input_dim=input_dim, n_embed=width, projector_type="mlp_gelu"
        )

    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "aligner_config": projector("aligner", vision.hidden_size),
        "gen_aligner_config": projector("gen_aligner", vq.embed_dim),
        "gen_head_config": module(
            "vision_head", "gen_head", image_token_embed=width, image_token_size=vq.num_embeddings, n_embed=width
        ),
        "gen_vision_config": module("VQ-16", "gen_vision", image_token_size=vq.num_embeddings, n_embed=vq.embed_dim),
        "language_config": {
            "model_type": "llama",
            "hidden_size": width,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "vocab_size": text.vocab_size,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": rope_theta(text),
            "max_position_embeddings": text.max_position_embeddings,
            "torch_dtype": str(dtype).removeprefix("torch."),
        },
        "vision_config": module(
            "CLIPVisionTower",
            "vision",
            image_size=vision.image_size,
            model_name="siglip_large_patch16_384",
            select_feature="same",
            select_layer=-1,
        ),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "jp_train": _plain(janus_config).to_dict(),
    }


def _replace(beside: Path, path: Path) -> None:
    """Rename into place; an earlier export steps aside first and is removed last."""
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    beside.rename(path)
    fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)
