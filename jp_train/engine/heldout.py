"""Held-out loss: the same documents every time, in the same batches, without touching the training stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from jp_train.config import RunConfig
from jp_train.engine.init import Engine, Ranks
from jp_train.engine.metrics import validation_values
from jp_train.model.vq import fill_pending
from jp_train.types import PackedBatch


class HeldOut:
    """The batches of every held-out source of this rank, encoded once. Every rank has the same number of batches per
    source."""

    def __init__(
        self, cfg: RunConfig, batches: Mapping[str, Sequence[PackedBatch]], engine: Engine, ranks: Ranks
    ) -> None:
        self._kinds = {name: cfg.validation.sources[name].kind.value for name in batches}
        self._device = ranks.device
        self._batches = {name: [self._prepare(batch, engine) for batch in local] for name, local in batches.items()}

    def __bool__(self) -> bool:
        return bool(self._batches)

    def _prepare(self, batch: PackedBatch, engine: Engine) -> PackedBatch:
        filled = fill_pending(batch.to(self._device), engine.vq).to("cpu")
        # the model counts by the recipe's sources, which a held-out source is not one of
        return replace(filled, document_sources=torch.zeros_like(filled.document_sources))

    @torch.no_grad()
    def measure(self, engine: Engine) -> dict[str, float]:
        """`val/...` values; one reduction for all sources. Collective."""
        engine.deepspeed.eval()
        sums = torch.zeros(len(self._batches), 2, dtype=torch.float64, device=self._device)
        for index, batches in enumerate(self._batches.values()):
            for batch in batches:
                terms = engine.deepspeed(batch.to(self._device))
                sums[index, 0] += terms.text_sum.double() + terms.image_sum.double()
                sums[index, 1] += terms.text_tokens + terms.image_tokens
        engine.deepspeed.train()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        return validation_values(
            {
                name: (self._kinds[name], loss, count)
                for name, (loss, count) in zip(self._batches, sums.tolist(), strict=True)
            }
        )
