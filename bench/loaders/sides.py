"""The two sides that everything is compared with: our StepLoader, and the bare loop. A side turns samples into rows,
endlessly."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
import tokenizers

from jp_train.config.batch import batch_plan
from jp_train.config.choices import BatchUnit, SourceKind, Template
from jp_train.config.schema import MixtureConfig, RunConfig, SourceConfig, TokenizerConfig
from jp_train.data.image import load_generation_image
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan
from jp_train.data.shards import ShardReader, expand_shards, scan_members
from jp_train.data.tokenizer import Tokenizer, load_tokenizer
from jp_train.data.vq_ids import IdsRecipe, load_manifest
from jp_train.data.vq_use import use_stored_ids
from loaders.samples import NPY_HEADER, SLOTS

ROWS_PER_STEP = 8
SEQ_LEN = 4096


class Side(Protocol):
    """`advance(samples)` handles at least that many samples and returns how many samples and rows (0 without
    packing) they were."""

    name: str

    def advance(self, samples: int) -> tuple[int, int]: ...

    def processes(self) -> list[psutil.Process]:
        """Its worker processes, whose CPU time counts too."""
        ...

    def close(self) -> None: ...


def config(folder: Path, shards: str, tokenizer: TokenizerConfig, workers: int = 0, **data: Any) -> RunConfig:
    """A run over generation samples alone, as in stage 2: 384-pixel images, rows of SEQ_LEN tokens, whole
    captions."""
    cfg = RunConfig(tokenizer=tokenizer)
    cfg.data.root, cfg.data.workers, cfg.data.seq_len = str(folder), workers, SEQ_LEN
    for name, value in data.items():
        setattr(cfg.data, name, value)
    cfg.data.sources = {"bench": SourceConfig(kind=SourceKind.generation, shards=shards)}
    cfg.stage.mixture = MixtureConfig(understanding=0, text=0, generation=1)
    cfg.stage.template = Template.stage2
    cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, ROWS_PER_STEP
    return cfg


class Ours:
    """StepLoader: global plan, byte-range reads in random order, exact packing, collated PackedBatches. `recipe`:
    use the ids beside the shards."""

    def __init__(self, cfg: RunConfig, name: str = "jp_train", recipe: IdsRecipe | None = None) -> None:
        self.name = name
        tokenizer = load_tokenizer(cfg.tokenizer)
        indexes = index_sources(cfg, tokenizer)
        if recipe is not None:
            indexes = use_stored_ids(cfg.data, indexes, recipe)
        batch = batch_plan(cfg, 1)
        plan = build_plan(cfg, indexes, batch, tokenizer)
        self._loader = StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch)

    def advance(self, samples: int) -> tuple[int, int]:
        done = rows = 0
        while done < samples:
            step = next(self._loader)
            done += sum(step.used_per_source.values())
            rows += sum(batch.rows for batch in step.micro_batches)
        return done, rows

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(worker.pid) for worker in getattr(self._loader._iterator, "_workers", ())]

    def close(self) -> None:
        self._loader.close()


class Bare:
    """The limit: in tar order, one sample at a time, read its members at known offsets, parse the JSON, tokenise the
    caption, decode and transform the image (or view the stored ids). No checks, no labels, no packing, no batch;
    results are dropped.

    It uses the loader's own image function and the loader's own tokenizer call, on descriptors that stay open.
    """

    name = "bare loop"

    def __init__(
        self,
        cfg: RunConfig,
        load: Callable[[bytes, int], np.ndarray] = load_generation_image,
        recipe: IdsRecipe | None = None,
    ) -> None:
        self._encode = plain_encode(load_tokenizer(cfg.tokenizer))
        self._size, self._load, self._recipe = cfg.model.vision.image_size, load, recipe
        self._descriptors: list[int] = []
        self._samples = itertools.cycle(list(self._locate(cfg)))

    def _locate(self, cfg: RunConfig) -> Iterator[tuple[int, int, int, int, int, int, bool]]:
        """Of each sample: descriptor, offset and size of the image or ids, then of the JSON, and whether it is a
        image."""
        reader = ShardReader()
        for path in expand_shards(cfg.data.sources["bench"].shards, cfg.data.root):
            shard = reader.stat(path)
            members = scan_members(shard, reader)
            descriptor = self._opened(path)
            stored = None
            if self._recipe is not None:
                manifest = load_manifest(shard, self._recipe.fingerprint)
                assert manifest is not None
                stored = self._opened(manifest.ids_path)
            for number in range(len(members.keys)):
                first = int(members.member_start[number])
                where = {members.extensions[members.extension[first + k]]: first + k for k in (0, 1)}
                image, text = where.get("jpg", where.get("vq.npy")), where["json"]
                read = (descriptor, int(members.offset[image]), int(members.size[image]))
                if stored is not None:
                    read = (stored, NPY_HEADER + number * 2 * SLOTS, 2 * SLOTS)
                elif "vq.npy" in where:
                    read = (descriptor, read[1] + NPY_HEADER, 2 * SLOTS)
                yield (
                    *read,
                    descriptor,
                    int(members.offset[text]),
                    int(members.size[text]),
                    stored is None and "jpg" in where,
                )
        reader.close()

    def _opened(self, path: str | Path) -> int:
        self._descriptors.append(os.open(path, os.O_RDONLY))
        return self._descriptors[-1]

    def advance(self, samples: int) -> tuple[int, int]:
        pread, loads, encode, load, size = os.pread, json.loads, self._encode, self._load, self._size
        for descriptor, offset, length, text, text_offset, text_length, is_image in itertools.islice(
            self._samples, samples
        ):
            data = pread(descriptor, length, offset)
            caption = loads(pread(text, text_length, text_offset))["caption"]
            encode(caption)
            if is_image:
                load(data, size)
            else:
                np.frombuffer(data, np.uint16)
        return samples, 0

    def processes(self) -> list[psutil.Process]:
        return []

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def plain_encode(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """The fastest call that turns one text into ids: the Hugging Face backend's, without offsets."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._content().decode())
    return lambda text: backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
