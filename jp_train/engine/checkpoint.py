"""Checkpoints that are complete or absent, for any number of ranks.

    checkpoints/step_0000100/manifest.json     step, ranks, sizes and checksums of every other file, code and package versions
                             state.json        plan state, counters, patience, freeze proof
                             config.yaml       the resolved configuration
                             partitions.json   how parameters are cut (model/partition_files.py)
                             rank_00000.safetensors   this rank's slices of weights and moments, and its random states
                             vq.safetensors    the VQ tokenizer, where frozen weights are kept too
    checkpoints/latest, best                   names of the newest and of the best one (for people and scripts: resume does not trust them)

A save writes everything into `.saving_step_0000100`, with every file summed and fsynced; when all ranks are done, rank 0 writes the manifest last,
renames the folder and only then moves `latest` and deletes old ones. `run_dir` must lie on a file system that all hosts share.

`begin` returns as soon as what is to be written is copied to host memory (or is on the CPU and may not change: `background` False); a thread writes.
`poll`, at later step boundaries, completes the save once all ranks have written; `settle` waits for it. At most one save is under way.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from jp_train.config.schema import CheckpointConfig
from jp_train.engine.disk import explained, require_space
from jp_train.engine.host_copy import HostCopy
from jp_train.engine.rng import PREFIX, derive_rng, restore_rng, rng_tensors
from jp_train.errors import CheckpointError, JpTrainError
from jp_train.model.partition_files import (
    BLOCK,
    INDEX_FILE,
    NamedTensors,
    Parameter,
    PartitionReader,
    ShardReader,
    file_rank,
    index_text,
    rank_file,
    shard_bytes,
    write_shard,
)

FORMAT = 2
VQ_FILE = "vq.safetensors"
SMALL_FILE = 1 << 20
"""Text files up to this many bytes get a SHA-256, everything else a CRC-32 (which a rank computes at over 1 GB/s)."""
WAIT_S = 2.0
"""How long a rank waits for its own thread before it tells the others, so that no collective waits longer for a slow disk."""
SHOWN = 2
"""Ranks whose errors a message spells out: a full disk fails them all."""
_NAME = re.compile(r"step_(\d{7,})$")

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `path` is its folder, `manifest` and `state` the parsed files."""

    path: Path
    step: int
    manifest: dict[str, Any]
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a checkpoint is made of. `tensors` are this rank's (views are fine: `begin` copies); the rest is the same on every rank or rank 0's.

    `about` goes into the manifest; `val/total` in it makes the checkpoint a candidate for the best one.
    """

    tensors: NamedTensors
    parameters: list[Parameter]
    optimizer_step: int
    with_frozen: bool
    vq: NamedTensors = ()
    state: dict[str, Any]
    identity: dict[str, Any]
    config_text: str
    about: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A completed save: bytes of the whole checkpoint, and seconds from `begin` to its last rename."""

    path: Path
    step: int
    bytes: int
    total_s: float


@dataclass
class _Pending:
    """A save under way on this rank; `report` is set by the thread when it is done. `note` is for the caller's `problems`."""

    step: int
    partial: Path
    target: Path
    manifest: dict[str, Any]
    began: float
    note: str = ""
    thread: threading.Thread | None = None
    report: dict[str, Any] | None = None


