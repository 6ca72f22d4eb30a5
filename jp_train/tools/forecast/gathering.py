"""What DeepSpeed ZeRO-3 gathers, prefetches and releases during one forward and backward pass, replayed without
DeepSpeed.

The rules are those of `PartitionedParameterCoordinator` (deepspeed 0.19.8,
runtime/zero/partitioned_param_coordinator.py) in the steady state, with its recorded trace: a visit fetches what its
module needs, then prefetches the next parameters of the trace (`prefetch` elements a visit, while fewer than `max_live`
are available), and releases a parameter unless it is needed again within `max_reuse` elements of the trace. So a small
model stays whole from forward to backward, and of a large one about `max_live` elements are there at any time.

Several parameters gathered together arrive in one buffer and are copied out; the buffer lives until the last of them is
used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from jp_train.tools.forecast.shapes import Parameter
from jp_train.tools.forecast.walk import FORWARD, Visit


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherRules:
    """DeepSpeed's keys, in elements. `world`: ranks that hold a slice each."""

    world: int
    prefetch: int
    max_live: int
    max_reuse: int
    persistent: int
    """Parameters of at most so many elements stay whole on every rank."""


@dataclass(kw_only=True, slots=True)
class Traffic:
    """Elements gathered and collectives made in one phase of the pass. `fresh`: of trained parameters that the pass
    had not gathered before, which hpZ has no copy of yet in the first micro-batch of a step. `together`: parameters
    that came with others in one collective, which DeepSpeed puts together from the ranks' slices one by one."""

    elements: int = 0
    fresh: int = 0
    calls: int = 0
    together: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """`levels`: elements of gathered parameters and buffers during each visit, besides the persistent ones."""

    levels: list[int]
    forward: Traffic
    backward: Traffic


@dataclass(slots=True)
class _Gather:
    """One collective under way or done: its buffer, where several parameters share it, lives while one of them has
    not been asked for."""

    buffer: int
    waiting: set[str]
    done: bool = False


@dataclass
class _Coordinator:
    rules: GatherRules
    trace: list[tuple[Parameter, int]]
    distance: list[int]
    uses: dict[str, list[int]]
    step: int = 0
    available: int = 0
    """DeepSpeed's own count, which limits the prefetch."""
    status: dict[str, str] = field(default_factory=dict)
    fetched_for: dict[str, int] = field(default_factory=dict)
    inflight: dict[str, _Gather] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    held: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        self.queue = deque(self.trace)

    def gather(self, parameters: list[Parameter]) -> None:
        missing = [p for p in parameters if self.status.get(p.name) is None]
        if not missing:
            return
        size = sum(p.numel for p in missing)
        self.available += size
        self.traffic.elements += size
        self.traffic.fresh += sum(p.numel for p in missing if p.trained and p.name not in self.seen)
        self.traffic.calls += 1
        self.traffic.together += len(missing) if len(missing) > 1 else 0
        self.seen.update(p.name for p in missing)
        gather = _Gather(buffer=size, waiting={p.name for p in missing})
        self.held += size
        for p in missing:
            self.status[p.name] = "inflight"
            self.inflight[p.name] = gather

    def wait(self, parameters: Sequence[Parameter], sizes: dict[str, int]) -> None:
        for p in parameters:
            gather = self.inflight.pop(p.name, None)
            if gather is None:
                continue
            shared = (gather.buffer and len(gather.waiting) > 1) or gather.done
            if not gather.done:
                gather.done = True
                for name in gather.waiting:
                    self.status[name] = "available"
                if shared:
                    self.held += sum(sizes[name] for name in gather.waiting)  # copied out of the buffer
            gather.waiting.discard(p.name)
            if shared and not gather.waiting:
                self.held -= gather.buffer

    def release(self, p: Parameter) -> None:
        if self.status.get(p.name) == "available":
            del self.status[p.name]
            self.held -= p.numel
            self.available -= p.numel

    def needed_again(self, p: Parameter) -> bool:
        """Whether the parameter occurs within `max_reuse` elements of the trace behind the current step, or was
        skipped by the prefetch for that."""
        if self.fetched_for.get(p.name, -1) > self.step:
            return True
        at = next((use for use in self.uses[p.name] if use >= self.step), None)
        return at is not None and self.distance[at] - self.distance[self.step] < self.rules.max_reuse


def replay(parameters: Sequence[Parameter], visits: Sequence[Visit], rules: GatherRules) -> Replay:
    """One pass over `visits`. On one rank nothing is gathered: a parameter is its only slice."""
    if rules.world == 1:
        return Replay(levels=[0] * len(visits), forward=Traffic(), backward=Traffic())
    by_path: dict[str, list[Parameter]] = {}
    for p in parameters:
        by_path.setdefault(p.path, []).append(p)
    sizes = {p.name: p.numel for p in parameters}
    trace = [(p, step) for step, visit in enumerate(visits) for p in by_path.get(visit.path, ())]
    distance = [0]
    uses: dict[str, list[int]] = {}
    for step, visit in enumerate(visits):
        here = by_path.get(visit.path, ())
        distance.append(distance[-1] + sum(p.numel for p in here))
        for p in here:
            uses.setdefault(p.name, []).append(step)
    coordinator = _Coordinator(rules, trace, distance, uses)
    for p in parameters:
        if p.numel <= rules.persistent:
            coordinator.status[p.name] = "persistent"
    forward, backward = Traffic(), Traffic()
    levels = []
    for visit in visits:
        mine = by_path.get(visit.path, [])
        coordinator.traffic = forward if visit.phase == FORWARD else backward
        coordinator.gather(mine)
        coordinator.wait(mine, sizes)
        _prefetch(coordinator, mine)
        coordinator.step += 1
        levels.append(coordinator.held)
        if visit.released:
            for p in mine:
                if not coordinator.needed_again(p):
                    coordinator.release(p)
    return Replay(levels=levels, forward=forward, backward=backward)


def _prefetch(c: _Coordinator, mine: list[Parameter]) -> None:
    """Take this visit's own parameters off the queue, then the next ones up to the limit."""
    expected = {p.name for p in mine if c.fetched_for.get(p.name, -1) < c.step}
    while expected and c.queue:
        p, at = c.queue.popleft()
        c.fetched_for[p.name] = at
        expected.discard(p.name)
    limit, chosen, size = min(c.rules.max_live - c.available, c.rules.prefetch), {}, 0
    while c.queue and size < limit:
        p, at = c.queue.popleft()
        c.fetched_for[p.name] = max(at, c.fetched_for.get(p.name, -1))
        if c.status.get(p.name) is None and p.name not in chosen:
            chosen[p.name] = p
            size += p.numel
    c.gather(list(chosen.values()))
