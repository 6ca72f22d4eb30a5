"""Where the files of weights lie: looked for without opening one, so that `jp-train launch` can do it without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jp_train.errors import CheckpointError, absent
from jp_train.files import stand_in_at

INDEX_FILE = "partitions.json"
"""What a training checkpoint has (partition_files.py)."""
SHOWN = 6
"""Names listed in an error message."""


def export_folder(path: str | Path) -> Path:
    """Of a run folder its ``export/``; any other path as it is."""
    path = Path(path)
    return path / "export" if not (path / "config.json").exists() and (path / "export").is_dir() else path


def whole_model(path: str | Path) -> Path:
    """The folder or file of a whole model that `path` leads to: of a run folder its ``export/``. Raises CheckpointError
    for a run folder without one."""
    path = Path(path)
    if (path / INDEX_FILE).is_file():
        return path
    path = export_folder(path)
    if (path / "events.jsonl").is_file() and not any(path.glob("checkpoints/step_*")):
        raise CheckpointError(
            f"{path} is a run folder without weights: the run has saved no checkpoint (`jp-train status {path}` says "
            "why). Start it again, or name another run or an exported folder"
        )
    if (path / "checkpoints").is_dir():
        raise CheckpointError(
            f"{path} is a run folder without export/: its stage has not ended, or checkpoint.export_at_end was off. "
            f"Name one of its checkpoints ({path}/checkpoints/step_...), or write an export of it with "
            f"`jp-train export {path}/checkpoints/STEP {path}/export`"
        )
    return path


def files_of(path: str | Path) -> list[Path]:
    """The files of weights at `path`: itself, or those of the folder. Raises CheckpointError when there is nothing,
    nothing known, a LoRA adapter, or only a part of what an index lists."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise absent(
            CheckpointError,
            path,
            "give a folder with safetensors, a run folder or checkpoint, or a .safetensors, .pt or .bin file",
        )
    for ending in ("safetensors", "bin"):
        index = next(iter(sorted(path.glob(f"*.{ending}.index.json"))), None)
        if index is not None:
            files = [path / name for name in _indexed_files(index)]
            gone = [file.name for file in files if not file.exists()]
            if gone:
                raise CheckpointError(
                    f"{index} lists {len(files)} files but {', '.join(gone)} missing: the copy is incomplete"
                )
        else:
            files = sorted(path.glob(f"*.{ending}"))
        if files:
            if all(file.name.startswith("adapter_model") for file in files):
                raise CheckpointError(
                    f"{path} holds a LoRA adapter ({files[0].name}), not a model: merge it into its base model first "
                    "(peft: model.merge_and_unload().save_pretrained(FOLDER)) and name that folder"
                )
            return files
    runs = sorted(folder.parent for folder in path.glob("*/export"))
    hint = f"; did you mean {runs[-1]}?" if runs else ""
    raise CheckpointError(f"{path} holds no *.safetensors and no *.bin file{hint}")


def _indexed_files(index: Path) -> list[str]:
    """The names of the files that a `*.index.json` lists. Raises CheckpointError when it is no such index."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        what = stand_in_at(index) or f"is no whole JSON file: {error}; copy or download it again"
        raise CheckpointError(f"{index} {what}") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        what = stand_in_at(index) or 'has no "weight_map" from tensors to files; copy or download it again'
        raise CheckpointError(f"{index} {what}")
    return sorted(set(names.values()))


def some(names: Sequence[str]) -> str:
    """The first SHOWN names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
