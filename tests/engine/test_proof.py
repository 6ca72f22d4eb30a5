"""The freeze proof on plain tensors (on ZeRO-3 ranks: test_distributed_runs.py)."""

from __future__ import annotations

import pytest
import torch

from jp_train.engine.proof import FreezeProofError, FreezeWatch, checksums, combined, refuse_leaks


def model() -> torch.nn.Module:
    made = torch.nn.ModuleDict({"frozen": torch.nn.Linear(3, 3), "trained": torch.nn.Linear(3, 3)})
    made["frozen"].requires_grad_(False)
    return made


def watch(made: torch.nn.Module, micro_batches: int = 2) -> FreezeWatch:
    return FreezeWatch(made.named_parameters(), lambda name: name.split(".")[0], micro_batches)


def step(made: torch.nn.Module) -> None:
    for _ in range(2):
        made["trained"](made["frozen"](torch.ones(3))).sum().backward()


def test_a_clean_step_gives_the_proof():
    made = model()
    watching = watch(made)
    step(made)
    proof = watching.finish(step=1, grad_norm=1.0, applied=True)
    assert (proof.frozen_parameters, proof.trainable_parameters, proof.gradients_per_parameter) == (2, 2, 2)
    assert proof.trainable_modules == {"trained": 2}


def test_the_smallest_change_of_a_frozen_weight_is_seen():
    made = model()
    watching = watch(made)
    step(made)
    with torch.no_grad():
        weight = made["frozen"].weight
        weight.view(torch.int32)[1, 2] ^= 1
    with pytest.raises(FreezeProofError, match=r"1 frozen parameter\(s\) changed in step 1: frozen.weight"):
        watching.finish(step=1, grad_norm=1.0, applied=True)


def test_a_parameter_that_misses_one_micro_batch_is_named():
    made = model()
    watching = watch(made)
    step(made)
    watching = watch(made)
    made["trained"](torch.ones(3)).sum().backward()
    with pytest.raises(FreezeProofError, match=r"trained.weight \(1 of 2\), trained.bias \(1 of 2\)"):
        watching.finish(step=1, grad_norm=1.0, applied=True)


def test_an_applied_step_needs_a_finite_norm():
    made = model()
    watching = watch(made)
    step(made)
    with pytest.raises(FreezeProofError, match="gradient norm of inf"):
        watching.finish(step=1, grad_norm=float("inf"), applied=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_checksum_depends_on_every_bit_and_every_position(dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = {tuple(checksums([torch.nn.Parameter(values)]))}
    for index in (0, 1, 500, 999):
        changed = values.clone()
        changed[index] = -changed[index]
        seen.add(tuple(checksums([torch.nn.Parameter(changed)])))
    swapped = values.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    seen.add(tuple(checksums([torch.nn.Parameter(swapped)])))
    assert len(seen) == 6


def test_order_enters_the_combined_checksum():
    assert combined([1, 2]) != combined([2, 1]) and combined([]) == "0" * 16


def test_an_optimizer_must_hold_exactly_what_the_stage_trains():
    made = model()
    named, trainable = list(made.named_parameters()), ["trained.weight", "trained.bias"]
    refuse_leaks(named, made["trained"].parameters(), trainable)
    with pytest.raises(FreezeProofError, match=r"1 frozen parameter\(s\) are open to training, .*: frozen.bias"):
        refuse_leaks(named, [*made["trained"].parameters(), made["frozen"].bias], trainable)
    with pytest.raises(FreezeProofError, match=r"lacks 1 trainable parameter\(s\), .*: trained.bias"):
        refuse_leaks(named, [made["trained"].weight], trainable)
    made["frozen"].weight.requires_grad_(True)
    with pytest.raises(FreezeProofError, match="frozen.weight"):
        refuse_leaks(named, made["trained"].parameters(), trainable)


def test_a_changed_tensor_outside_the_engine_is_seen():
    made, outside = model(), torch.nn.Linear(2, 2)
    watching = FreezeWatch(made.named_parameters(), lambda name: name, 2, outside=[("vq.weight", outside.weight)])
    step(made)
    with torch.no_grad():
        outside.weight[0, 0] += 1
    with pytest.raises(FreezeProofError, match=r"1 frozen parameter\(s\) changed in step 1: vq.weight"):
        watching.finish(step=1, grad_norm=1.0, applied=True)
