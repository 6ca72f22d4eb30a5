"""Weights in: every parameter of the model set explicitly, from files or by rule.

Nothing relies on transformers' initialisation, which is void under ``deepspeed.zero.Init``. ``gather`` is how a caller
under ZeRO-3 makes partitioned parameters whole for a moment (``deepspeed.zero.GatheredParameters(params,
modifier_rank=0)``); elsewhere it does nothing. Only the writer (rank 0) reads tensors; the others take part in the
gathers. The VQ tokenizer is replicated: every rank reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from jp_train.config.choices import GenEmbedInit
from jp_train.config.schema import ModelConfig
from jp_train.model.freeze import VQ_MODULE, module_of
from jp_train.model.start_weights import SECTIONS, open_start, open_vq
from jp_train.model.vq import VQTokenizer, unit_rows
from jp_train.model.weight_files import WeightSource, check_keys

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]

TOWER_STD = 0.02
"""Standard deviation of fresh matrices of the language model and the vision tower (transformers' initializer_range)."""


def no_gather(_: list[nn.Parameter]) -> AbstractContextManager[object]:
    """For parameters that are whole already."""
    return nullcontext()


def load_weights(
    model: nn.Module,
    vq: VQTokenizer | None,
    source: WeightSource,
    *,
    gather: Gather = no_gather,
    is_writer: bool = True,
) -> None:
    """Set every parameter of ``model`` (a JanusPro) and of ``vq`` from a whole-model source.

    The model takes its own dtype, the VQ tokenizer stays float32. With ``vq`` None the source's VQ tensors are ignored.

    Raises:
        CheckpointError: if names or shapes differ in any way; nothing has been changed then.
    """
    if vq is None:
        source = source.renamed(lambda name: None if name.startswith("model.vqmodel.") else name)
    check_keys({**_shapes(model), **_vq_shapes(vq)}, source)
    _copy(model, source, gather, is_writer)
    if vq is not None:
        _copy_vq(vq, source)


def load_vq(cfg: ModelConfig, *, seed: int) -> VQTokenizer:
    """The VQ tokenizer alone, on the CPU, with the weights that ``prepare_weights`` gives it.

    Raises:
        ConfigError: where nothing names its weights although ``model.init`` is not ``random``.
        CheckpointError: from the files.
    """
    source = open_vq(cfg)
    vq = VQTokenizer(cfg.vq, cfg.vision.image_size)
    if source is None:
        init_fresh_vq(vq, seed)
    else:
        _copy_vq(vq, source)
    return vq


def prepare_weights(
    model: nn.Module,
    vq: VQTokenizer,
    cfg: ModelConfig,
    *,
    trainable: Collection[str],
    seed: int,
    gather: Gather = no_gather,
    is_writer: bool = True,
) -> str:
    """Set every weight as the configuration says; returns what was done, in one line.

    ``init_from`` takes everything from a whole model. Otherwise all is fresh, then ``init_parts`` are loaded, then
    gen_embed starts as the VQ codebook (``gen_embed_init``). ``trainable``: the modules that will learn.

    Raises:
        ConfigError: if both ``init_from`` and ``init_parts`` are set, or a frozen module has no weights.
        CheckpointError: from the files, or if they do not fit; nothing has been changed then.
    """
    start = open_start(cfg, trainable)
    if start.whole is not None:
        load_weights(model, vq, start.whole, gather=gather, is_writer=is_writer)
        return f"all weights from {start.whole.path}{start.remark()}"
    init_fresh(model, cfg.adaptor_init_std, seed, gather=gather, is_writer=is_writer)
    init_fresh_vq(vq, seed)
    for name, source in start.parts.items():
        if name == VQ_MODULE:
            _copy_vq(vq, source)
        else:
            _copy(model, source, gather, is_writer)
    if cfg.gen_embed_init is GenEmbedInit.codebook:
        gen_embed_from_codebook(model, vq, gather=gather, is_writer=is_writer)
    fresh = [name for name in (*SECTIONS, "aligner", "gen_aligner", "gen_head") if name not in start.parts]
    sources = [f"{name} from {source.path}" for name, source in start.parts.items()]
    gen_embed = f"fresh (seed {seed}): {', '.join(fresh)}; gen_embed: {cfg.gen_embed_init.value}"
    return "; ".join([*sources, gen_embed]) + start.remark()


def init_fresh(model: nn.Module, std: float, seed: int, *, gather: Gather = no_gather, is_writer: bool = True) -> None:
    """Set every parameter of a JanusPro by rule: norms one, biases zero, matrices normal.

    ``std`` is that of aligner, gen_aligner and gen_head; language model and vision tower take ``TOWER_STD``; gen_embed
    gets random rows of
    unit length.  Each tensor has its own generator, seeded by (seed, name): values depend on nothing else.
    """
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            if is_writer:
                module = module_of(name)
                scale = TOWER_STD if module in ("language_model", "vision_model") else std
                value = _fresh(name, parameter.shape, scale, seed)
                parameter.data.copy_(torch.nn.functional.normalize(value, dim=-1) if module == "gen_embed" else value)


def init_fresh_vq(vq: VQTokenizer, seed: int) -> None:
    """Set every parameter of a VQ tokenizer by rule (the same on every rank); codebook rows have unit length."""
    for name, parameter in vq.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        value = _fresh(name, parameter.shape, fan_in**-0.5, seed)
        parameter.data.copy_(unit_rows(value) if "quantize" in name else value)


def gen_embed_from_codebook(
    model: nn.Module, vq: VQTokenizer, *, gather: Gather = no_gather, is_writer: bool = True
) -> None:
    """Start gen_embed as the unit-length VQ codebook (docs/open_points.md, point 10)."""
    parameter = model.get_parameter("model.generation_embeddings.weight")
    with gather([parameter]):
        if is_writer:
            parameter.data.copy_(vq.codebook)


def _fresh(name: str, shape: Iterable[int], std: float, seed: int) -> torch.Tensor:
    shape = tuple(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)  # the only vectors besides biases are norm weights
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator).mul_(std)


def _copy(model: nn.Module, source: WeightSource, gather: Gather, is_writer: bool) -> None:
    """Copy what the source has; the order of the gathers is the model's, the same on every rank."""
    names = set(source.keys())
    for name, parameter in model.named_parameters():
        if name in names:
            with gather([parameter]):
                if is_writer:
                    parameter.data.copy_(source.get(name))


def _copy_vq(vq: VQTokenizer, source: WeightSource) -> None:
    for name, parameter in vq.named_parameters():
        parameter.data.copy_(source.get(f"model.{name}"))


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and whole shapes, also of parameters that ZeRO-3 has partitioned."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in model.named_parameters()
    }


def _vq_shapes(vq: VQTokenizer | None) -> dict[str, tuple[int, ...]]:
    return {} if vq is None else {f"model.{name}": tuple(parameter.shape) for name, parameter in vq.named_parameters()}
