"""How long a step takes: arithmetic at a stated share of the peak, collectives at a stated share of the links, with
and without overlap, and Python, which is never faster than the pass it launches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jp_train.config import RunConfig
from jp_train.model.flops import BatchStatistics, step_flops, vq_flops
from jp_train.tools.forecast.communication import Communication, Leg
from jp_train.tools.forecast.hardware import Hardware
from jp_train.tools.forecast.host import HostTime
from jp_train.tools.forecast.memory import Setting
from jp_train.tools.forecast.shapes import Shapes
from jp_train.tools.forecast.walk import recomputed_layers

UPDATE_BYTES = 80
"""Bytes of GPU memory that an update moves for every element of a rank's slice: search for non-finite values, norm,
flat copy, clip, Adam, rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arithmetic:
    """FLOPs of a step over all ranks. `model`: what MFU counts; `recomputed`: checkpointed layers again;
    `encoding`: VQ, in fp32."""

    forward: float
    backward: float
    recomputed: float
    encoding: float

    @property
    def model(self) -> float:
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step. `overlapped`: collectives run beside the arithmetic of their pass; `serial`: behind each
    other. Python runs beside both."""

    overlapped: float
    serial: float
    parts: dict[str, float]
    """Seconds of each kind of work if nothing overlapped: compute, recompute, vq_encode, gather_forward,
    gather_backward, reduce, update, and host: what the GPU waits for Python."""
    mfu: float
    """Of the overlapped step."""
    serial_mfu: float
    tokens_per_second: float
    """Of one GPU, overlapped."""
    bound: str
    """What the overlapped step waits for most: compute, inter-node links, intra-node links, latency, host (Python), or
    vq encoding."""


def arithmetic(cfg: RunConfig, shapes: Shapes, step: BatchStatistics, *, checkpointing: int) -> Arithmetic:
    """From model/flops.py; the forward pass of what is computed twice comes from it too."""
    encoding = step.encoded_images * vq_flops(cfg.model)[0] if step.encoded_images else 0.0
    flops = step_flops(cfg.model, replace(step, encoded_images=0), cfg.stage.trainable)
    recomputed = 0.0
    if checkpointing and shapes.through_language_model:
        layers = replace(step, und_images=0, gen_images=0, text_positions=0, image_positions=0, encoded_images=0)
        share = recomputed_layers(shapes.layers, checkpointing) / shapes.layers
        recomputed += share * step_flops(cfg.model, layers, cfg.stage.trainable).forward
    if checkpointing and "vision_model" in shapes.learns:
        tower = replace(
            step, tokens=0, squared_lengths=0, gen_images=0, text_positions=0, image_positions=0, encoded_images=0
        )
        share = recomputed_layers(shapes.vision_layers, checkpointing) / shapes.vision_layers
        recomputed += share * step_flops(cfg.model, tower, cfg.stage.trainable).forward
    return Arithmetic(forward=flops.forward, backward=flops.backward, recomputed=recomputed, encoding=encoding)


def leg_seconds(leg: Leg, hardware: Hardware, setting: Setting, nodes: int) -> dict[str, float]:
    """Seconds of one leg by what it needs: links between nodes, links inside, and the calls' latency. The links work
    at the same time."""
    world, efficiency = setting.world, hardware.link_efficiency * 1e9
    between = leg.over_all * (nodes - 1) / nodes / (hardware.inter_gbs * efficiency)
    per_node = max(1, world // nodes)
    inside = leg.over_all * (per_node - 1) / per_node / (hardware.intra_gbs * efficiency) if per_node > 1 else 0.0
    inside = max(inside - between, 0.0) + leg.in_node * (1 - 1 / max(1, setting.hpz)) / (
        hardware.intra_gbs * efficiency
    )
    share = leg.over_all / (leg.over_all + leg.in_node) if leg.over_all + leg.in_node else 0.0
    hops = hardware.hop_us * (nodes - 1) * share
    return {"between": between, "inside": inside, "latency": leg.calls * (hardware.latency_us + hops) * 1e-6}


def step_time(
    work: Arithmetic,
    sent: Communication,
    host: HostTime,
    shapes: Shapes,
    setting: Setting,
    hardware: Hardware,
    *,
    nodes: int,
    tokens: float,
) -> StepTime:
    """`tokens`: of a step over all ranks."""
    world = setting.world
    rate = world * hardware.peak_tflops * hardware.achievable * 1e12
    if setting.size == 4:
        rate = world * hardware.fp32_tflops * hardware.achievable * 1e12
    again = work.recomputed / rate
    forward, backward = work.forward / rate, work.backward / rate
    encode = work.encoding / (world * hardware.fp32_tflops * hardware.achievable * 1e12)
    legs = {
        name: leg_seconds(leg.scaled(sent.micro_batches), hardware, setting, nodes)
        for name, leg in (("gather_forward", sent.forward), ("gather_backward", sent.backward), ("reduce", sent.reduce))
    }
    seconds = {name: sum(parts.values()) for name, parts in legs.items()}
    update = UPDATE_BYTES * sum(p.share(world) for p in shapes.parameters if p.trained) / (hardware.hbm_gbs * 1e9)
    behind = seconds["gather_backward"] + seconds["reduce"]
    launching = (sent.micro_batches * host.forward, sent.micro_batches * host.backward)
    waiting = max(0.0, launching[0] - forward - seconds["gather_forward"])
    waiting += max(0.0, launching[1] - backward - again - behind)
    overlapped = max(forward, seconds["gather_forward"], launching[0])
    overlapped += max(backward + again, behind, launching[1]) + encode + update
    serial = forward + backward + again + sum(seconds.values()) + waiting + encode + update
    waits = {
        "compute": 0.0, "vq encoding": encode, "inter-node links": 0.0, "intra-node links": 0.0, "latency": 0.0,
        "host": 0.0,
    }  # fmt: skip
    for computed, launched, names in (
        (forward, launching[0], ("gather_forward",)),
        (backward + again, launching[1], ("gather_backward", "reduce")),
    ):
        moved = sum(seconds[name] for name in names)
        if launched > max(computed, moved):
            waits["host"] += launched
            continue
        if computed >= moved:
            waits["compute"] += computed
            continue
        for name in names:
            for part, label in (
                ("between", "inter-node links"),
                ("inside", "intra-node links"),
                ("latency", "latency"),
            ):
                waits[label] += legs[name][part]
    peak = world * hardware.peak_tflops * 1e12
    return StepTime(
        overlapped=overlapped,
        serial=serial,
        parts={"compute": forward + backward, "recompute": again, "vq_encode": encode, **seconds, "update": update}
        | {"host": waiting},
        mfu=work.model / (overlapped * peak),
        serial_mfu=work.model / (serial * peak),
        tokens_per_second=tokens / overlapped / world,
        bound=max(waits, key=lambda name: waits[name]),
    )