class CheckpointStore:
    """The `checkpoints/` folder of one run. Every method is called by all ranks; rank 0 decides and writes what is not per rank."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, *, dp_rank: int, dp_world_size: int) -> None:
        self.folder = run_dir / "checkpoints"
        self.problems: list[str] = []
        """What went wrong without harm to a checkpoint; rank 0 has all of it. The caller reports and removes them."""
        self._cfg = cfg
        self._rank = dp_rank
        self._world = dp_world_size
        self._host = HostCopy()
        self._pending: _Pending | None = None
        self._retiring: threading.Thread | None = None

    # -- saving ---------------------------------------------------------------------------------------------------------------------

    @property
    def pending_step(self) -> int | None:
        """The step of the save that is under way."""
        return self._pending.step if self._pending else None

    def begin(self, step: int, content: Content) -> None:
        """Start the checkpoint of `step` completed steps; the save before must be settled. Collective.

        Raises CheckpointError on every rank when there is no room or the folder cannot be written; the previous checkpoint is untouched.
        """
        assert self._pending is None, "one save at a time"
        began = time.perf_counter()
        target = self.folder / f"step_{step:07d}"
        partial = self.folder / f".saving_{target.name}"
        tensors = [*content.tensors, *rng_tensors()]
        texts = self._texts(content) if self._rank == 0 else {}
        vq = content.vq if self._rank == 0 else ()
        own = shard_bytes(tensors) + (shard_bytes(vq) if vq else 0) + sum(map(len, texts.values()))
        needed = sum(self._gather(own))
        self._on_main(lambda: self._start(partial, needed), f"cannot start {partial}")
        manifest = {
            "format": FORMAT,
            "step": step,
            "dp_world_size": self._world,
            "with_frozen": content.with_frozen,
            "time": time.time(),
            "identity": content.identity,
            **content.about,
        }
        pending = _Pending(step, partial, target, manifest, began)
        background = self._cfg.background
        if background:
            try:
                tensors, vq = self._host.take(tensors), [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in vq]
            except (MemoryError, RuntimeError) as error:  # on one rank perhaps; the others need not know
                pending.note = f"rank {self._rank}: no host memory for a copy ({error}): training waited while step {step} was written"
                background = False
        self._pending = pending
        if background:
            pending.thread = threading.Thread(target=self._write, args=(pending, tensors, vq, texts), name=f"save-{step}", daemon=True)
            pending.thread.start()
        else:
            self._write(pending, tensors, vq, texts)

    def poll(self, *, wait_s: float = 0.0) -> Saved | None:
        """Complete the save under way if every rank has written its part; None when there is none or it still runs. Collective.

        Raises CheckpointError on every rank when a part could not be written; what was written is removed then.
        """
        pending = self._pending
        if pending is None:
            return None
        if pending.thread is not None:
            pending.thread.join(wait_s)
        reports = self._gather(pending.report)
        if any(report is None for report in reports):
            return None
        self._pending = None
        self.problems += [report["note"] for report in reports if report["note"]]
        try:
            errors = [report["error"] for report in reports if report["error"]]
            if errors:
                raise CheckpointError(f"cannot complete {pending.target}: {_first_of(errors)}")
            files = {name: described for report in reports for name, described in report["files"].items()}
            self._on_main(lambda: self._publish(pending, files), f"cannot complete {pending.target}")
        except CheckpointError:
            if self._rank == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise
        size = sum(described["size"] for described in files.values())
        return Saved(pending.target, pending.step, size, time.perf_counter() - pending.began)

    def settle(self) -> Saved | None:
        """`poll` until the save under way is complete, and old checkpoints are deleted. Collective; raises as `poll` does."""
        saved = None
        while self._pending is not None:
            saved = self.poll(wait_s=WAIT_S)
        if self._retiring is not None:
            self._retiring.join()
        return saved

    def _texts(self, content: Content) -> dict[str, bytes]:
        index = index_text(content.parameters, world=self._world, with_frozen=content.with_frozen, optimizer_step=content.optimizer_step)
        texts = {"state.json": json.dumps(content.state), "config.yaml": content.config_text, INDEX_FILE: index}
        return {name: text.encode() for name, text in texts.items()}

    def _write(self, pending: _Pending, tensors: NamedTensors, vq: NamedTensors, texts: dict[str, bytes]) -> None:
        """This rank's files; in a thread, so that nothing may be raised and no collective may run."""
        partial, files = pending.partial, {}
        error = None
        try:
            files[rank_file(self._rank)] = write_shard(partial / rank_file(self._rank), tensors)
            if vq:
                files[VQ_FILE] = write_shard(partial / VQ_FILE, vq)
            for name, text in texts.items():
                (partial / name).write_bytes(text)
                _fsync(partial / name)
                files[name] = _describe(partial / name)
        except OSError as problem:
            error = f"rank {self._rank}: {explained(problem, self.folder)}"
        except Exception as problem:  # a thread's traceback would be lost, and the other ranks would wait for it
            error = f"rank {self._rank}: {type(problem).__name__}: {problem}"
        pending.report = {"error": error, "files": files, "note": pending.note}

    # -- resuming -------------------------------------------------------------------------------------------------------------------

    def newest(self, *, on_damage: Callable[[str], None] = lambda text: None) -> Checkpoint | None:
        """The newest complete checkpoint, None for a run that has none. Collective.

        A damaged one is reported to `on_damage` (on rank 0) and the one before is tried. Raises CheckpointError when there are checkpoints but
        none is whole (a silent start from scratch would throw the run away), when the newest has the format of another version, and when a rank
        cannot open what rank 0 sees (passing over a good checkpoint would train its steps again).
        """
        names = self._on_main(self._names, f"cannot list {self.folder}")
        problems = []
        for name in reversed(names):
            path = self.folder / name
            manifest, problem = self._on_main(lambda path=path: _read_manifest(path), f"cannot read {path}")
            if problem is None:
                _refuse_other_format(path, manifest)
                problem = self._contents_fault(path, manifest)
            if problem is None:
                state = self._on_main(
                    lambda path=path: json.loads((path / "state.json").read_text(encoding="utf-8")), f"cannot read {path}"
                )
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

    def load(self, checkpoint: Checkpoint, fill: Callable[[PartitionReader], None], vq: torch.nn.Module | None = None) -> None:
        """Read a checkpoint of any number of ranks: `fill` takes weights and optimizer state, `vq` its weights; random states are set. Collective.

        `fill` may not run collectives. Raises CheckpointError on every rank when one rank cannot read its part.
        """
        failure = None
        try:
            reader = PartitionReader(checkpoint.path)
            fill(reader)
            reader.close()
            if vq is not None and (checkpoint.path / VQ_FILE).exists():
                _load_vq(vq, checkpoint.path / VQ_FILE)
            if self._rank < reader.world:
                own = ShardReader(checkpoint.path / rank_file(self._rank))
                restore_rng({name: own.read(name) for name in own.keys() if name.startswith(PREFIX)})  # noqa: SIM118 - not a dict
                own.close()
            else:
                derive_rng(checkpoint.manifest["identity"].get("seed"), checkpoint.step, self._rank)
        except CheckpointError as error:
            failure = f"rank {self._rank}: {error}"
        failures = [text for text in self._gather(failure) if text]
        if failures:
            raise CheckpointError(_first_of(failures))

    # -- rank 0 ---------------------------------------------------------------------------------------------------------------------

    def _names(self, until: int | None = None) -> list[str]:
        """Checkpoints, oldest first. `until` leaves out those of later steps: they were passed over as damaged when this attempt resumed."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path.name) for path in self.folder.iterdir() if path.is_dir() and (match := _NAME.match(path.name))]
        return [name for step, name in sorted(found) if until is None or step <= until]

    def _start(self, partial: Path, needed: int) -> None:
        if self._retiring is not None:
            self._retiring.join()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):  # of saves and deletions that a crash interrupted
            if leftover.is_dir():
                self._delete(leftover)
        require_space(self.folder, needed, f"checkpoint {partial.name.removeprefix('.saving_')}")
        partial.mkdir()

    def _publish(self, pending: _Pending, files: dict[str, Any]) -> None:
        partial, target = pending.partial, pending.target
        for name, described in files.items():
            file = partial / name
            if not file.is_file() or file.stat().st_size != described["size"]:
                raise CheckpointError(f"{file} is not visible to rank 0; run_dir must lie on a file system that all hosts share")
        write_durably(partial / "manifest.json", json.dumps({**pending.manifest, "files": files}, indent=1))
        _fsync(partial)
        if target.exists():  # a damaged one of the same step, from an earlier attempt
            os.rename(target, self.folder / f".replaced_{target.name}")
        os.rename(partial, target)
        _fsync(self.folder)
        write_durably(self.folder / "latest", target.name + "\n")
        best = self._best(pending.step) if self._cfg.keep_best else None
        if best is not None:
            write_durably(self.folder / "best", best + "\n")
        self._retiring = threading.Thread(target=self._retire, args=(pending.step, best), daemon=True)  # a large folder takes its time
        self._retiring.start()

    def _best(self, newest: int) -> str | None:
        """The complete checkpoint with the lowest held-out loss, the oldest of equals."""
        found = []
        for name in self._names(newest):
            try:
                loss = json.loads((self.folder / name / "manifest.json").read_text(encoding="utf-8")).get("val/total")
            except (OSError, ValueError):
                continue
            if isinstance(loss, (int, float)) and loss == loss:
                found.append((loss, name))
        return min(found)[1] if found else None

    def _retire(self, newest: int, best: str | None) -> None:
        try:
            for name in self._names(newest)[: -self._cfg.keep_last]:  # a later one is damaged, and may not push out a whole one
                step = int(_NAME.match(name)[1])  # type: ignore[index]
                if name == best or (self._cfg.keep_every and step % self._cfg.keep_every == 0):
                    continue
                doomed = self.folder / f".deleting_{name}"  # renamed first: half a deletion must not look like a checkpoint
                os.rename(self.folder / name, doomed)
                self._delete(doomed)
            for replaced in self.folder.glob(".replaced_*"):
                self._delete(replaced)
        except OSError as error:
            self.problems.append(f"old checkpoints in {self.folder} cannot be deleted: {error}")

    def _delete(self, folder: Path) -> None:
        """Nothing to fail a save for: on NFS a folder stays while one of its files is open somewhere. The next save tries again."""
        try:
            shutil.rmtree(folder)
        except OSError as error:
            self.problems.append(f"{folder} cannot be deleted and takes space: {error}")

    # -- all ranks ------------------------------------------------------------------------------------------------------------------

    def _contents_fault(self, path: Path, manifest: dict[str, Any]) -> str | None:
        """Compare checksums; the files are dealt to the ranks, however many wrote them.

        Raises CheckpointError on every rank when one cannot open a file: rank 0 has seen them all, so the fault is that host's, not the checkpoint's.
        """
        fault = unseen = None
        for name, described in manifest["files"].items():
            if (file_rank(name) or 0) % self._world != self._rank:
                continue
            try:
                found = _describe(path / name, crc="crc32" in described)
            except (FileNotFoundError, PermissionError) as error:
                unseen = f"rank {self._rank} on {platform.node()}: {error}"
                break
            except OSError as error:
                found = {"error": str(error)}
            if found != described:
                fault = f"{name} is damaged: expected {described}, found {found}"
                break
        told = self._gather((fault, unseen))
        if blind := [text for _, text in told if text]:
            raise CheckpointError(
                f"{path} is there, but not every rank can read it: {_first_of(blind)}. run_dir must lie on a file system that all hosts share, "
                "readable for this user on each of them"
            )
        return next((text for text, _ in told if text), None)

    def _gather(self, value: Any) -> list[Any]:
        if self._world == 1:
            return [value]
        values: list[Any] = [None] * self._world
        dist.all_gather_object(values, value)
        return values

    def _on_main(self, action: Callable[[], T], what: str) -> T:
        """Run on rank 0; its value is everybody's, and so is its failure, as a CheckpointError."""
        box: list[Any] = [None, None]
        if self._rank == 0:
            try:
                box[0] = action()
            except OSError as error:
                box[1] = f"{what}: {explained(error, self.folder)}"
            except JpTrainError as error:
                box[1] = f"{what}: {error}"
        if self._world > 1:
            dist.broadcast_object_list(box, src=0)
        if box[1]:
            raise CheckpointError(box[1])
        return box[0]


