"""Arithmetic of a micro-batch at the true 1B and 7B shapes, counted, against the least that is needed.

    python bench/flops.py [--models 1b,7b] [--stages 1,2,3] [--json] [--save FILE]

torch's FlopCounterMode follows the model's own code over forward and backward on the meta device (no memory, no
values). The least is `model/flops.py`: no padding, logits only where there is a label, no gradient of a frozen weight,
no graph through a frozen tower, attention within documents. Layers computed again come on top: none, every k-th as the
launch file has it, all. `padded` is the same formula for the same documents as trainers without packing lay them out:
each padded to the longest of the micro-batch, or to the row, with logits of its head at every position.

Only matrix products count; a softmax or a norm does not. Attention is counted as full squares, here as there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from _figures import add_options, delivered

if TYPE_CHECKING:
    from jp_train.config import RunConfig
    from jp_train.model.flops import BatchStatistics
    from jp_train.types import PackedBatch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PARTS = ("vision_model", "aligner", "generation_aligner", "language_model", "lm_head", "generation_head")


@contextmanager
def visible_attention(bounds: list[int]) -> Iterator[None]:
    """Attention written out as products, which the counter sees; it cannot look into fused kernels. `bounds`: where the
    documents begin and end."""
    import torch

    from jp_train.model import attention

    def products(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return (query @ key.transpose(-1, -2)).softmax(-1) @ value

    def by_document(query: Any, key: Any, value: Any, *_: Any) -> Any:
        parts = [
            products(*(x[:, start:end] for x in (query, key, value))).transpose(0, 1) for start, end in pairwise(bounds)
        ]
        return torch.cat(parts)

    with (
        patch.object(torch.nn.functional, "scaled_dot_product_attention", products),
        patch.object(attention, "_document_loop", by_document),
    ):
        yield


def counted(cfg: RunConfig, batch: PackedBatch, recompute_every: int) -> dict[str, float]:
    """FLOPs of forward and backward in all and by module."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from jp_train.model import freeze
    from jp_train.model.janus_pro import JanusPro

    with torch.device("meta"):
        model = JanusPro(cfg.model, cfg.loss, 1, recompute_every, 0).to(torch.bfloat16).train()
    freeze.set_trainable(model, cfg.stage.trainable)
    bounds = batch.cu_seqlens.tolist()
    with visible_attention(bounds), FlopCounterMode(display=False) as counter:
        terms = model(batch.to("meta"))
        (terms.text_sum + terms.image_sum).backward()
    by_module = {
        name: float(sum(sum(counts.values()) for path, counts in counter.get_flop_counts().items() if _is(path, name)))
        for name in PARTS
    }
    return {"total": float(counter.get_total_flops()), **by_module}


def _is(path: str, name: str) -> bool:
    return path in (f"JanusPro.{name}", f"JanusPro.model.{name}")


def padded(statistics: BatchStatistics, documents: list[tuple[str, int]], length: int) -> BatchStatistics:
    """The same documents, each `length` long, with logits of its own head at every position."""
    return replace(
        statistics,
        tokens=len(documents) * length,
        squared_lengths=len(documents) * length**2,
        text_positions=sum(length for kind, _ in documents if kind != "generation"),
        image_positions=sum(length for kind, _ in documents if kind == "generation"),
    )


def measured(model: str, stage: int) -> dict[str, Any]:
    """TFLOPs of one micro-batch of the launch file."""
    from forecast import synthetic_batch

    from jp_train.config import load_config
    from jp_train.model.flops import BatchStatistics, step_flops
    from jp_train.types import KINDS

    cfg = load_config(ROOT / "launch" / f"janus_pro_{model}_stage{stage}.yaml")
    batch = synthetic_batch(cfg, cfg.engine.micro_batch_rows, documents="ug" if stage == 1 else "ugt")
    statistics = BatchStatistics.of(batch)
    documents = [
        (str(KINDS[kind]), length)
        for kind, length in zip(batch.document_kinds.tolist(), batch.document_lengths.tolist(), strict=True)
    ]
    least = step_flops(cfg.model, statistics, cfg.stage.trainable).total

    def ratio(total: float) -> float:
        return total / least

    kept = counted(cfg, batch, 0)
    baselines = {
        name: step_flops(cfg.model, padded(statistics, documents, length), cfg.stage.trainable).total
        for name, length in (("longest", max(length for _, length in documents)), ("row", cfg.data.seq_len))
    }
    return {
        "tokens": statistics.tokens,
        "least_tflop": least / 1e12,
        "kept": ratio(kept["total"]),
        "shipped": ratio(counted(cfg, batch, cfg.engine.recomputed)["total"]),
        "recompute_every": cfg.engine.recomputed,
        "all_again": ratio(counted(cfg, batch, 1)["total"]),
        "padded_longest": ratio(baselines["longest"]),
        "padded_row": ratio(baselines["row"]),
        "by_module": {name: kept[name] / kept["total"] for name in PARTS},
    }


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,7b")
    parser.add_argument("--stages", default="1,2,3")
    add_options(parser)
    arguments = parser.parse_args()
    figures = {
        f"{model} stage {stage}": measured(model, int(stage))
        for model in arguments.models.split(",")
        for stage in arguments.stages.split(",")
    }
    if delivered(arguments, figures):
        return 0
    heads = ("least TFLOP", "kept", "shipped", "all again", "longest", "4096")
    print(f"{'x the least':<14}{'tokens':>8}" + "".join(f"{head:>13}" for head in heads) + "   kept, by module")
    for name, row in figures.items():
        shipped = f"{row['shipped']:.4f}" + (f" (1/{row['recompute_every']})" if row["recompute_every"] > 1 else "")
        cells = (
            f"{row['least_tflop']:.2f}", f"{row['kept']:.4f}", shipped, f"{row['all_again']:.4f}",
            f"{row['padded_longest']:.2f}", f"{row['padded_row']:.2f}",
        )  # fmt: skip
        shares = ", ".join(f"{part} {100 * share:.1f} %" for part, share in row["by_module"].items())
        print(f"{name:<14}{row['tokens']:>8,}" + "".join(f"{cell:>13}" for cell in cells) + f"   {shares}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
