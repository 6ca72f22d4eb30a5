"""Weights in: files read lazily, names checked strictly, every parameter of the model set explicitly.

Nothing relies on transformers' initialisation, which is void under ``deepspeed.zero.Init``.  ``gather`` is how a caller under ZeRO-3
makes partitioned parameters whole for a moment (``deepspeed.zero.GatheredParameters(params, modifier_rank=0)``); elsewhere it does
nothing.  Only the writer (rank 0) reads tensors; the others take part in the gathers.  The VQ tokenizer is replicated: every rank reads it.

Canonical names are those of transformers' JanusForConditionalGeneration, VQ included (see ``layouts.py``).
No pickle is executed: safetensors, or ``torch.load(weights_only=True)`` for .pt and .bin files.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from jp_train.config.schema import GenEmbedInit, ModelConfig
from jp_train.errors import CheckpointError, ConfigError
from jp_train.model import layouts
from jp_train.model.export import write_export
from jp_train.model.freeze import module_of
from jp_train.model.vq import VQTokenizer, unit_rows

__all__ = [
    "WeightSource",
    "init_fresh",
    "init_parts",
    "load_weights",
    "open_part",
    "open_weights",
    "prepare_weights",
    "write_export",
]

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[object]]

TOWER_STD = 0.02
"""Standard deviation of fresh matrices of the language model and the vision tower (transformers' initializer_range)."""

SHOWN = 6
"""Names listed in an error message."""


def no_gather(_: list[nn.Parameter]) -> AbstractContextManager[object]:
    """For parameters that are whole already."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor that has not been read yet."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


class WeightSource:
    """Named tensors that are read when asked for."""

    def __init__(self, path: Path, entries: Mapping[str, _Entry]) -> None:
        self.path = path
        self._entries = dict(entries)

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Known from the file's header."""
        return self._entries[name].shape

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            CheckpointError: if there is no such tensor, or the file cannot be read.
        """
        if name not in self._entries:
            raise CheckpointError(f"{self.path} has no tensor {name!r}{_nearest(name, self.keys())}")
        try:
            return self._entries[name].read()
        except (OSError, SafetensorError, RuntimeError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error

    def select(self, prefixes: Sequence[str]) -> WeightSource:
        """The tensors whose name starts with one of the prefixes."""
        return WeightSource(self.path, {k: e for k, e in self._entries.items() if k.startswith(tuple(prefixes))})

    def renamed(self, rename: Callable[[str], str | None]) -> WeightSource:
        """Under other names; a tensor renamed to None is left out."""
        return WeightSource(self.path, {new: e for k, e in self._entries.items() if (new := rename(k)) is not None})

    def canonical(self) -> WeightSource:
        """A released checkpoint under canonical names; names that the released layout does not know are kept, to be reported."""
        entries: dict[str, _Entry] = {}
        for key, entry in self._entries.items():
            try:
                pieces = layouts.from_released(key)
            except KeyError:
                entries[key] = entry
                continue
            for name, piece in pieces:
                entries[name] = _piece(entry, piece)
        return WeightSource(self.path, entries)

    def with_alias(self, name: str, target: str) -> WeightSource:
        """Also offers tensor ``target`` as ``name``."""
        return WeightSource(self.path, {**self._entries, name: self._entries[target]})


def _piece(entry: _Entry, piece: layouts.Piece) -> _Entry:
    if piece is layouts.Piece.WHOLE:
        return entry
    if piece is layouts.Piece.FIRST_ROW:
        return _Entry(entry.shape[1:], lambda: entry.read()[0])
    third = entry.shape[0] // 3
    start = int(piece.value) * third
    return _Entry((third, *entry.shape[1:]), lambda: entry.read()[start : start + third])


def open_weights(path: str | Path) -> WeightSource:
    """Weights of a whole model under canonical names.

    ``path``: a folder in transformers' format, a released deepseek-ai folder, or a run folder (its ``export/`` is taken).

    Raises:
        CheckpointError: if there is nothing, or nothing known, at ``path``.
    """
    path = Path(path)
    if not (path / "config.json").exists() and (path / "export").is_dir():
        path = path / "export"
    if (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path} is a run folder without export/: its stage has not ended, or checkpoint.export_at_end was off. "
            f"Write one with `jp-train export {path}/checkpoints/STEP {path}/export --layout hf`"
        )
    source = _open(path)
    keys = source.keys()
    if layouts.is_canonical(keys):
        return source
    if layouts.is_released(keys):
        return source.canonical()
    raise CheckpointError(
        f"{path} holds no Janus model: expected tensors like 'model.language_model.layers.0…' (transformers) or "
        f"'language_model.model.layers.0…' (released), found {_some(keys)}. A part of a model goes into model.init_parts instead"
    )


def open_part(path: str | Path, part: str) -> WeightSource:
    """One pretrained part under canonical names, of ``language_model``, ``vision_model`` or ``gen_vision_model``.

    The file or folder may hold just that part (Hugging Face Llama; Hugging Face SigLIP or transformers' JanusVisionModel; LlamaGen's VQ-16
    .pt or transformers' JanusVQVAE) or a whole Janus model in either layout.  A Llama with tied embeddings lends them to the text head.

    Raises:
        CheckpointError: if there is nothing readable at ``path``.
    """
    prefixes = {"language_model": ("model.language_model.", "lm_head."), "vision_model": ("model.vision_model.",)}
    renames = {"language_model": layouts.language_part, "vision_model": layouts.vision_part, "gen_vision_model": layouts.vq_part}
    wanted = prefixes.get(part, ("model.vqmodel.",))
    source = _open(Path(path))
    keys = source.keys()
    if layouts.is_canonical(keys):
        return source.select(wanted)
    if layouts.is_released(keys):
        return source.canonical().select(wanted)
    source = source.renamed(renames[part])
    embeddings = "model.language_model.embed_tokens.weight"
    if part == "language_model" and "lm_head.weight" not in source.keys() and embeddings in source.keys():  # noqa: SIM118
        source = source.with_alias("lm_head.weight", embeddings)
    return source


def _open(path: Path) -> WeightSource:
    """All tensors of a file or folder under their own names."""
    if path.is_file():
        return WeightSource(path, _open_file(path))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder. Give a folder with safetensors, or a .safetensors, .pt or .bin file")
    for ending in ("safetensors", "bin"):
        index = next(iter(sorted(path.glob(f"*.{ending}.index.json"))), None)
        if index is not None:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / name for name in names]
            absent = [file.name for file in files if not file.exists()]
            if absent:
                raise CheckpointError(f"{index} lists {len(files)} files but {', '.join(absent)} missing: the copy is incomplete")
        else:
            files = sorted(path.glob(f"*.{ending}"))
        if files:
            entries: dict[str, _Entry] = {}
            for file in files:
                entries.update(_open_file(file))
            return WeightSource(path, entries)
    raise CheckpointError(f"{path} holds no *.safetensors and no *.bin file")


def _open_file(path: Path) -> dict[str, _Entry]:
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
            return {
                key: _Entry(tuple(file.get_slice(key).get_shape()), lambda key=key: file.get_tensor(key))  # type: ignore[misc]
                for key in file.keys()  # noqa: SIM118 - safe_open is no dict
            }
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of the format before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as plain tensors (weights_only): {error}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dictionary of tensors")
    return {k: _Entry(tuple(t.shape), lambda t=t: t) for k, t in state.items() if isinstance(t, torch.Tensor)}  # type: ignore[misc]


def check_keys(expected: Mapping[str, tuple[int, ...]], source: WeightSource) -> None:
    """Names and shapes must match exactly.

    Raises:
        CheckpointError: listing missing (each with the nearest name), unexpected and wrongly shaped tensors, shortened.
    """
    found = source.keys()
    missing = [name for name in expected if name not in set(found)]
    unexpected = [name for name in found if name not in expected]
    shapes = [name for name in expected if name in set(found) and source.shape(name) != tuple(expected[name])]
    problems = []
    if missing:
        near = _nearest(missing[0], unexpected)
        problems.append(f"{len(missing)} missing: {_some(missing)}{near}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {_some(unexpected)}")
    if shapes:
        first = [f"{n} is {list(source.shape(n))}, the configuration says {list(expected[n])}" for n in shapes[:SHOWN]]
        problems.append(f"{len(shapes)} of another shape: {'; '.join(first)}")
    if problems:
        raise CheckpointError(
            f"{source.path} does not fit the model of this configuration. {'. '.join(problems)}. Check model.* in the config"
        )


def load_weights(
    model: nn.Module, vq: VQTokenizer | None, source: WeightSource, *, gather: Gather = no_gather, is_writer: bool = True
) -> None:
    """Set every parameter of ``model`` (a JanusPro) and of ``vq`` from a whole-model source.

    The model takes its own dtype, the VQ tokenizer stays float32.  With ``vq`` None the source's VQ tensors are ignored.

    Raises:
        CheckpointError: if names or shapes differ in any way; nothing has been changed then.
    """
    if vq is None:
        source = source.renamed(lambda name: None if name.startswith("model.vqmodel.") else name)
    check_keys({**_shapes(model), **_vq_shapes(vq)}, source)
    _copy(model, source, gather, is_writer)
    if vq is not None:
        _copy_vq(vq, source)


def init_parts(
    model: nn.Module, vq: VQTokenizer, parts: Mapping[str, str | None], *, gather: Gather = no_gather, is_writer: bool = True
) -> list[str]:
    """Load the pretrained parts that are given (``model.init_parts``); returns the names of those loaded.

    Raises:
        CheckpointError: if a part does not fit the configuration; names and shapes are checked before anything is changed.
    """
    opened = {part: open_part(path, part) for part, path in parts.items() if path}
    for part, source in opened.items():
        if part == "gen_vision_model":
            check_keys(_vq_shapes(vq), source)
        else:
            check_keys({k: s for k, s in _shapes(model).items() if module_of(k) == part}, source)
    for part, source in opened.items():
        if part == "gen_vision_model":
            _copy_vq(vq, source)
        else:
            _copy(model, source, gather, is_writer)
    return list(opened)


def prepare_weights(
    model: nn.Module, vq: VQTokenizer, cfg: ModelConfig, *, seed: int, gather: Gather = no_gather, is_writer: bool = True
) -> str:
    """Set every weight as the configuration says; returns one line that tells what was done.

    ``init_from`` takes everything from a whole model.  Otherwise all is fresh, then ``init_parts`` are loaded, then gen_embed starts as
    the VQ codebook (``gen_embed_init``).

    Raises:
        ConfigError: if both ``init_from`` and ``init_parts`` are set.
        CheckpointError: from the files.
    """
    parts = {name: getattr(cfg.init_parts, name) for name in ("language_model", "vision_model", "gen_vision_model")}
    if cfg.init_from:
        given = [name for name, path in parts.items() if path]
        if given:
            raise ConfigError(f"model.init_from={cfg.init_from} already names every weight: remove model.init_parts.{given[0]}")
        source = open_weights(cfg.init_from)
        load_weights(model, vq, source, gather=gather, is_writer=is_writer)
        return f"all weights from {source.path}"
    init_fresh(model, cfg.adaptor_init_std, seed, gather=gather, is_writer=is_writer)
    init_fresh_vq(vq, seed)
    loaded = init_parts(model, vq, parts, gather=gather, is_writer=is_writer)
    if cfg.gen_embed_init is GenEmbedInit.codebook:
        gen_embed_from_codebook(model, vq, gather=gather, is_writer=is_writer)
    fresh = [name for name in (*parts, "aligner", "gen_aligner", "gen_head") if name not in loaded]
    told = [f"{name} from {parts[name]}" for name in loaded]
    return "; ".join([*told, f"fresh (seed {seed}): {', '.join(fresh)}; gen_embed: {cfg.gen_embed_init.value}"])


def init_fresh(model: nn.Module, std: float, seed: int, *, gather: Gather = no_gather, is_writer: bool = True) -> None:
    """Set every parameter of a JanusPro by rule: norms one, biases zero, matrices normal.

    ``std`` is that of aligner, gen_aligner and gen_head; language model and vision tower take ``TOWER_STD``; gen_embed gets random rows of
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


def gen_embed_from_codebook(model: nn.Module, vq: VQTokenizer, *, gather: Gather = no_gather, is_writer: bool = True) -> None:
    """Start gen_embed as the unit-length VQ codebook (specification, section 8, point 10)."""
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
    return {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in model.named_parameters()}


def _vq_shapes(vq: VQTokenizer | None) -> dict[str, tuple[int, ...]]:
    return {} if vq is None else {f"model.{name}": tuple(parameter.shape) for name, parameter in vq.named_parameters()}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f" (nearest to {name!r}: {close[0]!r})" if close else ""
