"""The checks of a run before its start, and their table.

A new check is one function `Subject -> its part of the plan, or None` and its entry in CHECKS. It raises the
JpTrainError that training itself would end with: the comparisons of training are called, not written again. `jp-train
launch` makes the quick ones before it starts anything (`require_startable`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jp_train.cluster.hostfile import runs_locally
from jp_train.cluster.options import LaunchOptions
from jp_train.cluster.running import say
from jp_train.config import RunConfig
from jp_train.errors import CheckpointError, ConfigError, DataError, JpTrainError
from jp_train.tools.check import plan as parts
from jp_train.tools.check import sources
from jp_train.tools.check.run_folder import run_folder
from jp_train.tools.check.subject import Subject


@dataclass(frozen=True)
class Check:
    """`name`: where the result stands in the plan. `files`: looks at files of this host, which --config-only leaves
    alone. `quick`: takes a fraction of a second, without torch (which only raw DeepSpeed keys need), so that a launch
    makes it too."""

    name: str
    find: Callable[[Subject], Any]
    files: bool = True
    quick: bool = False


CHECKS = (
    Check("steps", parts.steps, files=False),
    Check("optimizer", parts.optimizer, files=False),
    Check("mixture", parts.mixture, files=False),
    Check("batch", parts.batch, files=False, quick=True),
    Check("parameters", parts.parameters, files=False, quick=True),
    Check("deepspeed", parts.deepspeed, files=False, quick=True),
    Check("named_sources", parts.named_sources, files=False, quick=True),
    Check("run_folder", run_folder, quick=True),
    Check("tokenizer_files", parts.tokenizer_files, quick=True),
    Check("tokenizer", parts.tokenizer),
    Check("weight_files", parts.weight_files, quick=True),
    Check("weights", parts.weights),
    Check("named_shards", sources.named_shards, quick=True),
    Check("sources", sources.sources),
    Check("shares", sources.shares),
    Check("held_out", sources.held_out),
    Check("vq_ids", sources.vq_ids),
)
"""In the order in which they are made and their problems are listed: what is cheap first."""


def check(
    config: RunConfig, hostfile: Path | None = None, *, world: int = 1, config_only: bool = False
) -> dict[str, Any]:
    """The resolved plan of the stage as one JSON-able object, for the ranks of `hostfile`, or `world` of them.

    `problems` lists, in words, what would stop the run, `warnings` what its owner may not want; everything else is
    information. `exit_status`: 0 without a problem, 3 where all are of the data, 4 of weights or checkpoints, else 2.
    `config_only` leaves the files that the configuration names alone.
    """
    options = None if hostfile is None else LaunchOptions(hostfile=hostfile)
    subject = Subject(config=config, options=options, world=world)
    found = look(subject, {entry.name: entry.find for entry in CHECKS if not (config_only and entry.files)})
    return {
        "problems": [str(problem) for problem in subject.problems],
        "exit_status": _exit_status(subject.problems),
        "warnings": [*([subject.finished] if subject.finished else []), *subject.warnings],
        "run_dir": config.run_dir,
        "stage": config.stage.name,
        **found,
    }


def _exit_status(problems: Sequence[JpTrainError]) -> int:
    codes = {problem.exit_code for problem in problems}
    alike = codes in ({DataError.exit_code}, {CheckpointError.exit_code})
    return codes.pop() if alike else ConfigError.exit_code if codes else 0


def require_startable(config: RunConfig, options: LaunchOptions) -> str:
    """What a launch asks before it contacts a host: the quick checks. Returns the sentence about a finished run, empty
    for one with something left to do; prints warnings.

    Raises the JpTrainError that training would end with; of several the first, with all in its message. What is absent
    here is a problem only where the ranks run on this host; elsewhere it is named, and preflight looks for it there.
    """
    subject = Subject(config=config, options=options, here=runs_locally(options.selection()))
    look(subject, {entry.name: entry.find for entry in CHECKS if entry.quick})
    for warning in [*([unseen] if (unseen := subject.unseen_text()) else []), *subject.warnings]:
        say(f"warning: {warning}")
    if len(subject.problems) > 1:
        first = subject.problems[0]
        listed = "".join(f"\nPROBLEM: {problem}" for problem in subject.problems)
        raise type(first)(f"{len(subject.problems)} problems, nothing was started:{listed}")
    if subject.problems:
        raise subject.problems[0]
    return subject.finished


def look(subject: Subject, checks: Mapping[str, Callable[[Subject], Any]]) -> dict[str, Any]:
    """{name: result} of the checks that have one; the problems go to the subject."""
    found = {}
    for name, find in checks.items():
        try:
            found[name] = find(subject)
        except JpTrainError as problem:
            subject.problem(problem)
    return {name: result for name, result in found.items() if result is not None}
