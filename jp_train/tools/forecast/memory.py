"""Bytes of a rank, by what they are for: states that are always there, and the peak of the three phases that follow
each other in a step.

Phases: encoding images with the VQ tokenizer; forward and backward (activations, gathered parameters, and gradients
on their way, followed visit by visit); the optimizer's update. The states follow DeepSpeed 0.19.8
(runtime/zero/stage3.py) under our DeepSpeed JSON (engine/config.py): one flat buffer of slices in the run's dtype, fp32
master weights (a copy in an fp32 run too: DeepSpeed compares a device with its name), two moments, fp32 accumulated
gradients, and the reduce bucket in fp32, allocated once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

from jp_train.tools.forecast import activations
from jp_train.tools.forecast.activations import Numerics
from jp_train.tools.forecast.gathering import GatherRules, Replay, replay
from jp_train.tools.forecast.hardware import GIB
from jp_train.tools.forecast.shapes import MicroBatch, Parameter, Shapes
from jp_train.tools.forecast.walk import BACKWARD, Visit, walk


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """How a rank runs. Elements unless stated otherwise."""

    world: int
    size: int
    """Bytes of the compute dtype."""
    checkpointing: int
    """Every k-th layer is computed again in the backward pass; 0: none."""
    hpz: int
    reduce_bucket: int
    prefetch: int
    max_live: int
    max_reuse: int
    persistent: int
    chunk: int
    cuda: bool = True
    """False: the CPU's attention, gloo's copies, and buffers that count only as far as they are written to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one rank. The first six are there all the time; the rest at the moment of the peak."""

    parameters: int
    """Slices in the run's dtype, and small parameters that are kept whole."""
    optimizer: int
    """fp32 master weights and two moments."""
    gradients: int
    """Accumulated slices, fp32."""
    reduce_bucket: int
    secondary: int
    """hpZ: a copy of all parameters spread over the ranks of a node."""
    vq: int
    """The VQ tokenizer's weights, whole on every rank."""
    activations: int
    gathered: int
    reducing: int
    """Gradients on their way into and out of the bucket, and the update's copies."""
    phase: str
    """Where the peak is: `forward`, `recompute`, `backward`, `update` or `vq encoding`."""
    phases: dict[str, int]
    """Peak of every phase, states included."""

    @property
    def states(self) -> int:
        return self.parameters + self.optimizer + self.gradients + self.reduce_bucket + self.secondary + self.vq

    @property
    def total(self) -> int:
        return self.states + self.activations + self.gathered + self.reducing

    def gib(self) -> dict[str, float]:
        """Every part in GiB."""
        numbers = {name: value / GIB for name, value in asdict(self).items() if isinstance(value, int)}
        return {**numbers, "states": self.states / GIB, "tensors": self.total / GIB}


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """Memory of a rank with what it was reckoned from."""

    memory: Memory
    visits: list[Visit]
    replay: Replay


def forecast_memory(shapes: Shapes, batch: MicroBatch, setting: Setting) -> Forecast:
    """The largest sum over a micro-batch and the update that follows the last one."""
    size, world = setting.size, setting.world
    visits = walk(
        shapes, batch, Numerics(size=size, fused=setting.cuda, chunk=setting.chunk), checkpointing=setting.checkpointing
    )
    rules = GatherRules(
        world=world,
        prefetch=setting.prefetch,
        max_live=setting.max_live,
        max_reuse=setting.max_reuse,
        persistent=setting.persistent,
    )
    gathers = _replayed(shapes.parameters, tuple((visit.path, visit.phase, visit.released) for visit in visits), rules)
    trained = sum(p.share(world) for p in shapes.parameters if p.trained)
    whole = sum(p.numel for p in shapes.parameters if p.numel <= setting.persistent) if world > 1 else 0
    bucket = (
        setting.reduce_bucket if setting.cuda else min(setting.reduce_bucket, _fullest_bucket(shapes, visits, setting))
    )
    states = {
        "parameters": size * (sum(p.share(world) for p in shapes.parameters) + whole),
        "optimizer": 12 * trained,
        "gradients": 4 * trained,
        "reduce_bucket": 4 * bucket,
        "secondary": size * sum(p.share(setting.hpz) for p in shapes.parameters) if setting.hpz > 1 else 0,
        "vq": 4 * shapes.vq_parameters,
    }
    moments = _passes(shapes, visits, gathers, setting)
    # the update: gradients in one flat copy, and Adam's denominator (twice where torch runs it tensor by tensor, on the
    # CPU)
    moments["update"] = (0, 0, (8 if setting.cuda else 12) * trained)
    if batch.encoded_images:
        moments["vq encoding"] = (activations.vq_encoding(shapes, batch), 0, 0)
    phase = max(moments, key=lambda name: sum(moments[name]))
    held, gathered, reducing = moments[phase]
    fixed = sum(states.values())
    memory = Memory(
        **states,
        activations=held,
        gathered=gathered,
        reducing=reducing,
        phase=phase,
        phases={name: fixed + sum(parts) for name, parts in moments.items()},
    )
    return Forecast(memory=memory, visits=visits, replay=gathers)


