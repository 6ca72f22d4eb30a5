"""The freeze proof: after the first step, frozen weights are bit for bit what they were and every trainable one took
part.

`requires_grad` says what should be trained; this says what was. A frozen parameter that some code writes to, or a
trainable one that a branch of the model skips, trains on without an error, and under ZeRO-3 a skipped one is even moved
by stale gradients (docs/zero3.md, rule 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from jp_train.errors import JpTrainError

CHUNK = 1 << 22
"""Elements whose checksum is computed at one time (32 MiB of int64)."""

NAMES_SHOWN = 8


class FreezeProofError(JpTrainError):
    """The first step changed a frozen parameter, or left a trainable one without a finite gradient."""


@dataclass(frozen=True)
class FreezeProof:
    """What was checked, for events.jsonl and the checkpoint: counts, and one checksum over all frozen parameters."""

    first_step: int
    frozen_parameters: int
    frozen_checksum: str
    trainable_parameters: int
    gradients_per_parameter: int
    grad_norm: float
    trainable_modules: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class FreezeWatch:
    """Takes the evidence of one step. Build it before the step's first backward, `finish` after the optimizer step,
    on every rank."""

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        module_of: Callable[[str], str],
        n_micro_batches: int,
        *,
        outside: Iterable[tuple[str, torch.Tensor]] = (),
    ) -> None:
        """`outside`: tensors that no stage trains and no engine holds (the VQ tokenizer, whole on every rank)."""
        named = list(named_parameters)
        self._frozen = [(name, parameter) for name, parameter in named if not parameter.requires_grad]
        self._trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        self._module_of = module_of
        self._expected = n_micro_batches
        self._outside = list(outside)
        self._before = checksums(parameter for _, parameter in self._frozen)
        self._outside_before = copies_checksums(tensor for _, tensor in self._outside)
        self._reached = [0] * len(self._trainable)
        self._handles = [parameter.register_hook(self._counter(i)) for i, (_, parameter) in enumerate(self._trainable)]

    def _counter(self, index: int) -> Callable[[torch.Tensor], None]:
        def note(_gradient: torch.Tensor) -> None:
            self._reached[index] += 1

        return note

    def finish(self, *, step: int, grad_norm: float, applied: bool) -> FreezeProof:
        """The proof. Raises FreezeProofError on every rank when it fails, naming parameters.

        `applied` False (a skipped update) leaves the gradients' finiteness to the skip rules; the rest is checked all
        the same.
        """
        for handle in self._handles:
            handle.remove()
        after = checksums(parameter for _, parameter in self._frozen)
        changed = [name for (name, _), old, new in zip(self._frozen, self._before, after, strict=True) if old != new]
        outside = copies_checksums(tensor for _, tensor in self._outside)
        changed += [
            name for (name, _), old, new in zip(self._outside, self._outside_before, outside, strict=True) if old != new
        ]
        lowest = _over_ranks(torch.tensor(self._reached, dtype=torch.int64), dist.ReduceOp.MIN)
        missed = [
            f"{name} ({n} of {self._expected})"
            for (name, _), n in zip(self._trainable, lowest, strict=True)
            if n < self._expected
        ]
        if changed:
            raise FreezeProofError(
                f"{len(changed)} frozen parameter(s) changed in step {step}: {_some(changed)}. stage.trainable does "
                "not list their modules, so no code may write to them: look for in-place updates outside the optimizer"
            )
        if missed:
            raise FreezeProofError(
                f"{len(missed)} trainable parameter(s) got no gradient in some micro-batch of step {step} on some "
                f"rank: {_some(missed)}. Every trainable parameter must take part in every micro-batch (ZeRO-3 would "
                "re-apply old gradients): the model's forward pass skips them"
            )
        if applied and not grad_norm < float("inf"):
            raise FreezeProofError(f"step {step} was applied with a gradient norm of {grad_norm}")
        modules: dict[str, int] = {}
        for name, _ in self._trainable:
            modules[self._module_of(name)] = modules.get(self._module_of(name), 0) + 1
        return FreezeProof(
            first_step=step,
            frozen_parameters=len(self._frozen),
            frozen_checksum=combined(self._before),
            trainable_parameters=len(self._trainable),
            gradients_per_parameter=self._expected,
            grad_norm=grad_norm,
            trainable_modules=modules,
        )


def frozen_checksum(named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> str:
    """One checksum over all frozen parameters, the same for every number of ranks. Collective."""
    return combined(checksums(parameter for _, parameter in named_parameters if not parameter.requires_grad))


def refuse_leaks(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    held: Iterable[torch.nn.Parameter],
    trainable: Iterable[str],
) -> None:
    """Raise FreezeProofError unless `held`, the parameters that the optimizer updates, are exactly those that the stage
    trains, by name.

    What the stage trains is read from its configuration, not of `requires_grad`: code that sets the flag is one way in
    which a frozen weight learns.
    """
    named, expected = list(named_parameters), set(trainable)
    ids = {id(parameter) for parameter in held}
    leaked = [
        name for name, parameter in named if name not in expected and (id(parameter) in ids or parameter.requires_grad)
    ]
    missing = [name for name, parameter in named if name in expected and id(parameter) not in ids]
    if leaked:
        raise FreezeProofError(
            f"{len(leaked)} frozen parameter(s) are open to training, in the optimizer or by requires_grad: "
            f"{_some(leaked)}. stage.trainable does not list "
            "their modules: only `freeze.set_trainable` may decide what learns, and before the engine is built"
        )
    if missing:
        raise FreezeProofError(
            f"the optimizer lacks {len(missing)} trainable parameter(s), which would never learn: {_some(missing)}"
        )


def checksums(parameters: Iterable[torch.Tensor]) -> list[int]:
    """One 64-bit checksum per parameter over the bits of all its elements and their positions. Collective; nothing is
    gathered.

    Each rank sums (bits + 1) x weight(position) modulo 2^64 over the slice it holds; sums add up over ranks, so neither
    the number of ranks nor padding matters.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    local = [_slice_checksum(parameter, rank, world) for parameter in parameters]
    return _over_ranks(torch.tensor(local, dtype=torch.int64), dist.ReduceOp.SUM)


