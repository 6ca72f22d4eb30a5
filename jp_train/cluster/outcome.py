"""What the end of a start means: the exit code, the cause in words with host and rank, and whether to start again.

Which rank's code a launcher reports is a matter of milliseconds, as the other ranks fail because the first one is gone.
So the result is put together from three sources: the launch (a host that is lost), the ranks' records (which rank was
killed, which ended with which code), and the error in status.json.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jp_train import errors
from jp_train.cluster.records import STOPPED, RankRecord, culprits, how_it_ended
from jp_train.cluster.restarts import FINAL_CODES
from jp_train.cluster.running import Ending
from jp_train.errors import JpTrainError, LaunchError

NAMED = 4


@dataclass(frozen=True)
class Outcome:
    """`code`: exit code of `jp-train launch`. `again`, whether to start again: `no`, `yes`, or `if_advanced` (an
    exception comes back at the same place, a broken device does not)."""

    code: int
    cause: str = ""
    again: str = "no"
    killed_on: tuple[str, ...] = ()
    """Hosts whose ranks were killed."""
    lost: Mapping[str, str] = field(default_factory=dict)
    """Hosts that do not answer, and what happened instead."""


def judge(ending: Ending, records: Sequence[RankRecord], stopped_by: int | None, failure: str) -> Outcome:
    """`failure`: the reason in this start's status.json, `DataError: ...`; empty without one."""
    first = next(iter(culprits(records)), None)
    if stopped_by is not None:
        code = specific_code(ending.code, failure, first)
        return Outcome(code if code in (0, 2, 3, 4, 5) else 128 + stopped_by)
    verdict = ending.verdict
    if verdict is None and ending.code == 0:
        return Outcome(0)
    gone = {host: answer.summary for host, answer in ending.silent.items()}
    if not gone and verdict is not None:
        gone = dict.fromkeys(verdict.lost, verdict.cause)
    if gone:
        return Outcome(LaunchError.exit_code, _hosts_text(gone), "yes", lost=gone)
    if verdict is not None and records and all(record.code == 0 for record in records):
        return Outcome(0)  # only the launcher did not end
    if first is not None and (first.code or 0) < 0 and first.code != -signal.SIGTERM:
        return Outcome(LaunchError.exit_code, first.describe(), "yes", (first.host,))
    if first is not None and first.reason:
        return Outcome(LaunchError.exit_code, first.describe(), "yes", (first.host,))
    code = specific_code(ending.code, failure, first)
    if code in FINAL_CODES:
        return Outcome(code, failure or (first.describe() if first else ""))
    if verdict is not None:
        # the ranks' diagnosis names who stood still and where; the launch only knows who did not end
        return Outcome(LaunchError.exit_code, failure or verdict.cause, "yes")
    if code in STOPPED:
        return Outcome(code)
    if code == LaunchError.exit_code or code == 1:
        return Outcome(
            code,
            failure or (first.describe() if first else f"the launcher ended with {how_it_ended(ending.code)}"),
            "if_advanced",
        )
    if signalled(code):
        return Outcome(LaunchError.exit_code, f"a process of the run was {how_it_ended(-signalled(code))}", "yes")
    # a code of ssh or mpirun
    return Outcome(LaunchError.exit_code, f"the launcher ended with {how_it_ended(code)}", "if_advanced")


def specific_code(code: int, failure: str, first: RankRecord | None) -> int:
    """The launcher's code, or where that only says that something failed, the code of the error in status.json or of
    the first rank to fail."""
    if code == 0 or code in (2, 3, 4, 5) or code in STOPPED:
        return code
    codes = {
        cls.__name__: cls.exit_code
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, JpTrainError)
    }
    specific = codes.get(failure.partition(":")[0], 1)
    if specific == 1 and first is not None and first.code in (2, 3, 4, 5):
        return first.code
    return specific if code == 1 or specific != 1 else code


def signalled(code: int) -> int:
    """The signal that a launcher's code stands for, as -9, as 247 (what DeepSpeed's launcher makes of it), or as 137
    (mpirun, srun, shells); 0 for none.

    255 is what ssh returns when a connection breaks off, and no SIGHUP.
    """
    number = -code if code < 0 else 256 - code if 192 < code < 255 else code - 128 if 128 < code <= 192 else 0
    return number if 0 < number < 65 else 0


def explain(records: Sequence[RankRecord], world: int) -> list[str]:
    """Lines for the terminal about the ranks that failed, the likely cause first, with the end of that rank's stderr;
    what rank 0 said too is on the terminal already."""
    failed = culprits(records)
    lines = [record.describe() for record in failed[:NAMED]]
    if len(failed) > NAMED:
        lines.append(f"and {len(failed) - NAMED} more of {world} ranks failed after it")
    if failed and failed[0].rank != 0:
        shown = {line for record in records if record.rank == 0 for line in record.tail}
        lines += [f"[{failed[0].host} rank {failed[0].rank}] {line}" for line in failed[0].tail if line not in shown]
    return lines


def _hosts_text(gone: Mapping[str, str]) -> str:
    named = [f"host {host} does not answer: {reason}" for host, reason in list(gone.items())[:NAMED]]
    return "; ".join(named) + (f"; and {len(gone) - NAMED} more" if len(gone) > NAMED else "")
