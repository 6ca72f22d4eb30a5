"""Weights from one layout to another: `jp-train export` and `jp-train import`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from jp_train.errors import CheckpointError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert(source: Path, out: Path, *, layout: Literal["hf", "deepseek"] = "hf", dtype: Literal["bf16", "fp32"] = "bf16") -> Path:
    """Write the weights of `source` to the folder `out` (complete or absent) and return it.

    `source`: a run folder (its export/ is taken), an exported folder, or a released deepseek-ai folder. Tensors are read one at a time.
    Raises CheckpointError: nothing readable there, names or shapes that do not fit the folder's own config.json, or an `out` that exists.
    """
    from jp_train.data.tokenizer import load_saved_tokenizer
    from jp_train.model.configuration import build_config, read_model_config
    from jp_train.model.export import RUN_CONFIG, write_export
    from jp_train.model.pretrained import open_weights

    if source.parent.name == "checkpoints":
        raise CheckpointError(
            f"{source} is a training checkpoint: its weights are spread over the ranks' files. A run writes export/ when its stage ends; to end it now, "
            f"resume it with stage.early_stop.at_step={int(source.name.rsplit('_', 1)[-1]) if source.name.startswith('step_') else 'N'}, then export the run folder"
        )
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; name a new folder, or remove it first")
    weights = open_weights(source)
    folder = Path(weights.path)
    tokenizer = load_saved_tokenizer(folder)
    config = build_config(read_model_config(folder), tokenizer.special.image_placeholder)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in weights.keys():  # noqa: SIM118 - a WeightSource is no dict
            yield name, weights.get(name)

    run_config = folder / RUN_CONFIG
    write_export(
        out,
        config,
        tensors(),
        tokenizer,
        layout=layout,
        dtype=DTYPES[dtype],
        run_config=run_config.read_text(encoding="utf-8") if run_config.is_file() else None,
    )
    return out