def write_durably(path: Path, text: str) -> None:
    """Replace a file atomically and make it survive a power cut."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def _first_of(errors: list[str]) -> str:
    return "; ".join(errors[:SHOWN]) + (f"; and {len(errors) - SHOWN} more ranks" if len(errors) > SHOWN else "")


def _read_manifest(path: Path) -> tuple[dict[str, Any], str | None]:
    """A checkpoint's manifest, and what is wrong with the checkpoint by the manifest and the file sizes alone."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return manifest, None  # refused by the caller
        if int(manifest["step"]) != int(_NAME.match(path.name)[1]):  # type: ignore[index]
            return manifest, f"the manifest says step {manifest['step']}"
        files = manifest["files"].items()
    except FileNotFoundError:
        return {}, "manifest.json is missing: the save did not finish"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"manifest.json is not readable: {error}"
    for name, described in files:
        try:
            size = (path / name).stat().st_size
        except OSError:
            return manifest, f"{name} is missing"
        if size != described["size"]:
            return manifest, f"{name} has {size} bytes, expected {described['size']}"
    return manifest, None


def _refuse_other_format(path: Path, manifest: dict[str, Any]) -> None:
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']}, this jp_train reads format {FORMAT}. Resume it with the version that wrote it "
            f"(git commit {manifest.get('git_commit')}), or end it there and start a new run_dir with model.init_from its export"
        )


def _describe(file: Path, *, crc: bool = False) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= SMALL_FILE and not crc:
            return {"size": size, "sha256": hashlib.sha256(stream.read()).hexdigest()}
        total = 0
        while block := stream.read(BLOCK):
            total = zlib.crc32(block, total)
    return {"size": size, "crc32": f"{total:08x}"}


def _load_vq(vq: torch.nn.Module, path: Path) -> None:
    reader = ShardReader(path)
    with torch.no_grad():
        for name, parameter in vq.named_parameters():
            if reader.shape(f"model.{name}") != tuple(parameter.shape):
                raise CheckpointError(
                    f"{path}: model.{name} is {list(reader.shape(f'model.{name}'))}, model.vq says {list(parameter.shape)}"
                )
            parameter.copy_(reader.read(f"model.{name}").view(parameter.shape))
    reader.close()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
