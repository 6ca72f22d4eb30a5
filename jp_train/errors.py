"""The errors a user can meet. Each carries one message: what was found, what was expected, what to change.

`exit_code` of each class is the exit status of `jp-train` (docs/operations.md), so that scripts and schedulers can tell
a wrong configuration from a broken disk.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar


class JpTrainError(Exception):
    """Base of every error that jp_train raises on purpose; the CLI prints it without a traceback."""

    exit_code = 1
    absent = ""
    """The absolute path at which there is nothing, where that is the whole problem: another host may have it."""


class ConfigError(JpTrainError):
    """The configuration or the command line is wrong: unknown key, impossible combination, indivisible world size."""

    exit_code = 2


class DataError(JpTrainError):
    """A shard, an index or a sample is broken beyond what the budget of bad samples allows."""

    exit_code = 3


class CheckpointError(JpTrainError):
    """A checkpoint is incomplete, damaged, or belongs to another configuration."""

    exit_code = 4


class LaunchError(JpTrainError):
    """The hostfile, a host, or the launcher failed before or while the ranks ran."""

    exit_code = 5


class SkipSample(JpTrainError):  # noqa: N818 - it is a decision about one sample, not an error of the run
    """One sample cannot be used. Its part of the row stays empty, and the ledger names it.

    `fault` is the class of the fault, a short stable name (`jp-train data verify` counts by it). Never raised for I/O
    errors: those are retried and then stop the run.
    """

    def __init__(self, reason: str, fault: str = "bad_sample") -> None:
        super().__init__(reason)
        self.fault = fault


_Error = TypeVar("_Error", bound=JpTrainError)


def absent(kind: type[_Error], path: str | Path, remedy: str) -> _Error:
    """The error for a path of the configuration or the command line at which there is nothing: names the absolute path
    that was looked at, and what a relative one starts from."""
    looked_at = str(Path(path).absolute())
    follows = "" if Path(path).is_absolute() else " (relative paths follow the working directory)"
    error = kind(f"{looked_at} does not exist{follows}: {remedy}")
    error.absent = looked_at
    return error


@contextmanager
def named(key: str) -> Iterator[None]:
    """Errors of the block begin with the configuration key that they are about."""
    try:
        yield
    except JpTrainError as error:
        error.args = (f"{key}: {error}",)
        raise


def did_you_mean(name: str, valid: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`; did you mean 'check'?` with the nearest of the `valid` names, to end an error message with; empty when none is
    as alike as `cutoff` (0 to 1)."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_of(name: str, valid: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`did_you_mean`, then all of the `valid` names."""
    names = ", ".join(valid := list(valid))
    hint = did_you_mean(name, valid, cutoff=cutoff)
    return f"{hint} It is one of {names}" if hint else f"; it is one of {names}"