def copies_checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """One checksum per tensor that every rank holds whole, over all ranks' copies: a change of one copy is seen.
    Collective."""
    return _over_ranks(
        torch.tensor([_slice_checksum(tensor, 0, 1) for tensor in tensors], dtype=torch.int64), dist.ReduceOp.SUM
    )


def combined(values: list[int]) -> str:
    """One hex string for a list of checksums, order included."""
    total = 0
    for value in values:
        total = (total * 1_000_003 + value) % (1 << 64)
    return f"{total:016x}"


def _slice_checksum(parameter: torch.Tensor, rank: int, world: int) -> int:
    if hasattr(parameter, "ds_tensor") and hasattr(
        parameter, "ds_numel"
    ):  # ZeRO-3: a contiguous slice of the flattened parameter, the last one padded
        held = parameter.ds_tensor.data.flatten()
        start = held.numel() * rank
        values = held[: max(0, min(held.numel(), parameter.ds_numel - start))]
    else:  # not partitioned: rank 0 counts for all
        values, start = (parameter.detach().flatten() if rank == 0 else parameter.detach().flatten()[:0]), 0
    bits = values.view(torch.int16 if values.element_size() == 2 else torch.int32)
    total = 0
    for offset in range(0, bits.numel(), CHUNK):
        part = bits[offset : offset + CHUNK].to(torch.int64)
        position = torch.arange(start + offset, start + offset + part.numel(), dtype=torch.int64, device=part.device)
        # odd, so that no single change of bits is lost; wraps at 2^64
        weight = (position * 0x5851F42D4C957F2D + 0x14057B7EF767814F) | 1
        total += int(((part + 1) * weight).sum())
    return _wrap(total)


def _wrap(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _over_ranks(values: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> list[int]:
    if dist.is_initialized() and dist.get_world_size() > 1 and values.numel():
        if dist.get_backend() == "nccl":
            values = values.cuda()
        dist.all_reduce(values, op=operation)
    return values.tolist()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
