"""Weights from one layout to another: `jp-train export` and `jp-train import`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from jp_train.errors import CheckpointError

if TYPE_CHECKING:
    from jp_train.model.weight_files import WeightSource

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def convert(
    source: Path,
    out: Path,
    *,
    layout: Literal["hf", "deepseek"] = "hf",
    dtype: Literal["bf16", "fp32"] = "bf16",
    cfg_scale: float | None = None,
    temperature: float | None = None,
) -> Path:
    """Write the weights of `source` to the folder `out` (complete or absent) and return it.

    `source`: a run folder (its export/ is taken), an exported folder, a released deepseek-ai folder, or a training
    checkpoint (`checkpoints/step_...` of a run that may be running): its fp32 master weights, in bf16 equal to what the
    run itself would export there. Tensors are read one at a time. `cfg_scale` and `temperature`: how images of this
    export are sampled by default; None takes what `source` says, or the paper's. Raises CheckpointError: nothing
    readable there, names or shapes that do not fit, or an `out` that exists.
    """
    from jp_train.data.tokenizer import load_saved_tokenizer, load_tokenizer
    from jp_train.model.configuration import build_config
    from jp_train.model.export import RUN_CONFIG, write_export
    from jp_train.model.sampling import read_sampling
    from jp_train.model.stored_config import read_model_config
    from jp_train.model.weight_files import open_weights
    from jp_train.model.weight_places import INDEX_FILE

    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty; name a new folder, or remove it first")
    weights = open_weights(source)
    folder = Path(weights.path)
    if (folder / INDEX_FILE).is_file():
        from jp_train.config import load_stored_config

        run_config = folder / "config.yaml"
        run = load_stored_config(run_config)
        tokenizer, model = load_tokenizer(run.tokenizer), run.model
        tensors = _checked(folder, weights, DTYPES[run.precision.value])
    else:
        run_config = folder / RUN_CONFIG
        tokenizer, model = load_saved_tokenizer(folder), read_model_config(folder)
        tensors = ((name, weights.get(name)) for name in weights.keys())  # noqa: SIM118 - a WeightSource is no dict
    write_export(
        out,
        build_config(model, tokenizer.special.image_placeholder),
        tensors,
        tokenizer,
        layout=layout,
        dtype=DTYPES[dtype],
        run_config=run_config.read_text(encoding="utf-8") if run_config.is_file() else None,
        sampling=read_sampling(folder).override(cfg_scale, temperature),
    )
    return out


def describe(folder: Path) -> str:
    """What an exported folder holds: `320 tensors, 24.1 MiB; images at cfg scale 5, temperature 1`."""
    from jp_train.model.sampling import read_sampling
    from jp_train.model.weight_files import open_weights

    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    return (
        f"{len(open_weights(folder).keys()):,} tensors, {size:,.1f} MiB; images at {read_sampling(folder).describe()}"
    )


def _checked(folder: Path, weights: WeightSource, run_dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a checkpoint; at the end, what was frozen must have the checksum that the run had (it may lie
    in another folder)."""
    from jp_train.engine.proof import checksums, combined
    from jp_train.model.partition_files import PartitionReader

    parameters = PartitionReader(folder).parameters
    sums = []
    for name in weights.keys():  # noqa: SIM118 - a WeightSource is no dict
        tensor = weights.get(name)
        if name in parameters and not parameters[name].trained:
            sums += checksums([tensor.to(run_dtype)])
        yield name, tensor
    expected = json.loads((folder / "manifest.json").read_text(encoding="utf-8")).get("frozen_checksum")
    if expected is not None and combined(sums) != expected:
        raise CheckpointError(
            f"the frozen weights that {folder} was trained with are not those found now (model.init_from has other "
            "contents): put the old files back"
        )
