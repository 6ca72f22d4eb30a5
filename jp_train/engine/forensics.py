"""What is kept of a bad step: enough to find out why, without running it again.

    RUN_DIR/forensics/step_0000123/report.json   decision, losses by kind and source, norms by block of the model, every
                                                 document of every rank's rows
    RUN_DIR/forensics/step_0000123/rank_0000_0.safetensors   with guard.dump_tensors: the exact input of a micro-batch

Gradients exist only until the update, so `inspect` runs inside the update gate, and `dump` after the step's metrics are
exchanged. Nothing here costs a good step anything.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from jp_train.config import RunConfig
from jp_train.data.batch_file import describe_batch, save_batch
from jp_train.data.tokenizer import Tokenizer
from jp_train.engine.init import Ranks, gather_objects
from jp_train.engine.outliers import UpdateDecision
from jp_train.errors import JpTrainError
from jp_train.files import json_safe
from jp_train.model.freeze import module_of
from jp_train.types import PackedBatch

FOLDER = "forensics"


class Forensics:
    """Makes the dumps of one run. Every method is called by all ranks at the same steps; rank 0 writes the report."""

    def __init__(
        self, cfg: RunConfig, ranks: Ranks, tokenizer: Tokenizer, model: torch.nn.Module, optimizer: Any
    ) -> None:
        self._cfg, self._ranks, self._tokenizer, self._model, self._optimizer = cfg, ranks, tokenizer, model, optimizer
        self._norms: dict[str, dict[str, float | None]] = {}

    def inspect(self) -> None:
        """Take the norms of weights and gradients of the present step. Collective: one reduction."""
        self._norms = block_norms(self._model.named_parameters(), self._optimizer)

    def dump(
        self, step: int, decision: UpdateDecision, micro_batches: Sequence[PackedBatch], values: Mapping[str, float]
    ) -> Path | str:
        """Write the dump of a bad step. Collective. Returns its folder, or why (some of) it could not be written: a
        dump never ends a run."""
        folder = Path(self._cfg.run_dir) / FOLDER / f"step_{step:07d}"
        rows_of_ranks = gather_objects(self._ranks, self._rows(micro_batches))
        failure = ""
        if self._ranks.is_main:
            report = {
                "step": step,
                "what": decision.what,
                "action": decision.action,
                "applied": decision.applies,
                "loss": decision.loss,
                "grad_norm": decision.grad_norm,
                "usual": decision.statistics,
                "losses": {key: value for key, value in values.items() if key.startswith("loss/")},
                "lr": values.get("optim/lr"),
                "blocks": self._norms,
                "explain": f"jp-train data explain {self._cfg.run_dir}/config.yaml --step {step} --run "
                f"{self._cfg.run_dir}",
                "rows": [row for rows in rows_of_ranks for row in rows],
            }
            try:
                folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(json_safe(report), indent=1, ensure_ascii=False)
                # a key may hold bytes that are no UTF-8: Python's escape of those is JSON's
                (folder / "report.json").write_text(text, encoding="utf-8", errors="backslashreplace")
            except OSError as error:
                failure = f"{folder} cannot be written: {error}"
        if self._cfg.guard.dump_tensors:
            failures = gather_objects(self._ranks, self._save(folder, micro_batches))
            failure = failure or next(filter(None, failures), "")
        return failure or folder

    def _rows(self, micro_batches: Sequence[PackedBatch]) -> list[dict[str, Any]]:
        first = self._ranks.dp_rank * sum(batch.rows for batch in micro_batches)
        described: list[dict[str, Any]] = []
        for batch in micro_batches:
            try:
                rows = describe_batch(batch, self._tokenizer, first_row=first)
            except Exception as error:  # the other ranks wait for this one's answer
                rows = [{"row": first, "error": f"{type(error).__name__}: {error}"}]
            described += [{"rank": self._ranks.dp_rank, **row} for row in rows]
            first += batch.rows
        return described

    def _save(self, folder: Path, micro_batches: Sequence[PackedBatch]) -> str:
        try:
            for number, batch in enumerate(micro_batches):
                save_batch(batch, folder / f"rank_{self._ranks.dp_rank:04d}_{number}.safetensors")
        except (OSError, JpTrainError) as error:
            return f"rank {self._ranks.dp_rank}: {error}"
        return ""


def block_of(name: str) -> str:
    """`language_model.layers.3` for a parameter of that layer, else the module (`schema.MODULES`) that it belongs
    to."""
    numbered = re.search(r"\.(layers|resblocks|blocks)\.(\d+)\.", name)
    return f"{module_of(name)}.{numbered[1]}.{numbered[2]}" if numbered else module_of(name)


@torch.no_grad()
def block_norms(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], optimizer: Any
) -> dict[str, dict[str, float | None]]:
    """{block: {"weights": norm, "gradients": norm or None where frozen, "gradients_not_finite": elements}} from
    partitions alone. Collective.

    Each rank sums squares over the slice it holds (padding left out); one reduction adds them up, so nothing is
    gathered. Norms of gradients that are not finite are of their finite elements.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums: dict[str, torch.Tensor] = {}
    trained: set[str] = set()
    for name, parameter in named_parameters:
        assert hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_numel"), f"{name} is not partitioned"
        block = block_of(name)
        row = sums.setdefault(block, torch.zeros(3, dtype=torch.float64, device=parameter.ds_tensor.device))
        weights = parameter.ds_tensor.data.flatten()
        held = max(0, min(weights.numel(), parameter.ds_numel - weights.numel() * rank))
        row[0] += weights[:held].float().square().sum(dtype=torch.float64)
        if parameter.requires_grad:
            trained.add(block)
            gradients = optimizer.get_local_fp32_grad_for_param(parameter).flatten()[:held]
            finite = gradients.isfinite()
            row[1] += torch.where(finite, gradients, 0.0).double().square().sum()
            row[2] += (~finite).sum()
    table = torch.stack(list(sums.values()))
    if world > 1:
        dist.all_reduce(table)
    return {
        block: {
            "weights": weights**0.5,
            "gradients": gradients**0.5 if block in trained else None,
            "gradients_not_finite": int(broken),
        }
        for block, (weights, gradients, broken) in zip(sums, table.tolist(), strict=True)
    }
