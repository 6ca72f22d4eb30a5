"""VQ ids of all generation images, computed once and stored beside the shards: `jp-train data encode-images`.

Each rank takes its share of the shards (RANK and WORLD_SIZE of the launcher; without them, all), so ranks need not
talk. A shard is written when its last image is encoded; a run that was killed loses the shards it had begun, and
starts at those.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TextIO

import numpy as np
import torch

from jp_train.config.schema import RunConfig
from jp_train.data.index import shard_members
from jp_train.data.shards import Shard, ShardMembers, ShardReader
from jp_train.data.vq_ids import NO_IDS, IdsManifest, ids_problem, load_manifest, open_ids, restamp_ids, store_ids
from jp_train.engine.device import rank_device
from jp_train.engine.vq_recipe import ids_recipe
from jp_train.errors import ConfigError, DataError
from jp_train.model.pretrained import load_vq
from jp_train.model.vq import IMAGES_AT_ONCE
from jp_train.terminal import ProgressLine, printable
from jp_train.tools.encode_images.work import (
    READ_AHEAD,
    DecodedImage,
    IdsState,
    ImageReader,
    ImagesDigest,
    RankShare,
    generation_shards,
    ids_state,
    rank_shares,
    shares,
)

PROGRESS_S = 2.0
OTHER_RANKS_PROGRESS_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """This process among those that share the work, how many of them share this host, and where its VQ runs."""

    rank: int
    world_size: int
    device: torch.device
    local_size: int = 1

    @classmethod
    def of_environment(cls, environ: Mapping[str, str] = os.environ) -> Place:
        """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE as deepspeed's launcher sets them; the local rank's GPU where
        there is one, else the CPU."""
        defaults = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
        try:
            rank, world_size, local, local_size = (
                int(environ.get(name, default)) for name, default in defaults.items()
            )
        except ValueError as error:
            raise ConfigError(f"{', '.join(defaults)} must be whole numbers: {error}") from None
        if not 0 <= rank < world_size:
            raise ConfigError(f"RANK {rank} is not among WORLD_SIZE {world_size} ranks")
        return cls(rank=rank, world_size=world_size, device=rank_device(local), local_size=max(1, local_size))


@dataclass(kw_only=True)
class Tally:
    """What a rank did: shards by outcome, images, and the seconds spent on encoding."""

    encoded: int = 0
    recognised: int = 0
    already_done: int = 0
    pictures: int = 0
    unusable: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def pictures_per_s(self) -> float:
        """Images encoded a second, reading and writing included."""
        return self.pictures / max(self.seconds, 1e-9)


@dataclass(kw_only=True)
class Verification:
    """What `ImageEncoder.verify` found: `samples` and `ids` compared."""

    seed: int
    samples: int = 0
    ids: int = 0
    different_ids: int = 0
    problems: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Share of the compared ids that differ."""
        return self.different_ids / max(self.ids, 1)


