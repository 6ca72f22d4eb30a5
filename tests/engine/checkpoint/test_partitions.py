"""What does not fit an engine is refused before anything of it is changed. tests/engine/test_elastic.py compares values
with DeepSpeed's view."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jp_train.engine.checkpoint import partitions
from jp_train.errors import CheckpointError
from jp_train.model.partition_files import INDEX_FILE, Parameter, PartitionReader, index_text


def engine_of(*parameters: tuple[str, tuple[int, ...], bool]) -> SimpleNamespace:
    """Named parameters as ZeRO-3 shows them, and an optimizer that fails on any use."""
    module = torch.nn.Module()
    for name, shape, trained in parameters:
        parameter = torch.nn.Parameter(torch.zeros(0), requires_grad=trained)
        parameter.ds_shape = torch.Size(shape)
        module.register_parameter(name, parameter)
    return SimpleNamespace(module=module, optimizer=None)


def reader_of(folder: Path, *parameters: tuple[str, tuple[int, ...], bool]) -> PartitionReader:
    entries = [Parameter(name=name, shape=shape, trained=trained) for name, shape, trained in parameters]
    (folder / INDEX_FILE).write_text(index_text(entries, world=1, with_frozen=True, optimizer_step=3))
    return PartitionReader(folder)


def test_parameters_are_listed_with_their_whole_shapes() -> None:
    listed = partitions.parameters(engine_of(("w", (3, 4), True), ("b", (4,), False)))
    assert [(p.name, p.shape, p.numel, p.trained) for p in listed] == [("w", (3, 4), 12, True), ("b", (4,), 4, False)]


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ([("w", (3, 4), True)], "b is not in it"),
        ([("w", (3, 4), True), ("b", (4,), False), ("c", (1,), True)], "c is not in this model"),
        ([("w", (4, 3), True), ("b", (4,), False)], r"w is \[4, 3\] there and \[3, 4\] here"),
        ([("w", (3, 4), True), ("b", (4,), True)], "b is trained there and frozen here"),
    ],
)
def test_a_checkpoint_of_another_model_or_stage_is_refused(tmp_path: Path, there, message: str) -> None:
    engine = engine_of(("w", (3, 4), True), ("b", (4,), False))
    with pytest.raises(CheckpointError, match=message):
        partitions.fill(engine, reader_of(tmp_path, *there))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_whose_moments_are_restored_steps_as_the_one_that_made_them(fused: bool) -> None:
    weight, gradient = torch.randn(5), torch.randn(5)

    def made(step: int) -> tuple[torch.Tensor, torch.optim.AdamW]:
        flat = torch.nn.Parameter(weight.clone())
        optimizer = torch.optim.AdamW([flat], lr=0.1, fused=fused)
        for _ in range(step):
            flat.grad = gradient.clone()
            optimizer.step()
        return flat, optimizer

    flat, optimizer = made(3)
    fresh, restored = made(0)
    fresh.data.copy_(flat.data)
    partitions._create_moments(SimpleNamespace(optimizer=restored, fp32_partitioned_groups_flat=[fresh]), 3)
    for kind in partitions.MOMENTS:
        restored.state[fresh][kind].copy_(optimizer.state[flat][kind])
    for parameter, each in ((flat, optimizer), (fresh, restored)):
        parameter.grad = gradient.clone()
        each.step()
    assert torch.equal(fresh, flat)
    assert int(restored.state[fresh]["step"]) == int(optimizer.state[flat]["step"]) == 4
