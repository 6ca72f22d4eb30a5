"""Seconds that Python takes of a micro-batch while the GPU computes: a pass lasts as long as the longer of the two.

The constants were measured by bench/host.py on one core of a virtual machine: the models' true depth with tiny widths,
DeepSpeed's own loops over ranks on tiny slices. A launch on a GPU costs more than one of those CPU kernels, a server's
core may be twice as fast; `--hardware host_speed=2` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jp_train.tools.forecast.gathering import Replay
from jp_train.tools.forecast.memory import Setting
from jp_train.tools.forecast.shapes import Shapes
from jp_train.tools.forecast.walk import FORWARD, Visit, recomputed_layers

VISIT_US = 500.0
"""ZeRO-3's hooks around a module or a layer that is one leaf: fetch, prefetch, release."""
LAYER_US = {False: (300.0, 600.0), True: (550.0, 1500.0)}
"""A layer's own Python in the forward and the backward pass, with its activations kept, and computed again."""
GATHER_US = 1.7
"""For every parameter gathered together with others, and every rank that holds a slice of it
(AllGatherCoalescedHandle.wait)."""
REDUCE_US = 1.2
"""For every gradient and rank (reduce_scatter_coalesced)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """Seconds of one micro-batch."""

    forward: float
    backward: float


def host_time(
    shapes: Shapes, visits: Sequence[Visit], replayed: Replay, setting: Setting, *, micro_batches: int, speed: float
) -> HostTime:
    """`micro_batches` of a step share the first gather of trained parameters over all ranks, with hpZ; `speed`: of a
    core, in those of the measurement."""
    fetched = sum(visit.phase == FORWARD for visit in visits)
    forward, backward = VISIT_US * fetched, VISIT_US * (len(visits) - fetched)
    for layers, learns in (
        (shapes.layers, shapes.through_language_model),
        (shapes.vision_layers, "vision_model" in shapes.learns),
    ):
        again = recomputed_layers(layers, setting.checkpointing)
        for count, (forward_us, backward_us) in ((layers - again, LAYER_US[False]), (again, LAYER_US[True])):
            forward += forward_us * count
            backward += backward_us * count * learns
    if setting.world > 1:
        slices = float(setting.world)
        if setting.hpz > 1:
            slices = setting.hpz + (setting.world - setting.hpz) / micro_batches
        forward += GATHER_US * slices * replayed.forward.together
        backward += GATHER_US * min(slices, setting.hpz if setting.hpz > 1 else slices) * replayed.backward.together
        backward += REDUCE_US * setting.world * sum(p.trained for p in shapes.parameters)
    return HostTime(forward=1e-6 * forward / speed, backward=1e-6 * backward / speed)
