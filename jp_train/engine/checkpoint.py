"""Checkpoints that are complete or absent.

    checkpoints/step_0000100/manifest.json   step, ranks, sizes and checksums of every other file, code and package versions
                             state.json      plan state, counters, patience, freeze proof
                             config.yaml     the resolved configuration
                             rng_rank_0000.pt
                             deepspeed/      weights, fp32 master weights and moments, two files per rank
    checkpoints/latest                       name of the newest one (for people and scripts: resume does not trust it)

A save writes everything into `.saving_step_0000100`, fsyncs it, writes the manifest last, renames the folder and only then moves `latest` and
deletes old ones. DeepSpeed's own `latest` is not used: it is written before the other ranks' files are known to exist (DEEPSPEED.md section 3).
`run_dir` must lie on a file system that all hosts share.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from jp_train.config.schema import CheckpointConfig
from jp_train.engine.identity import differences
from jp_train.errors import CheckpointError, JpTrainError

FORMAT = 1
DEEPSPEED_TAG = "deepspeed"
SMALL_FILE = 1 << 20
"""Files up to this many bytes get a SHA-256, larger ones a CRC-32 (which a rank computes at over 1 GB/s)."""
_NAME = re.compile(r"step_(\d{7,})$")
_RANK_FILE = re.compile(r"(?:zero_pp_rank_|rng_rank_0*)(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `path` is its folder, `manifest` and `state` the parsed files."""

    path: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]


class CheckpointStore:
    """The `checkpoints/` folder of one run. Every method is called by all ranks; rank 0 decides and writes what is not per rank."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, *, dp_rank: int, dp_world_size: int) -> None:
        self.folder = run_dir / "checkpoints"
        self._cfg = cfg
        self._rank = dp_rank
        self._world = dp_world_size

    def save(
        self,
        engine: Any,
        *,
        step: int,
        state: dict[str, Any],
        identity: dict[str, Any],
        config_text: str,
        about: dict[str, Any],
        with_frozen: bool,
    ) -> Path:
        """Write the checkpoint of `step` completed steps. Collective.

        `with_frozen` False leaves out frozen weights, which resume then reads from the stage's input weights again (`about` should hold their
        checksum). Raises CheckpointError on every rank when a file cannot be written; the previous checkpoint is untouched.
        """
        target = self.folder / f"step_{step:07d}"
        partial = self.folder / f".saving_{target.name}"
        self._on_main(lambda: self._start(partial), f"cannot start {partial}")
        torch.save(_rng_state(), partial / _rng_name(self._rank))
        engine.save_checkpoint(str(partial), tag=DEEPSPEED_TAG, save_latest=False, exclude_frozen_parameters=not with_frozen)
        if self._rank == 0:
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
            (partial / "config.yaml").write_text(config_text, encoding="utf-8")
        files = self._describe_all(partial)
        manifest = {
            "format": FORMAT,
            "step": step,
            "dp_world_size": self._world,
            "with_frozen": with_frozen,
            "time": time.time(),
            "identity": identity,
            **about,
            "files": files,
        }
        self._on_main(lambda: self._publish(partial, target, manifest), f"cannot complete {target}")
        return target

    def newest(self, *, on_damage: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The newest complete checkpoint, None for a run that has none. Collective.

        A damaged one is reported to `on_damage` (on rank 0) and the one before is tried. Raises CheckpointError when there are checkpoints but
        none is whole: a silent start from scratch would throw the run away.
        """
        names = self._shared(self._names if self._rank == 0 else None)
        problems = []
        for name in reversed(names):
            path = self.folder / name
            problem = self._shared((lambda path=path: _outer_fault(path)) if self._rank == 0 else None)
            if problem is None:
                manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
                problem = self._contents_fault(path, manifest)
                if problem is None:
                    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
                    return Checkpoint(path, int(manifest["step"]), manifest, state)
            problems.append(f"{path}: {problem}")
            if self._rank == 0:
                on_damage(problems[-1])
        if problems:
            raise CheckpointError(
                "no complete checkpoint: "
                + "; ".join(problems)
                + ". Restore one of them, or delete them all to start this run from the beginning"
            )
        return None

    def load(self, engine: Any, checkpoint: Checkpoint) -> None:
        """Put weights, optimizer and random states of a checkpoint into a fresh engine. Collective.

        Raises CheckpointError when the checkpoint was written by another number of ranks.
        """
        refuse_other_world(checkpoint, self._world)
        loaded, _ = engine.load_checkpoint(
            str(checkpoint.path),
            tag=DEEPSPEED_TAG,
            load_module_strict=bool(checkpoint.manifest["with_frozen"]),
            load_lr_scheduler_states=False,
        )
        if loaded is None:
            raise CheckpointError(f"{checkpoint.path}: DeepSpeed did not load {DEEPSPEED_TAG}/; its warning above says why")
        _restore_rng(torch.load(checkpoint.path / _rng_name(self._rank), weights_only=True))

    # -- rank 0 ---------------------------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path.name) for path in self.folder.iterdir() if path.is_dir() and (match := _NAME.match(path.name))]
        return [name for _, name in sorted(found)]

    def _start(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):  # of saves and deletions that a crash interrupted
            if leftover.is_dir():
                shutil.rmtree(leftover)
        partial.mkdir()

    def _publish(self, partial: Path, target: Path, manifest: dict[str, Any]) -> None:
        for name, described in manifest["files"].items():
            file = partial / name
            if not file.is_file() or file.stat().st_size != described["size"]:
                raise CheckpointError(f"{file} is not visible to rank 0; run_dir must lie on a file system that all hosts share")
        write_durably(partial / "manifest.json", json.dumps(manifest, indent=1))
        for folder in (partial / DEEPSPEED_TAG, partial):
            _fsync(folder)
        if target.exists():  # a damaged one of the same step, from an earlier attempt
            os.rename(target, self.folder / f".replaced_{target.name}")
        os.rename(partial, target)
        _fsync(self.folder)
        write_durably(self.folder / "latest", target.name + "\n")
        self._retire()

    def _retire(self) -> None:
        names = self._names()
        for name in names[: -self._cfg.keep_last]:
            step = int(_NAME.match(name)[1])  # type: ignore[index]
            if self._cfg.keep_every and step % self._cfg.keep_every == 0:
                continue
            doomed = self.folder / f".deleting_{name}"  # renamed first: half a deletion must not look like a checkpoint
            os.rename(self.folder / name, doomed)
            shutil.rmtree(doomed)
        for replaced in self.folder.glob(".replaced_*"):
            shutil.rmtree(replaced)

    # -- all ranks ------------------------------------------------------------------------------------------------------------------

    def _describe_all(self, partial: Path) -> dict[str, dict[str, Any]]:
        """Flush this rank's files, and collect every rank's sizes and checksums."""
        mine: dict[str, Any] = {"error": None, "files": {}}
        try:
            for file in self._own(partial):
                _fsync(file)
                mine["files"][file.relative_to(partial).as_posix()] = _describe(file)
        except OSError as error:
            mine["error"] = f"rank {self._rank}: {error}"
        reports = self._gather(mine)
        errors = [report["error"] for report in reports if report["error"]]
        if errors:
            raise CheckpointError(f"cannot complete {partial}: " + "; ".join(errors))
        return {name: described for report in reports for name, described in sorted(report["files"].items())}

    def _own(self, folder: Path) -> list[Path]:
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
        return [path for path in files if _owner(path) == self._rank]

    def _contents_fault(self, path: Path, manifest: dict[str, Any]) -> str | None:
        """Compare checksums, each rank those of its own files (with fewer ranks than files, rank 0 takes the rest)."""
        fault = None
        for name, described in manifest["files"].items():
            owner = _owner(Path(name))
            if (owner if owner < self._world else 0) != self._rank:
                continue
            try:
                found = _describe(path / name)
            except OSError as error:
                found = {"error": str(error)}
            if found != described:
                fault = f"{name} is damaged: expected {described}, found {found}"
                break
        return next((text for text in self._gather(fault) if text), None)

    def _gather(self, value: Any) -> list[Any]:
        if self._world == 1:
            return [value]
        values: list[Any] = [None] * self._world
        dist.all_gather_object(values, value)
        return values

    def _shared(self, make: Callable[[], Any] | None) -> Any:
        """Rank 0's value on every rank; `make` is None elsewhere."""
        box = [make() if make is not None else None]
        if self._world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def _on_main(self, action: Callable[[], None], what: str) -> None:
        """Run on rank 0; its failure is everybody's CheckpointError."""

        def attempt() -> str | None:
            try:
                action()
            except (OSError, JpTrainError) as error:
                return f"{what}: {error}"
            return None

        error = self._shared(attempt if self._rank == 0 else None)
        if error:
            raise CheckpointError(error)


