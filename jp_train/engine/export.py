"""The end of a stage: the whole model in one folder, which the next stage, inference and transformers read.

Weights leave in the dtype they were trained in (`precision`): fp32 runs export fp32, bf16 runs export the bf16 weights
that the forward pass used, which are the fp32 master weights rounded once. The next stage's master weights start from
those: the low bits of the old ones are dropped once per stage, together with its moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jp_train.config.choices import Precision
from jp_train.engine.init import Engine, gather_for_reading
from jp_train.errors import CheckpointError, JpTrainError
from jp_train.model.export import write_export

GATHERED_ELEMENTS = 1 << 24
"""Elements that are whole on a rank at one time, but at least one tensor: 32 MiB in bf16 (the largest of the 7B
model has 0.8 GiB)."""


def export(
    engine: Engine, path: Path, *, tokenizer: Any, precision: Precision, config_text: str, is_main: bool
) -> None:
    """Write `path` from the engine's current weights, the VQ tokenizer and the text tokenizer. Collective; rank 0
    writes.

    No rank holds more than GATHERED_ELEMENTS elements, or one tensor; rank 0 has a copy of them on the CPU, and writes
    tensor by tensor. Raises CheckpointError on every rank when the folder cannot be written; nothing half-written is
    left.
    """
    tensors = whole_tensors(engine, keep=is_main)
    failure: str | None = None
    if is_main:
        try:
            write_export(
                path,
                engine.model.janus_config,
                tensors,
                tokenizer,
                dtype=torch.bfloat16 if precision is Precision.bf16 else torch.float32,
                run_config=config_text,
            )
        except (OSError, JpTrainError) as error:
            failure = f"cannot write {path}: {error}"
    for _ in tensors:  # other ranks take part in every gather, and rank 0 in those that a failed write left over
        pass
    box = [failure]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise CheckpointError(box[0])


def whole_tensors(engine: Engine, *, keep: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model under transformers' names, whole, on the CPU; yields nothing where `keep` is False,
    but gathers all the same."""
    group: list[tuple[str, torch.nn.Parameter]] = []
    elements = 0
    for name, parameter in engine.model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if group and elements + size > GATHERED_ELEMENTS:
            yield from _gathered(group, keep)
            group, elements = [], 0
        group.append((name, parameter))
        elements += size
    yield from _gathered(group, keep)
    if keep:
        for name, tensor in engine.vq.state_dict().items():
            yield f"model.{name}", tensor


def _gathered(group: list[tuple[str, torch.nn.Parameter]], keep: bool) -> list[tuple[str, torch.Tensor]]:
    with gather_for_reading([parameter for _, parameter in group]):
        return [(name, parameter.detach().to("cpu", copy=True)) for name, parameter in group] if keep else []
