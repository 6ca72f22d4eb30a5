"""Bytes that travel in one optimizer step, between nodes and inside them, with and without hpZ.

ZeRO-3 gathers parameters in the run's dtype, forward and backward anew (as far as they are not there still,
`gathering.py`), and scatters fp32 gradients, all of it in EVERY micro-batch: accumulation saves nothing. With hpZ a
node holds a second copy of what its ranks have gathered in a step; the first forward pass of the step fetches trained
parameters from all nodes, everything else from the node. Frozen parameters' copies stay valid.

Of S bytes gathered over n nodes each node receives S (n - 1) / n from the others, and each of its W ranks S (W - 1) / W
in all; a reduce-scatter sends as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from jp_train.tools.forecast.gathering import Replay
from jp_train.tools.forecast.memory import Setting
from jp_train.tools.forecast.shapes import Shapes


@dataclass(frozen=True, kw_only=True, slots=True)
class Leg:
    """One kind of collective of one micro-batch: bytes of whole tensors that go over all ranks or stay inside nodes,
    and the number of calls."""

    over_all: float
    in_node: float
    calls: float

    def scaled(self, factor: float) -> Leg:
        return Leg(over_all=self.over_all * factor, in_node=self.in_node * factor, calls=self.calls * factor)

    def __add__(self, other: Leg) -> Leg:
        return Leg(
            over_all=self.over_all + other.over_all,
            in_node=self.in_node + other.in_node,
            calls=self.calls + other.calls,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Communication:
    """A step's collectives, averaged over its micro-batches. `between`: bytes that one node receives from the others
    in a STEP; `inside`: bytes that one GPU receives in a step over the links of its node."""

    micro_batches: int
    forward: Leg
    backward: Leg
    reduce: Leg
    between: float
    inside: float


def communication(
    shapes: Shapes, replayed: Replay, setting: Setting, *, nodes: int, micro_batches: int
) -> Communication:
    """Nothing travels on one rank."""
    size, world = setting.size, setting.world
    node_copy = setting.hpz > 1
    legs = []
    for traffic in (replayed.forward, replayed.backward):
        everything = size * traffic.elements
        over_all = size * traffic.fresh / micro_batches if node_copy else everything
        legs.append(Leg(over_all=over_all, in_node=everything - over_all, calls=traffic.calls))
    trained = shapes.trained_elements if world > 1 else 0
    reduce = Leg(
        over_all=4.0 * trained, in_node=0.0, calls=max(1.0, trained / setting.reduce_bucket) if trained else 0.0
    )
    total = (legs[0] + legs[1] + reduce).scaled(micro_batches)
    return Communication(
        micro_batches=micro_batches,
        forward=legs[0],
        backward=legs[1],
        reduce=reduce,
        between=total.over_all * (nodes - 1) / nodes,
        inside=total.over_all * (world - 1) / world + total.in_node * (1 - 1 / max(1, setting.hpz)),
    )
