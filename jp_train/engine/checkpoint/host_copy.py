"""A copy of this rank's tensors in host memory that is used again for the next save."""

from __future__ import annotations

import torch

from jp_train.model.partition_files import NamedTensors

ALIGNMENT = 64


class HostCopy:
    """One buffer (page-locked where there is a GPU, so that the copy runs at the bus's speed), as large as the largest
    save so far.

    What `take` returned is overwritten by the next `take`.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def take(self, tensors: NamedTensors) -> NamedTensors:
        """The same names with copies on the CPU. Returns when they are complete: the originals may change from then
        on."""
        starts, total = [], 0
        for _, tensor in tensors:
            starts.append(total)
            total += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self._buffer.numel() < total:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is made
            self._buffer = torch.empty(total, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
        copies = []
        for (name, tensor), start in zip(tensors, starts, strict=True):
            copy = self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            copy.copy_(tensor.detach(), non_blocking=True)
            copies.append((name, copy))
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return copies
