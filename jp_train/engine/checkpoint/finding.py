"""Finds the newest complete checkpoint of a run, or a chosen one (layout: files.py). Without torch, so that `jp-train
check` and the launcher can look as training does."""

from __future__ import annotations

import contextlib
import json
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from jp_train.engine.checkpoint.files import (
    DAMAGED_FILE,
    FORMAT,
    Checkpoint,
    RankGroup,
    checkpoint_names,
    joined_errors,
    size_and_checksum,
    step_name,
    step_of,
)
from jp_train.engine.checkpoint.identity import differences
from jp_train.errors import CheckpointError


class CheckpointFinder:
    """The `checkpoints/` folder of one run. Every method is called by all ranks.

    `contents`: compare the checksums of all files, and mark what is damaged. Without, names and sizes must do, and
    nothing is written.
    """

    def __init__(self, folder: Path, group: RankGroup, *, contents: bool = True) -> None:
        self.folder, self._contents = folder, contents
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
            whole, problem = self._opened(path)
            if whole is not None:
                if self._contents:
                    self.damaged += on_main(partial(_marked_before, path), f"cannot list {self.folder}", self.folder)
                return whole
            problems.append(f"{path}: {problem}")
            self.damaged.append(name)
            if self._group.rank == 0:
                if self._contents:
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

    def at_step(self, step: int) -> Checkpoint:
        """The checkpoint of `step`. Collective. Raises CheckpointError when it is not there or not whole, naming the
        steps of those that are there, and as `newest` does."""
        whole, problem = self._opened(self.folder / step_name(step))
        if whole is None:
            steps = self._group.on_main(
                lambda: [step_of(path.name) for path, _ in self._whole_by_size()],
                f"cannot list {self.folder}",
                self.folder,
            )
            raise CheckpointError(
                f"checkpoint.resume_from {step}: {self.folder / step_name(step)}: {problem}. Complete checkpoints: "
                + (f"steps {', '.join(map(str, sorted(steps)))}" if steps else "none")
            )
        return whole

    def went_back_to(self, step: int, identity: dict[str, Any]) -> bool:
        """Whether the newest checkpoint was made by a run with this `checkpoint.resume_from` and this
        `training_identity`: going back to `step` was done before, and the run goes on. Collective."""

        def newest_is_from_there() -> bool:
            manifest = next((manifest for _, manifest in self._whole_by_size()), {})
            return manifest.get("resume_from") == step and not differences(manifest["identity"], identity)

        return self._group.on_main(newest_is_from_there, f"cannot list {self.folder}", self.folder)

    def has_later(self, step: int) -> bool:
        """Whether there are checkpoints of later steps, damaged ones too. Collective."""
        return self._group.on_main(
            lambda: checkpoint_names(self.folder) != checkpoint_names(self.folder, step),
            f"cannot list {self.folder}",
            self.folder,
        )

    def _whole_by_size(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Folder and manifest of the checkpoints whose files have the right size, newest first."""
        for name in reversed(checkpoint_names(self.folder)):
            manifest, problem = _read_manifest(self.folder / name)
            if problem is None:
                yield self.folder / name, manifest

    def _opened(self, path: Path) -> tuple[Checkpoint | None, str]:
        """A checkpoint that is as it was written, or None and what is wrong with it. Collective."""
        on_main = self._group.on_main
        manifest, problem = on_main(partial(_read_manifest, path), f"cannot read {path}", self.folder)
        if problem is None:
            _refuse_other_format(path, manifest)
            problem = self._contents_fault(path, manifest) if self._contents else None
        if problem is not None:
            return None, problem
        text = on_main(partial((path / "state.json").read_text, encoding="utf-8"), f"cannot read {path}", self.folder)
        return Checkpoint(path, int(manifest["step"]), manifest, json.loads(text)), ""

    def _contents_fault(self, path: Path, manifest: dict[str, Any]) -> str | None:
        """Compare checksums; the files are dealt to the ranks, however many wrote them.

        Raises CheckpointError on every rank when one cannot open a file: rank 0 has seen them all, so the fault is that
        host's, not the checkpoint's.
        """
        from jp_train.model.partition_files import file_rank

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
        return {}, "manifest.json is missing: the save did not finish" if path.is_dir() else "no such checkpoint"
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
