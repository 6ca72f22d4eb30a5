"""Finds the newest complete checkpoint of a run and reads it back, for any number of ranks (layout:
checkpoint_files.py)."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jp_train.engine.checkpoint.files import (
    DAMAGED_FILE,
    FORMAT,
    VQ_FILE,
    Checkpoint,
    RankGroup,
    checkpoint_names,
    joined_errors,
    size_and_checksum,
    step_of,
)
from jp_train.engine.checkpoint.rng import PREFIX, derive_rng, restore_rng
from jp_train.errors import CheckpointError
from jp_train.model.partition_files import PartitionReader, ShardReader, file_rank, rank_file


class CheckpointReader:
    """The `checkpoints/` folder of one run, to read. Every method is called by all ranks."""

    def __init__(self, folder: Path, group: RankGroup) -> None:
        self.folder = folder
        self.damaged: list[str] = []
        """Names of the checkpoints that `newest` passed over, newest first, and of older ones that an earlier
        attempt passed over."""
        self._group = group

    def newest(self, *, on_damage: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The newest complete checkpoint, None for a run that has none. Collective.

        A damaged one is reported to `on_damage` (on rank 0) and the one before is tried. Raises CheckpointError when
        there are checkpoints but none is whole (a silent start from scratch would throw the run away), when the newest
        has the format of another version, and when a rank cannot open what rank 0 sees (passing over a good checkpoint
        would train its steps again).
        """
        on_main = self._group.on_main
        problems: list[str] = []
        self.damaged = []
        for name in reversed(on_main(lambda: checkpoint_names(self.folder), f"cannot list {self.folder}", self.folder)):
            path = self.folder / name
            manifest, problem = on_main(partial(_read_manifest, path), f"cannot read {path}", self.folder)
            if problem is None:
                _refuse_other_format(path, manifest)
                problem = self._contents_fault(path, manifest)
            if problem is None:
                self.damaged += on_main(partial(_marked_before, path), f"cannot list {self.folder}", self.folder)
                text = on_main(
                    partial((path / "state.json").read_text, encoding="utf-8"), f"cannot read {path}", self.folder
                )
                return Checkpoint(path, int(manifest["step"]), manifest, json.loads(text))
            problems.append(f"{path}: {problem}")
            self.damaged.append(name)
            if self._group.rank == 0:
                with contextlib.suppress(OSError):  # a full or read-only disk: then it is found again
                    (path / DAMAGED_FILE).write_text(problem + "\n", encoding="utf-8")
                on_damage(problems[-1])
        if problems:
            raise CheckpointError(
                "no complete checkpoint: "
                + "; ".join(problems)
                + ". Restore one of them, or delete them all to start this run from the beginning"
            )
        return None

    def load(
        self, checkpoint: Checkpoint, fill: Callable[[PartitionReader], None], vq: torch.nn.Module | None = None
    ) -> None:
        """Read a checkpoint of any number of ranks: `fill` takes weights and optimizer state, `vq` its weights; random
        states are set. Collective.

        `fill` may not run collectives. Raises CheckpointError on every rank when one rank cannot read its part.
        """
        rank, failure = self._group.rank, None
        try:
            reader = PartitionReader(checkpoint.path)
            fill(reader)
            reader.close()
            if vq is not None and (checkpoint.path / VQ_FILE).exists():
                _load_vq(vq, checkpoint.path / VQ_FILE)
            if rank < reader.world:
                shard = ShardReader(checkpoint.path / rank_file(rank))
                restore_rng({name: shard.read(name) for name in shard.keys() if name.startswith(PREFIX)})  # noqa: SIM118 - not a dict
                shard.close()
            else:
                derive_rng(checkpoint.manifest["identity"].get("seed"), checkpoint.step, rank)
        except CheckpointError as error:
            failure = f"rank {rank}: {error}"
        failures = [text for text in self._group.gather(failure) if text]
        if failures:
            raise CheckpointError(joined_errors(failures))

    def _contents_fault(self, path: Path, manifest: dict[str, Any]) -> str | None:
        """Compare checksums; the files are dealt to the ranks, however many wrote them.

        Raises CheckpointError on every rank when one cannot open a file: rank 0 has seen them all, so the fault is that
        host's, not the checkpoint's.
        """
        fault = unseen = None
        for name, expected in manifest["files"].items():
            if (file_rank(name) or 0) % self._group.world != self._group.rank:
                continue
            try:
                actual = size_and_checksum(path / name, crc="crc32" in expected)
            except (FileNotFoundError, PermissionError) as error:
                unseen = f"rank {self._group.rank} on {platform.node()}: {error}"
                break
            except OSError as error:
                actual = {"error": str(error)}
            if actual != expected:
                fault = f"{name} is damaged: expected {expected}, found {actual}"
                break
        results = self._group.gather((fault, unseen))
        if blind := [text for _, text in results if text]:
            raise CheckpointError(
                f"{path} is there, but not every rank can read it: {joined_errors(blind)}. run_dir must lie on a file "
                "system that all hosts share, readable for this user on each of them"
            )
        return next((text for text, _ in results if text), None)


def _marked_before(whole: Path) -> list[str]:
    """Names of the checkpoints older than this one, which is whole, that an earlier attempt found damaged, newest
    first."""
    with contextlib.suppress(OSError):
        (whole / DAMAGED_FILE).unlink(missing_ok=True)  # restored since
    older = [name for name in checkpoint_names(whole.parent, step_of(whole.name)) if name != whole.name]
    return [name for name in reversed(older) if (whole.parent / name / DAMAGED_FILE).exists()]


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's manifest, and what is wrong with the checkpoint by the manifest and the file sizes alone."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return manifest, None  # refused by the caller
        if int(manifest["step"]) != step_of(path.name):
            return manifest, f"the manifest says step {manifest['step']}"
        files = manifest["files"].items()
    except FileNotFoundError:
        return {}, "manifest.json is missing: the save did not finish"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"manifest.json is not readable: {error}"
    for name, expected in files:
        try:
            size = (path / name).stat().st_size
        except OSError:
            return manifest, f"{name} is missing"
        if size != expected["size"]:
            return manifest, f"{name} has {size} bytes, expected {expected['size']}"
    return manifest, None


def _refuse_other_format(path: Path, manifest: dict[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this jp_train reads format {FORMAT}. Resume it with the version "
            f"that wrote it (git commit {manifest.get('git_commit')}), or end it there and start a new run_dir with "
            "model.init_from its export"
        )


def _load_vq(vq: torch.nn.Module, path: Path) -> None:
    reader = ShardReader(path)
    with torch.no_grad():
        for name, parameter in vq.named_parameters():
            if reader.shape(f"model.{name}") != tuple(parameter.shape):
                raise CheckpointError(
                    f"{path}: model.{name} is {list(reader.shape(f'model.{name}'))}, model.vq says "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(reader.read(f"model.{name}").view(parameter.shape))
    reader.close()