def refuse_other_configuration(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Raise CheckpointError when resuming would train something else than the checkpoint did, naming every difference."""
    lines = differences(checkpoint.manifest["identity"], identity)
    if lines:
        raise CheckpointError(
            f"{checkpoint.path} belongs to another configuration ({len(lines)} difference(s), saved -> now): {'; '.join(lines[:12])}. "
            "Undo the changes to resume; or choose another run_dir, with model.init_from naming weights to start from"
        )


def refuse_other_world(checkpoint: Checkpoint, dp_world_size: int) -> None:
    """Raise CheckpointError when the checkpoint was written by another number of ranks."""
    saved = int(checkpoint.manifest["dp_world_size"])
    if saved != dp_world_size:
        raise CheckpointError(
            f"{checkpoint.path} was written by {saved} rank(s) and this run has {dp_world_size}. Optimizer states are split by rank and cannot be "
            f"resumed with another number yet: start with {saved} rank(s), or a new run_dir with model.init_from"
        )


def write_durably(path: Path, text: str) -> None:
    """Replace a file atomically and make it survive a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def _outer_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest and file sizes alone."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        if int(manifest["step"]) != int(_NAME.match(path.name)[1]):  # type: ignore[index]
            return f"the manifest says step {manifest['step']}"
        files = manifest["files"].items()
    except FileNotFoundError:
        return "manifest.json is missing: the save did not finish"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is not readable: {error}"
    for name, described in files:
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if size != described["size"]:
            return f"{name} has {size} bytes, expected {described['size']}"
    return None


def _describe(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= SMALL_FILE:
            return {"size": size, "sha256": hashlib.sha256(stream.read()).hexdigest()}
        crc = 0
        while block := stream.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return {"size": size, "crc32": f"{crc:08x}"}


def _owner(path: Path) -> int:
    """The rank that wrote a file: named in per-rank files, else rank 0."""
    match = _RANK_FILE.search(path.name)
    return int(match[1]) if match else 0


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rng_name(rank: int) -> str:
    return f"rng_rank_{rank:04d}.pt"


def _rng_state() -> dict[str, Any]:
    """Random states of this process as tensors and plain numbers (so that they load without unpickling code)."""
    version, words, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    assert isinstance(legacy, dict)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [legacy["state"]["key"].tolist(), int(legacy["state"]["pos"]), int(legacy["has_gauss"]), float(legacy["gauss"])],
    }


def _restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    key, pos, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), pos, has_gauss, cached))