class ImageEncoder:
    """The work of one rank. `batch` images go through the VQ together; `threads` read and decode."""

    def __init__(
        self,
        cfg: RunConfig,
        place: Place,
        *,
        batch: int = IMAGES_AT_ONCE,
        threads: int | None = None,
        log: TextIO | None = None,
    ) -> None:
        codes = cfg.model.vq.codebook_size
        if codes > NO_IDS:
            raise ConfigError(f"model.vq.codebook_size {codes} does not fit 16-bit ids: at most {NO_IDS}")
        if batch < 1:
            raise ConfigError(f"--batch {batch} must be at least 1")
        self._cfg, self._place, self._batch = cfg, place, batch
        self._log = log or sys.stderr
        self._name = f"encode-images rank {place.rank}" if place.world_size > 1 else "encode-images"
        self._reader = ShardReader(cfg.data.io_retries, index_dir=cfg.data.index_dir)
        self._shards = generation_shards(cfg, self._reader)
        self._shares = shares(self._shards, place.world_size)
        self._vq = load_vq(cfg.model, seed=cfg.seed)
        if place.rank == 0 and not (cfg.model.init_from or cfg.model.init_parts.gen_vision_model):
            self.say("model.init=random: the VQ is fresh (random), its ids mean nothing to another")
        recipe = ids_recipe(cfg, self._vq)
        assert recipe is not None
        self.recipe = recipe
        self._threads = threads or max(2, (os.cpu_count() or 1) // place.local_size)

    @property
    def mine(self) -> list[Shard]:
        """This rank's shards, the largest first."""
        return self._shares[self._place.rank]

    def state(self, shard: Shard) -> IdsState:
        """Whether a shard has its ids."""
        return ids_state(shard, self.recipe.fingerprint, self._reader)

    def ranks(self, world_size: int | None = None) -> list[RankShare]:
        """What each rank has and has left, as the files say now."""
        return rank_shares(self._shares if world_size is None else shares(self._shards, world_size), self.state)

    def encode(self) -> Tally:
        """Encode what is missing of this rank's shards. Raises DataError for shards that cannot be read or ids that
        cannot be written."""
        tally, began = Tally(), time.monotonic()
        todo = [shard for shard in self.mine if self.state(shard) is not IdsState.done]
        tally.already_done = len(self.mine) - len(todo)
        line = ProgressLine(self._name, self._log, every_s=OTHER_RANKS_PROGRESS_S if self._place.rank else PROGRESS_S)
        finished: list[Shard] = []

        def show(bytes_of_shard: float = 0.0) -> None:
            rate = f"{tally.pictures / max(time.monotonic() - began, 1e-9):,.1f}/s"
            done, total = (sum(shard.size for shard in shards) for shards in (finished, todo))
            counts = f"shard {len(finished)}/{len(todo)}", f"{tally.pictures:,} images"
            line.show(done + bytes_of_shard, total, *counts, rate)

        self._vq.to(self._place.device)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="image") as pool:
            source = ImageReader(self._cfg, self._reader, pool)
            for shard in todo:
                members = shard_members(shard, self._reader)
                if self._recognised(shard, members, source):
                    tally.recognised += 1
                else:
                    self._encode_shard(shard, members, source, tally, show)
                    tally.encoded += 1
                finished.append(shard)
                show()
        tally.seconds = time.monotonic() - began
        return tally

    def verify(self, samples: int, seed: int) -> Verification:
        """Encode `samples` random images of this rank's finished shards again and compare every id.

        `problems` names damaged files and images that are usable only then or only now, `mismatches` samples with
        other ids. Raises DataError when nothing is stored yet.
        """
        stored = [shard for shard in self.mine if self.state(shard) is IdsState.done]
        indexes = [shard_members(shard, self._reader) for shard in stored]
        ends = np.cumsum([0, *(len(index.keys) for index in indexes)])
        result = Verification(seed=seed)
        if not self.mine:
            return result  # there are more ranks than shards
        if not ends[-1]:
            raise DataError(
                f"rank {self._place.rank} of {self._place.world_size} has no stored ids among its {len(self.mine)} "
                "shards: encode first"
            )
        chosen = np.array(sorted(random.Random(seed).sample(range(int(ends[-1])), min(samples, int(ends[-1])))))
        self._vq.to(self._place.device)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="image") as pool:
            source = ImageReader(self._cfg, self._reader, pool)
            for shard, shard_index, first, end in zip(stored, indexes, ends, ends[1:], strict=False):
                numbers = (chosen[(chosen >= first) & (chosen < end)] - first).tolist()
                if numbers:
                    self._verify_shard(shard, shard_index, numbers, source, result)
        return result

    def _verify_shard(
        self, shard: Shard, members: ShardMembers, numbers: list[int], source: ImageReader, result: Verification
    ) -> None:
        manifest = load_manifest(shard, self.recipe.fingerprint)
        problem = ids_problem(manifest, self._reader, digest=True) if manifest else "its manifest vanished"
        table = None if problem else open_ids(shard, self.recipe.fingerprint, self._reader)
        if table is None:
            result.problems.append(f"{shard.path}: {problem or 'its ids vanished'}")
            return
        for image, now in self._encoded(source, shard, members, numbers):
            before, fault = table.row(image.number), table.unusable.get(image.key, "")
            result.samples += 1
            if before is None or now is None:
                if fault != image.fault or (before is None) != (now is None):
                    result.problems.append(
                        f"{shard.path}, key {printable(image.key)}: stored {fault or 'ids'}, now {image.fault or 'ids'}"
                    )
                continue
            result.ids += len(now)
            wrong = int((before != now).sum())
            if wrong:
                result.different_ids += wrong
                result.mismatches.append(f"{shard.path}, key {printable(image.key)}: {wrong} of {len(now)} ids differ")

    def close(self) -> None:
        """Close the shards."""
        self._reader.close()

    def _recognised(self, shard: Shard, members: ShardMembers, source: ImageReader) -> bool:
        """Whether ids of another size or stamp are of exactly these images (a copied or touched file): they then
        stay."""
        manifest = load_manifest(shard, self.recipe.fingerprint)
        if (
            manifest is None
            or manifest.samples != len(members.keys)
            or ids_problem(manifest, self._reader, digest=True)
        ):
            return False
        digest = ImagesDigest()
        for image in source.images(
            shard, members, range(len(members.keys)), ahead=READ_AHEAD * self._threads, decode=False
        ):
            digest.add(image)
        if digest.hex() != manifest.pictures_sha256:
            return False
        restamp_ids(shard, manifest)
        return True

    def _encode_shard(
        self, shard: Shard, members: ShardMembers, source: ImageReader, tally: Tally, progress: Callable[[float], None]
    ) -> IdsManifest:
        samples, slots = len(members.keys), self._vq.grid**2
        ids = np.full((samples, slots), NO_IDS, np.uint16)
        digest, seen, unusable = ImagesDigest(), 0, []
        for image, row in self._encoded(source, shard, members, range(samples)):
            digest.add(image)
            seen += 1
            if row is None:
                unusable.append((image.key, image.fault))
                tally.unusable.append(f"{shard.path}, key {printable(image.key)}: {image.fault}")
            else:
                ids[image.number] = row
                tally.pictures += 1
            progress(shard.size * (image.number + 1) / samples)
        return store_ids(
            shard,
            self.recipe,
            ids,
            codebook_size=self._cfg.model.vq.codebook_size,
            without_picture=samples - seen,
            pictures_sha256=digest.hex(),
            unusable=unusable,
        )

    def _encoded(
        self, source: ImageReader, shard: Shard, members: ShardMembers, numbers: Sequence[int]
    ) -> Iterator[tuple[DecodedImage, np.ndarray | None]]:
        """(image, its ids uint16 [S] or None when it is unusable) in order; the VQ works while threads decode the
        next images."""
        group: list[DecodedImage] = []
        ready = 0
        for image in source.images(shard, members, numbers, ahead=READ_AHEAD * self._batch):
            group.append(image)
            ready += image.pixels is not None
            if ready == self._batch:
                yield from self._encode_group(group)
                group, ready = [], 0
        yield from self._encode_group(group)

    def _encode_group(self, group: Sequence[DecodedImage]) -> Iterator[tuple[DecodedImage, np.ndarray | None]]:
        pixels = [image.pixels for image in group if image.pixels is not None]
        rows: Iterator[np.ndarray] = iter(())
        if pixels:
            images = torch.from_numpy(np.stack(pixels)).to(self._place.device)
            rows = iter(self._vq.encode(images, self._batch).cpu().numpy().astype(np.uint16))
        for image in group:
            yield image, None if image.pixels is None else next(rows)

    def say(self, text: str) -> None:
        """A line for people, with the rank where there are several."""
        print(f"{self._name}: {text}", file=self._log, flush=True)
