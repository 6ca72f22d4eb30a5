"""Writes checkpoints that are complete or absent, for any number of ranks (layout: checkpoint_files.py).

A save writes everything into `.saving_step_0000100`, with every file summed and fsynced; when all ranks are done, rank
0 writes the manifest last, renames the folder and only then moves `latest` and deletes old ones. `run_dir` must lie on
a file system that all hosts share.

`begin` returns as soon as what is to be written is copied to host memory (or is on the CPU and may not change:
`background` False); a thread writes. `poll`, at later step boundaries, completes the save once all ranks have written;
`settle` waits for it. At most one save is under way.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.config.schema import CheckpointConfig
from jp_train.engine.checkpoint.disk import SPARE, free_bytes, require_space, with_advice
from jp_train.engine.checkpoint.files import (
    FORMAT,
    VQ_FILE,
    RankGroup,
    T,
    checkpoint_names,
    joined_errors,
    size_and_checksum,
    step_name,
    step_of,
)
from jp_train.engine.checkpoint.host_copy import HostCopy
from jp_train.engine.checkpoint.reading import CheckpointReader
from jp_train.engine.checkpoint.rng import rng_tensors
from jp_train.engine.checkpoint.rollback import Abandoned, abandon_after
from jp_train.errors import CheckpointError
from jp_train.files import fsync, write_atomically
from jp_train.model.partition_files import NamedTensors, Parameter, index_text, rank_file, shard_bytes, write_shard
from jp_train.model.weight_places import INDEX_FILE

WAIT_S = 2.0
"""How long a rank waits for its thread before it reports to the others, so that no collective waits longer for a slow
disk."""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a checkpoint is made of. `tensors` are this rank's (views are fine: `begin` copies); the rest is the same on
    every rank or rank 0's.

    `about` goes into the manifest; `val/total` in it makes the checkpoint a candidate for the best one. `logs` are
    files of the run whose lines the checkpoint's step counts on: they are on the disk before it is complete, so that no
    power cut leaves a checkpoint with gaps before it.
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
    logs: Sequence[Path] = ()


@dataclass(frozen=True)
class Saved:
    """A completed save: bytes of the whole checkpoint, and seconds from `begin` to its last rename."""

    path: Path
    step: int
    bytes: int
    total_s: float


@dataclass
class _Pending:
    """A save under way on this rank; `report` is set by the thread when it is done. `note` is for the caller's
    `problems`."""

    step: int
    partial: Path
    target: Path
    manifest: dict[str, Any]
    began: float
    note: str = ""
    thread: threading.Thread | None = None
    report: dict[str, Any] | None = None


class CheckpointStore(CheckpointReader):
    """The `checkpoints/` folder of one run, to read and to write. Every method is called by all ranks; rank 0
    decides and writes what is not per rank."""

    def __init__(self, run_dir: Path, cfg: CheckpointConfig, *, dp_rank: int, dp_world_size: int) -> None:
        super().__init__(run_dir / "checkpoints", RankGroup(dp_rank, dp_world_size))
        self.problems: list[str] = []
        """What went wrong without harm to a checkpoint; rank 0 has all of it. The caller reports and removes them."""
        self._cfg = cfg
        self._host = HostCopy()
        self._pending: _Pending | None = None
        self._retiring: threading.Thread | None = None

    def set_aside(self, step: int) -> Abandoned | None:
        """Move all checkpoints after `step` out of the way (rollback.py), None where there are none. Collective.
        Raises CheckpointError on every rank when they cannot be moved."""
        self.damaged = [name for name in self.damaged if step_of(name) <= step]

        def move() -> Abandoned | None:
            aside = abandon_after(self.folder.parent, step)
            self._name_best(step)
            return aside

        return self._on_main(move, f"cannot move what came after step {step}")

    # -- saving ------------------------------------------------------------------------------------

    @property
    def pending_step(self) -> int | None:
        """The step of the save that is under way."""
        return self._pending.step if self._pending else None

    def begin(self, step: int, content: Content) -> None:
        """Start the checkpoint of `step` completed steps; the save before must be settled. Collective.

        Raises CheckpointError on every rank when there is no room or the folder cannot be written; the previous
        checkpoint is untouched.
        """
        assert self._pending is None, "one save at a time"
        began = time.perf_counter()
        target = self.folder / step_name(step)
        partial = self.folder / f".saving_{target.name}"
        tensors: NamedTensors = [*content.tensors, *rng_tensors()]
        texts = self._texts(content) if self._group.rank == 0 else {}
        vq, logs = (content.vq, content.logs) if self._group.rank == 0 else ((), ())
        local_bytes = shard_bytes(tensors) + (shard_bytes(vq) if vq else 0) + sum(map(len, texts.values()))
        needed = sum(self._group.gather(local_bytes))
        self._on_main(lambda: self._start(target, partial, needed), f"cannot start {partial}")
        manifest = {
            "format": FORMAT,
            "step": step,
            "dp_world_size": self._group.world,
            "with_frozen": content.with_frozen,
            "time": time.time(),
            "identity": content.identity,
            **content.about,
        }
        pending = _Pending(step, partial, target, manifest, began)
        background = self._cfg.background
        if background:
            try:
                tensors, vq = (
                    self._host.take(tensors),
                    [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in vq],
                )
            except (MemoryError, RuntimeError) as error:  # on one rank perhaps; the others need not know
                pending.note = (
                    f"rank {self._group.rank}: no host memory for a copy ({error}): training waited while step {step} "
                    "was written"
                )
                background = False
        self._pending = pending
        if background:
            pending.thread = threading.Thread(
                target=self._write, args=(pending, tensors, vq, texts, logs), name=f"save-{step}", daemon=True
            )
            pending.thread.start()
        else:
            self._write(pending, tensors, vq, texts, logs)

    def poll(self, *, wait_s: float = 0.0) -> Saved | None:
        """Complete the save under way if every rank has written its part; None when there is none or it still runs.
        Collective.

        Raises CheckpointError on every rank when a part could not be written; what was written is removed then.
        """
        pending = self._pending
        if pending is None:
            return None
        if pending.thread is not None:
            pending.thread.join(wait_s)
        reports = self._group.gather(pending.report)
        if any(report is None for report in reports):
            return None
        self._pending = None
        self.problems += [report["note"] for report in reports if report["note"]]
        try:
            errors = [report["error"] for report in reports if report["error"]]
            if errors:
                raise CheckpointError(f"cannot complete {pending.target}: {joined_errors(errors)}")
            files = {name: entry for report in reports for name, entry in report["files"].items()}
            self._on_main(lambda: self._publish(pending, files), f"cannot complete {pending.target}")
            self._forget(pending.target.name)
        except CheckpointError:
            if self._group.rank == 0:
                shutil.rmtree(pending.partial, ignore_errors=True)
            raise
        size = sum(entry["size"] for entry in files.values())
        return Saved(pending.target, pending.step, size, time.perf_counter() - pending.began)

    def settle(self) -> Saved | None:
        """`poll` until the save under way is complete, and old checkpoints are deleted. Collective; raises as `poll`
        does."""
        saved = None
        while self._pending is not None:
            saved = self.poll(wait_s=WAIT_S)
        if self._retiring is not None:
            self._retiring.join()
        return saved

    def _texts(self, content: Content) -> dict[str, bytes]:
        index = index_text(
            content.parameters,
            world=self._group.world,
            with_frozen=content.with_frozen,
            optimizer_step=content.optimizer_step,
        )
        texts = {"state.json": json.dumps(content.state), "config.yaml": content.config_text, INDEX_FILE: index}
        return {name: text.encode() for name, text in texts.items()}

    def _write(
        self, pending: _Pending, tensors: NamedTensors, vq: NamedTensors, texts: dict[str, bytes], logs: Sequence[Path]
    ) -> None:
        """This rank's files; in a thread, so that nothing may be raised and no collective may run."""
        partial, files = pending.partial, {}
        error = None
        try:
            files[rank_file(self._group.rank)] = write_shard(partial / rank_file(self._group.rank), tensors)
            if vq:
                files[VQ_FILE] = write_shard(partial / VQ_FILE, vq)
            for name, text in texts.items():
                (partial / name).write_bytes(text)
                fsync(partial / name)
                files[name] = size_and_checksum(partial / name)
            for log in filter(Path.exists, logs):
                fsync(log)
                fsync(log.parent)
        except OSError as problem:
            error = f"rank {self._group.rank}: {with_advice(problem, self.folder, self.damaged)}"
        except Exception as problem:  # a thread's traceback would be lost, and the other ranks would wait for it
            error = f"rank {self._group.rank}: {type(problem).__name__}: {problem}"
        pending.report = {"error": error, "files": files, "note": pending.note}

    def _on_main(self, action: Callable[[], T], what: str) -> T:
        return self._group.on_main(action, what, self.folder, self.damaged)

    # -- rank 0 ------------------------------------------------------------------------------------

    def _start(self, target: Path, partial: Path, needed: int) -> None:
        if self._retiring is not None:
            self._retiring.join()
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*"):  # of saves and deletions that a crash interrupted
            if leftover.is_dir():
                self._delete(leftover)
        for name in sorted(self.damaged, key=lambda name: (name != target.name, step_of(name))):
            if free_bytes(self.folder) >= needed + SPARE:
                break
            self._remove(name)  # this run went on from an older one: its steps are trained again
        require_space(self.folder, needed, f"checkpoint {target.name}", self.damaged)
        partial.mkdir()

    def _publish(self, pending: _Pending, files: dict[str, Any]) -> None:
        partial, target = pending.partial, pending.target
        for name, entry in files.items():
            file = partial / name
            if not file.is_file() or file.stat().st_size != entry["size"]:
                raise CheckpointError(
                    f"{file} is not visible to rank 0; run_dir must lie on a file system that all hosts share"
                )
        write_atomically(partial / "manifest.json", json.dumps({**pending.manifest, "files": files}, indent=1))
        fsync(partial)
        if target.exists():  # a damaged one of the same step, from an earlier attempt
            os.rename(target, self.folder / f".replaced_{target.name}")
        os.rename(partial, target)
        fsync(self.folder)
        self._forget(target.name)
        write_atomically(self.folder / "latest", target.name + "\n")
        best = self._name_best(pending.step)
        # a large folder takes its time
        self._retiring = threading.Thread(target=self._retire, args=(pending.step, best), daemon=True)
        self._retiring.start()

    def _name_best(self, newest: int) -> str | None:
        """Write into `best` what `_best` says; no `best` stays without one: what it named may be gone."""
        best = self._best(newest) if self._cfg.keep_best else None
        if best is None:
            (self.folder / "best").unlink(missing_ok=True)
        else:
            write_atomically(self.folder / "best", best + "\n")
        return best

    def _best(self, newest: int) -> str | None:
        """The complete checkpoint with the lowest held-out loss, the oldest of equals."""
        losses = []
        for name in self._sound(newest):
            try:
                loss = json.loads((self.folder / name / "manifest.json").read_text(encoding="utf-8")).get("val/total")
            except (OSError, ValueError):
                continue
            if isinstance(loss, (int, float)) and loss == loss:
                losses.append((loss, name))
        return min(losses)[1] if losses else None

    def _sound(self, until: int) -> list[str]:
        """Complete checkpoints of steps until `until`, oldest first: a later one is damaged, and may not push out a
        whole one."""
        return [name for name in checkpoint_names(self.folder, until) if name not in self.damaged]

    def _retire(self, newest: int, best: str | None) -> None:
        sound = self._sound(newest)
        try:
            for name in sound[: -self._cfg.keep_last]:
                if name == best or (self._cfg.keep_every and step_of(name) % self._cfg.keep_every == 0):
                    continue
                self._remove(name)
            for name in list(self.damaged):  # only while it may be the last trace of its steps is it worth its space
                if sum(step_of(other) >= step_of(name) for other in sound) >= self._cfg.keep_last:
                    self._remove(name)
            for replaced in self.folder.glob(".replaced_*"):
                self._delete(replaced)
        except OSError as error:
            self.problems.append(f"old checkpoints in {self.folder} cannot be deleted: {error}")

    def _remove(self, name: str) -> None:
        """Delete a checkpoint; renamed first: half a deletion must not look like one."""
        renamed = self.folder / f".deleting_{name}"
        self._forget(name)
        with contextlib.suppress(FileNotFoundError):  # somebody was faster
            os.rename(self.folder / name, renamed)
            self._delete(renamed)

    def _forget(self, name: str) -> None:
        """A damaged checkpoint that is gone or replaced is one no more."""
        self.damaged = [other for other in self.damaged if other != name]

    def _delete(self, folder: Path) -> None:
        """Nothing to fail a save for: on NFS a folder stays while one of its files is open somewhere. The next save
        tries again."""
        try:
            shutil.rmtree(folder)
        except OSError as error:
            self.problems.append(f"{folder} cannot be deleted and takes space: {error}")
