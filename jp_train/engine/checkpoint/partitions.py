"""What this rank holds of weights and optimizer state: the only module that reaches into DeepSpeed's ZeRO-3 optimizer.

Under ZeRO-3 the trained slices of a rank lie in a few flat buffers (sub-groups): `fp16_groups[i]` lists the parameters
of sub-group i in order, `fp32_partitioned_groups_flat[i]` is the fp32 master of their slices one after the other, and
the base optimizer's moments have the same layout. A frozen parameter has only its slice in the run's dtype,
`ds_tensor`. The tests compare every value here with DeepSpeed's own view of it (`safe_get_full_fp32_param` and its
kin). DeepSpeed is pinned for this reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from jp_train.errors import CheckpointError
from jp_train.model.partition_files import FROZEN, MASTER, MOMENTS, NamedTensors, Parameter, PartitionReader


def parameters(engine: Any) -> list[Parameter]:
    """Every parameter of the model in the model's order."""
    return [
        Parameter(name=name, shape=tuple(parameter.ds_shape), trained=parameter.requires_grad)
        for name, parameter in engine.module.named_parameters()
    ]


def optimizer_step(engine: Any) -> int:
    """Updates made so far, 0 for a fresh optimizer. They are the same for every sub-group, since an update is
    skipped for all or none."""
    steps = {int(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    assert len(steps) <= 1, f"sub-groups at different steps: {steps}"
    return steps.pop() if steps else 0


def local_slices(engine: Any, *, with_frozen: bool) -> NamedTensors:
    """This rank's slices without padding, named as in `model/partition_files.py`. They are views: an optimizer step
    changes them."""
    slices: list[tuple[str, torch.Tensor]] = []
    for name, parameter, buffers in _trained(engine):
        keep = _stored(parameter)
        for kind, values in buffers.items():
            slices.append((f"{kind}/{name}", values[:keep]))
    if with_frozen:
        for name, parameter in _frozen(engine):
            slices.append((f"{FROZEN}/{name}", parameter.ds_tensor.detach().flatten()[: _stored(parameter)]))
    return [(name, values) for name, values in slices if values.numel()]


def partition_gathered(engine: Any) -> None:
    """Before `fill`: what is gathered becomes partitioned."""
    engine.optimizer.checkpoint_event_prologue()
    if engine.optimizer.persistent_parameters:
        engine.optimizer.persistent_parameters[0].partition(engine.optimizer.persistent_parameters)


@torch.no_grad()
def fill(engine: Any, reader: PartitionReader) -> None:
    """Put a checkpoint of any number of ranks into a fresh engine: this rank reads its own ranges, one parameter at a
    time. No collective.

    Frozen weights that the checkpoint does not hold stay as they are. Raises CheckpointError when names, shapes or the
    trained set differ.
    """
    _compare(parameters(engine), reader)
    optimizer = engine.optimizer
    if reader.optimizer_step:
        _create_moments(optimizer, reader.optimizer_step)
    for name, parameter, buffers in _trained(engine):
        start, stop = _span(parameter)
        for kind, values in buffers.items():
            values.zero_()  # padding is never read, but weight decay multiplies it
            if stop > start:
                values[: stop - start].copy_(reader.read(kind, name, start, stop))
    for index, master in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[index].data.copy_(master.data)
        optimizer._unflatten_partitioned_parameters(index)
    if reader.with_frozen:
        for name, parameter in _frozen(engine):
            start, stop = _span(parameter)
            if stop > start:
                parameter.ds_tensor.data.flatten()[: stop - start].copy_(reader.read(FROZEN, name, start, stop))
            parameter.ds_secondary_tensor = None  # hpZ's copy, which the forward pass reads; it is made anew


def gather_persistent(engine: Any) -> None:
    """After `fill`: small parameters that ZeRO-3 keeps whole on every rank are gathered anew, and secondary copies
    are dropped. Collective."""
    engine.optimizer.checkpoint_event_epilogue()


def _trained(engine: Any) -> Iterator[tuple[str, Any, dict[str, torch.Tensor]]]:
    """Name, parameter, and its slices (padding included) of master and moments; moments of a fresh optimizer are
    zeros."""
    optimizer = engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for group, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        state = optimizer.optimizer.state.get(flat, {})
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            slices = {MASTER: flat.detach()[offset : offset + size]}
            for kind in MOMENTS:
                slices[kind] = (
                    state[kind][offset : offset + size] if kind in state else torch.zeros_like(slices[MASTER])
                )
            offset += size
            yield names[id(parameter)], parameter, slices


def _frozen(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, parameter) for name, parameter in engine.module.named_parameters() if not parameter.requires_grad)


def _span(parameter: Any) -> tuple[int, int]:
    """The elements of the whole parameter that this rank holds."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    assert parameter.partition_numel() == -(-parameter.ds_numel // world), "DeepSpeed cuts parameters in another way"
    return Parameter(name="", shape=tuple(parameter.ds_shape), trained=parameter.requires_grad).span(rank, world)


def _stored(parameter: Any) -> int:
    start, stop = _span(parameter)
    return stop - start


def _create_moments(optimizer: Any, step: int) -> None:
    """The state that torch's AdamW makes in its first step, so that it is there to be filled."""
    fused = bool(optimizer.optimizer.defaults.get("fused"))
    for flat in optimizer.fp32_partitioned_groups_flat:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step), device=flat.device if fused else "cpu"),
            **{kind: torch.zeros_like(flat.data) for kind in MOMENTS},
        }


def _compare(here: list[Parameter], reader: PartitionReader) -> None:
    there = reader.parameters
    problems = [f"{p.name} is not in it" for p in here if p.name not in there]
    problems += [f"{name} is not in this model" for name in there.keys() - {p.name for p in here}]
    for p in here:
        if p.name in there and there[p.name].shape != p.shape:
            problems.append(f"{p.name} is {list(there[p.name].shape)} there and {list(p.shape)} here")
        elif p.name in there and there[p.name].trained != p.trained:
            problems.append(
                f"{p.name} is {'trained' if there[p.name].trained else 'frozen'} there and "
                f"{'trained' if p.trained else 'frozen'} here"
            )
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"{reader.folder} does not fit this model and stage.trainable: {'; '.join(problems[:4])}{more}"
        )
