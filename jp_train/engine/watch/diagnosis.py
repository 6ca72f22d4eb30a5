"""From the heartbeats of a run that stands still to one sentence that names the rank at fault. Pure functions: no
file, no clock, no collective."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jp_train.data.processes import process_state
from jp_train.engine.watch.guard import WAITING_FOR_DATA
from jp_train.engine.watch.heartbeat import Beat
from jp_train.errors import DataError, JpTrainError, LaunchError

NAMED = 4
"""Ranks named one by one; more are counted."""

STILL_MOVING = 0.5
"""A rank idle for less than this share of what its phase may take is at work, and the others only wait for it."""


@dataclass(frozen=True)
class Diagnosis:
    """`kind`: missing, data, sequence, behind, collective. `ranks`: those at fault, empty when none stands out."""

    kind: str
    text: str
    ranks: tuple[int, ...]
    error: type[JpTrainError]


def moving(before: Mapping[int, Beat], after: Mapping[int, Beat]) -> list[int]:
    """Ranks that made progress between two readings, or so recently that they must count as working."""
    ranks = []
    for rank, beat in after.items():
        first = before.get(rank)
        fresh = beat.limit_s is None or beat.idle_s < STILL_MOVING * beat.limit_s
        if first is not None and beat.beat > first.beat and (beat.progress > first.progress or fresh):
            ranks.append(rank)
    return sorted(ranks)


def silent(before: Mapping[int, Beat], after: Mapping[int, Beat], world: int) -> list[int]:
    """Ranks whose watchdog wrote nothing between two readings: dead, stopped, or on a host that is gone. One that
    wrote why it ended is not."""
    return [
        rank
        for rank in range(world)
        if rank not in after
        or (not after[rank].ended and (rank not in before or after[rank].beat <= before[rank].beat))
    ]


def diagnose(
    before: Mapping[int, Beat],
    after: Mapping[int, Beat],
    world: int,
    host: str,
    *,
    state: Callable[[int], str] = process_state,
) -> Diagnosis:
    """What holds the run up. `before` and `after` are two readings of all ranks' heartbeats, the second after they were
    asked for their trails.

    The order is that of causes: a rank that ended or does not answer explains everything else, then data, then unequal
    module sequences, then a rank that is behind; only when all stand at the same place is it the collective itself.
    `state` describes a process of this `host`.
    """
    ended = [rank for rank in sorted(after) if after[rank].ended]
    if ended:
        text = _listed([f"rank {rank} ended with {after[rank].ended}" for rank in ended])
        return Diagnosis("missing", text, tuple(ended), LaunchError)
    lost = silent(before, after, world)
    if lost:
        text = _listed([_lost(rank, after.get(rank), host, state) for rank in lost])
        return Diagnosis("missing", text, tuple(lost), LaunchError)
    waiting = [rank for rank in sorted(after) if after[rank].phase == WAITING_FOR_DATA]
    if waiting:
        text = _listed([_waiting(after[rank]) for rank in waiting])
        return Diagnosis("data", text, tuple(waiting), DataError)
    unequal = _unequal(after)
    if unequal is not None:
        return unequal
    places = defaultdict(list)
    for rank in sorted(after):
        beat = after[rank]
        places[(beat.step, beat.micro_batch, beat.entered, beat.phase)].append(rank)
    if len(places) > 1:
        odd = places[min(places, key=lambda place: (place[0], place[2]))]  # the fewest steps and modules done
        others = [ranks for ranks in places.values() if ranks is not odd]
        text = f"rank(s) {_numbers(odd)} are behind: {after[odd[0]].place}{_frame(after[odd[0]])}, where " + _listed(
            [f"rank(s) {_numbers(ranks)} are at {after[ranks[0]].place}{_frame(after[ranks[0]])}" for ranks in others]
        )
        return Diagnosis("behind", text, tuple(odd), JpTrainError)
    beat = after[min(after)]
    who = f"all {len(after)} ranks stand" if len(after) > 1 else f"rank {beat.rank} stands"
    why = ": a collective that does not end (network, device or driver)" if len(after) > 1 else ""
    slow = "; if it is only slow, raise engine.stall_timeout_s and engine.collective_timeout_s"
    return Diagnosis("collective", f"{who} still at {beat.place}{_frame(beat)}{why}{slow}", (), JpTrainError)


def _lost(rank: int, beat: Beat | None, host: str, state: Callable[[int], str]) -> str:
    if beat is None:
        return f"rank {rank} has left no heartbeat in this attempt: it did not start, or does not see this run folder"
    process = state(beat.pid) if beat.host == host else ""
    what = {
        "gone": "is gone (killed, or crashed without a word)",
        "stopped": "is stopped (SIGSTOP, a debugger or a frozen container)",
        "waiting for a disk": "hangs in the kernel, waiting for a disk or a network file system",
        "running": "runs, but its watchdog does not (something holds Python's global lock)",
    }.get(process, "does not answer: look whether that host is up")
    return f"rank {rank} (process {beat.pid} on {beat.host}) {what}; last seen at {beat.place}"


def _waiting(beat: Beat) -> str:
    awaited = beat.awaited
    row = f"row {awaited['row']} of step {awaited['step']}" if "row" in awaited else "a row"
    document = f" (first document: {awaited['document']})" if awaited.get("document") else ""
    workers = awaited.get("workers", ())
    bad = [f"loader worker {worker['pid']} is {worker['state']}" for worker in workers if worker["state"] != "running"]
    why = "; ".join(bad) or (
        "its loader workers run: a slow or hanging file system" if workers else "it builds its rows itself"
    )
    return f"rank {beat.rank} has waited {beat.idle_s:.0f} s for {row}{document}: {why}"


def _unequal(beats: Mapping[int, Beat]) -> Diagnosis | None:
    """The first place at which two ranks in the same step entered different modules."""
    by_step: dict[int, list[Beat]] = defaultdict(list)
    for beat in beats.values():
        if beat.trail:
            by_step[beat.step].append(beat)
    for step in sorted(by_step):
        entered: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for beat in by_step[step]:
            for number, name in enumerate(beat.trail, beat.entered - len(beat.trail) + 1):
                entered[number][name].append(beat.rank)
        for number in sorted(entered):
            if len(entered[number]) > 1:
                return _first_difference(step, number, entered[number], {beat.rank: beat for beat in by_step[step]})
    return None


def _first_difference(
    step: int, number: int, names: Mapping[str, Sequence[int]], beats: Mapping[int, Beat]
) -> Diagnosis:
    counted = Counter({name: len(ranks) for name, ranks in names.items()})
    # what most did, else what rank 0 did
    common, _ = max(counted.items(), key=lambda item: (item[1], 0 in names[item[0]]))
    odd = sorted(rank for name, ranks in names.items() if name != common for rank in ranks)
    beat = beats[odd[0]]
    micro = f" micro-batch {beat.micro_batch}" if beat.micro_batch >= 0 else ""
    entered = next(name for name, ranks in names.items() if odd[0] in ranks)
    text = (
        f"rank {odd[0]} at step {step}{micro} entered {entered} where rank {min(names[common])} entered {common} "
        f"(module call {number} of the step{f'; rank(s) {_numbers(odd)} differ' if len(odd) > 1 else ''}). Under "
        "ZeRO-3 every module must run once in every micro-batch on every rank: the model's forward pass may not "
        "branch on what a batch holds"
    )
    return Diagnosis("sequence", text, tuple(odd), JpTrainError)


def _frame(beat: Beat) -> str:
    return f" [{beat.frame}]" if beat.frame else ""


def _numbers(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:NAMED]))
    return shown if len(ranks) <= NAMED else f"{shown} and {len(ranks) - NAMED} more"


def _listed(parts: Sequence[str]) -> str:
    shown = "; ".join(parts[:NAMED])
    return shown if len(parts) <= NAMED else f"{shown}; and {len(parts) - NAMED} more"