@cache
def _replayed(
    parameters: tuple[Parameter, ...], order: tuple[tuple[str, str, bool], ...], rules: GatherRules
) -> Replay:
    """What is gathered does not depend on what a micro-batch holds: candidates share it."""
    return replay(parameters, [Visit(path, phase, 0, released) for path, phase, released in order], rules)


def _passes(
    shapes: Shapes, visits: Sequence[Visit], gathers: Replay, setting: Setting
) -> dict[str, tuple[int, int, int]]:
    """Activations, gathered parameters and gradients in bytes at the largest moment of each phase."""
    largest: dict[str, tuple[int, int, int]] = {}
    moving = _gradients(shapes, visits, setting)
    for visit, level, gradient in zip(visits, gathers.levels, moving, strict=True):
        parts = (visit.activation, setting.size * level, gradient)
        if sum(parts) > sum(largest.get(visit.phase, (0, 0, 0))):
            largest[visit.phase] = parts
    return largest


def _arrivals(shapes: Shapes, visits: Sequence[Visit]) -> list[list[int]]:
    """Elements of the weight gradients that each visit makes."""
    by_path: dict[str, list[int]] = {}
    for p in shapes.parameters:
        if p.trained:
            by_path.setdefault(p.path, []).append(p.numel)
    return [by_path.get(visit.path, []) if visit.phase == BACKWARD else [] for visit in visits]


def _gradients(shapes: Shapes, visits: Sequence[Visit], setting: Setting) -> list[int]:
    """Bytes of gradients on their way at each visit: the whole gradient of one weight in the run's dtype until it is
    copied into the bucket, and what reducing a full bucket takes (the slices are sorted by rank into a copy)."""
    taken, filled = [], 0
    for numbers in _arrivals(shapes, visits):
        most = 0
        for numel in numbers:
            reducing = 0
            if filled and filled + numel > setting.reduce_bucket:
                reducing, filled = _reducing(filled, setting), 0
            most = max(most, setting.size * numel + reducing)
            if numel > setting.reduce_bucket:  # goes its own way, once the next one comes
                most = max(most, (setting.size + 4 * (setting.size < 4)) * numel)
            filled += numel
        taken.append(most)
    if filled and taken:
        taken[-1] = max(taken[-1], _reducing(filled, setting))
    return taken


def _reducing(filled: int, setting: Setting) -> int:
    """Bytes beside the bucket while `filled` elements of it are reduced: the sorted copy; gloo works on a clone of
    it."""
    return 4 * filled * (1 if setting.cuda or setting.world == 1 else 2)


def _fullest_bucket(shapes: Shapes, visits: Sequence[Visit], setting: Setting) -> int:
    """The most elements that are ever written to the bucket: untouched pages of it cost nothing on a CPU."""
    fullest = filled = 0
    for numbers in _arrivals(shapes, visits):
        for numel in numbers:
            if numel > setting.reduce_bucket:
                continue
            filled = numel if filled + numel > setting.reduce_bucket else filled + numel
            fullest = max(fullest, filled)
    return fullest
