"""Files of weights, read lazily, under canonical names, with strict checks of names and shapes.

Canonical names are those of transformers' JanusForConditionalGeneration, VQ included (``layouts.py``). No pickle is
executed: safetensors, or ``torch.load(weights_only=True)`` for .pt and .bin files (LlamaGen's VQ-16 and the released
Janus-Pro-1B come as such).
"""

from __future__ import annotations

import difflib
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from jp_train.errors import CheckpointError
from jp_train.files import stand_in_at
from jp_train.model import layouts
from jp_train.model.partition_files import PartitionReader
from jp_train.model.weight_places import INDEX_FILE, SHOWN, files_of, some, whole_model


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
        """A released checkpoint under canonical names; names that the released layout does not know are kept, to be
        reported."""
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

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same; reads both."""
        return self.shape(name) == self.shape(other) and torch.equal(self.get(name), self.get(other))


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

    ``path``: a folder in transformers' format, a released deepseek-ai folder, a training checkpoint
    (``checkpoints/step_...``: fp32 master weights, put together from the ranks' files tensor by tensor), or a run
    folder (its ``export/`` is taken).

    Raises:
        CheckpointError: if there is nothing, or nothing known, at ``path``.
    """
    path = whole_model(path)
    if (path / INDEX_FILE).is_file():
        return _open_checkpoint(path)
    source = _open(path)
    keys = source.keys()
    if layouts.is_canonical(keys):
        return source
    if layouts.is_released(keys):
        return source.canonical()
    raise CheckpointError(
        f"{path} holds no Janus model: expected tensors like 'model.language_model.layers.0…' (transformers) or "
        f"'language_model.model.layers.0…' (released), found {some(keys)}. A part of a model goes into "
        "model.init_parts instead"
    )


def open_part(path: str | Path, part: str) -> WeightSource:
    """One pretrained part under canonical names, of ``language_model``, ``vision_model`` or ``gen_vision_model``.

    The file or folder may hold just that part (Hugging Face Llama; Hugging Face SigLIP or transformers'
    JanusVisionModel; LlamaGen's VQ-16 .pt or transformers' JanusVQVAE) or a whole Janus model in either layout.

    Raises:
        CheckpointError: if there is nothing readable at ``path``.
    """
    prefixes = {"language_model": ("model.language_model.", "lm_head."), "vision_model": ("model.vision_model.",)}
    renames = {
        "language_model": layouts.language_part,
        "vision_model": layouts.vision_part,
        "gen_vision_model": layouts.vq_part,
    }
    selected = prefixes.get(part, ("model.vqmodel.",))
    source = _open(Path(path))
    keys = source.keys()
    if layouts.is_canonical(keys):
        return source.select(selected)
    if layouts.is_released(keys):
        return source.canonical().select(selected)
    return source.renamed(renames[part])


def _open_checkpoint(path: Path) -> WeightSource:
    """A complete training checkpoint. What it does not hold (frozen weights of a stage that started from
    ``init_from``) comes from there."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        absent = [name for name in manifest["files"] if not (path / name).is_file()]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no complete checkpoint: manifest.json is missing or unreadable ({error})"
        ) from error
    if absent:
        raise CheckpointError(f"{path} is no complete checkpoint: {some(absent)} missing")
    reader = PartitionReader(path)
    held = [p for p in reader.parameters.values() if p.trained or reader.with_frozen]
    entries = {p.name: _Entry(p.shape, partial(reader.whole, p.name)) for p in held}
    if reader.with_frozen:
        entries.update(_open_file(path / "vq.safetensors"))
    else:
        try:
            base = open_weights(manifest["frozen_from"])
        except CheckpointError as error:
            raise CheckpointError(f"{path} leaves its frozen weights where the stage started from: {error}") from error
        entries.update({name: entry for name, entry in base._entries.items() if name not in entries})
    order = [*reader.parameters, *(name for name in entries if name not in reader.parameters)]
    missing = [name for name in order if name not in entries]
    if missing:
        raise CheckpointError(f"{manifest['frozen_from']} lacks frozen weights of {path}: {some(missing)}")
    return WeightSource(path, {name: entries[name] for name in order})


def _open(path: Path) -> WeightSource:
    """All tensors of a file or folder under their own names."""
    entries: dict[str, _Entry] = {}
    for file in files_of(path):
        entries.update(_open_file(file))
    return WeightSource(path, entries)


UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
)
"""What torch.load raises for a file that is damaged or something else altogether."""


def _open_file(path: Path) -> dict[str, _Entry]:
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
            return {
                key: _Entry(tuple(file.get_slice(key).get_shape()), partial(file.get_tensor, key))
                for key in file.keys()  # noqa: SIM118 - safe_open is no dict
            }
        except (SafetensorError, OSError) as error:
            what = stand_in_at(path) or f"is not a readable safetensors file: {error}; copy or download it again"
            raise CheckpointError(f"{path} {what}") from error
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file of the format before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        what = stand_in_at(path) or f"cannot be read as plain tensors (weights_only): {error}"
        raise CheckpointError(f"{path} {what}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected a dictionary of tensors")
    return {k: _Entry(tuple(t.shape), t.detach) for k, t in state.items() if isinstance(t, torch.Tensor)}


def check_keys(expected: Mapping[str, tuple[int, ...]], source: WeightSource) -> None:
    """Names and shapes must match exactly.

    Raises:
        CheckpointError: listing missing (each with the nearest name), unexpected and wrongly shaped tensors, shortened.
    """
    names = source.keys()
    missing = [name for name in expected if name not in set(names)]
    unexpected = [name for name in names if name not in expected]
    shapes = [name for name in expected if name in set(names) and source.shape(name) != tuple(expected[name])]
    problems = []
    if missing:
        near = _nearest(missing[0], unexpected)
        problems.append(f"{len(missing)} missing: {some(missing)}{near}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {some(unexpected)}")
    if shapes:
        first = [f"{n} is {list(source.shape(n))}, the configuration says {list(expected[n])}" for n in shapes[:SHOWN]]
        problems.append(f"{len(shapes)} of another shape: {'; '.join(first)}")
    if problems:
        raise CheckpointError(
            f"{source.path} does not fit the model of this configuration. {'. '.join(problems)}. Check model.* in the "
            "config"
        )


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    return f" (nearest to {name!r}: {close[0]!r})" if close else ""
