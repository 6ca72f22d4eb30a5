"""`jp-train data explain`: which documents an optimizer step was made of, and its micro-batches as files.

The rows come from `tools/explain/replay.py`; this module adds what a run folder holds: its configuration, the commit
that trained it, and the counts of the step in metrics.jsonl, with which the replay is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from jp_train.config import RunConfig, load_config, load_stored_config
from jp_train.data.batch_file import describe_batch, save_batch
from jp_train.data.loader import rows_hash
from jp_train.data.vq_ids import IdsRecipe
from jp_train.engine.checkpoint.identity import git_commit
from jp_train.engine.metrics import row_digest
from jp_train.engine.vq_recipe import ids_recipe
from jp_train.errors import CheckpointError, ConfigError, DataError
from jp_train.files import read_json_lines
from jp_train.tools.explain.replay import Replay
from jp_train.tools.explain.table import format_row, format_rows, totals


def open_replay(
    config: Path | None, overrides: Sequence[str], run_dir: Path | None, *, progress: TextIO | None = None
) -> Replay:
    """The replay of a configuration, or of a run folder's own `config.yaml` where none is given, helped by the run's
    plan states.

    Its `notes` say when the code changed since the run. Raises ConfigError when neither is given or the run folder has
    no configuration.
    """
    if config is None:
        if run_dir is None:
            raise ConfigError("name a configuration (a YAML of launch/) or a run folder with --run RUN_DIR")
        config = run_dir / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"{run_dir} is no run folder: it has no config.yaml; expected the run_dir of a training")
        cfg = load_stored_config(config, overrides)
    elif run_dir is not None and not run_dir.is_dir():
        raise ConfigError(f"--run {run_dir}: no such folder; expected the run_dir of a training")
    else:
        cfg = load_config(config, overrides)
    recipe, note = _recipe(cfg)
    replay = Replay(cfg, run_dir, recipe=recipe, progress=progress)
    replay.notes += [note] if note else []
    if run_dir is not None:
        replay.notes += _code_notes(run_dir)
    return replay


def _recipe(cfg: RunConfig) -> tuple[IdsRecipe | None, str | None]:
    """What stored VQ ids must have been made with; where the VQ's weights cannot be read, None and a note on what
    differs then."""
    try:
        return ids_recipe(cfg), None
    except (CheckpointError, ConfigError) as error:
        return None, (
            f"the VQ's weights cannot be read ({error}): VQ ids stored beside the shards are left aside, "
            "and the images themselves are in their place. Documents, "
            "spans and losses are as trained"
        )


def explain_step(
    replay: Replay,
    step: int,
    *,
    row: int | None = None,
    rank: int | None = None,
    world: int = 1,
    save: Path | None = None,
) -> dict[str, Any]:
    """The rows of an optimizer step, described (`data/batch_file.py` has the format), with their sum, all
    JSON-able.

    `row`: only this one; `rank` of `world`: only those of this data-parallel rank; else all of the step. `save`: a
    .safetensors file for the micro-batch that was trained; where the rows are of several, each gets its own file, named
    with its rows. Raises ConfigError for a step, row or rank that does not exist; DataError for unreadable data.
    """
    numbers = _rows_to_explain(replay, row, rank, world)
    if save is not None and save.suffix != ".safetensors":
        raise ConfigError(f"--save {save}: give a file name that ends with .safetensors")
    several = len({number // replay.micro_batch_rows for number in numbers}) > 1
    described: list[dict[str, Any]] = []
    provenance = []
    saved = []
    for micro in replay.micro_batches(step, numbers):
        rows = describe_batch(micro.batch, replay.tokenizer, first_row=micro.first_row, specs=micro.specs)
        described += [entry for entry in rows if entry["row"] in numbers]
        provenance += [
            documents for number, documents in enumerate(micro.batch.provenance, micro.first_row) if number in numbers
        ]
        if save is not None:
            last = micro.first_row + micro.batch.rows - 1
            name = f"{save.stem}_rows_{micro.first_row:04d}-{last:04d}{save.suffix}" if several else save.name
            saved.append(str(save_batch(micro.batch, save.with_name(name))))
    return {
        "step": step,
        "plan_step": step - 1,
        "rows_per_step": replay.rows_per_step,
        "micro_batch_rows": replay.micro_batch_rows,
        "rows": described,
        "totals": totals(described),
        "rows_hash": rows_hash(provenance),
        "rows_digest": sum(map(row_digest, provenance)) % 2**32,
        "saved": saved,
        "notes": list(replay.notes),
    }


def compare_with_metrics(explained: dict[str, Any], run_dir: Path) -> str | None:
    """One line that says whether a whole explained step has the rows, tokens and skipped documents that the run's
    metrics.jsonl has for it.

    None when the run has no such step yet, or only a part of the step was explained. Raises DataError when they differ:
    then what was explained is not what was trained.
    """
    if len(explained["rows"]) < explained["rows_per_step"]:
        return None
    line = _metrics_line(run_dir / "metrics.jsonl", explained["step"])
    if line is None:
        return None
    totals = explained["totals"]
    checks = {
        "data/rows_digest": explained["rows_digest"],
        "tokens/total": totals["tokens"],
        "data/skipped": totals["skipped"],
    }
    differ = [
        f"{key} is {int(line[key])} there, {mine} as rebuilt"
        for key, mine in checks.items()
        if key in line and int(line[key]) != mine
    ]
    if differ:
        raise DataError(
            f"step {explained['step']} was not rebuilt as it was trained, {run_dir}/metrics.jsonl has other rows: "
            f"{'; '.join(differ)}. The data, the tokenizer or the "
            "code changed since; use those of the run"
        )
    return (
        f"metrics.jsonl of the run agrees: {', '.join(f'{key} {mine}' for key, mine in checks.items() if key in line)}"
    )


def format_explained(explained: dict[str, Any]) -> str:
    """What `explain_step` returned, as text: tables of documents for up to two rows, else a line a row."""
    lines = [
        f"step {explained['step']:,} (as in metrics.jsonl and wandb; plan step {explained['plan_step']:,}), "
        f"{explained['rows_per_step']} rows in micro-batches of "
        f"{explained['micro_batch_rows']}"
    ]
    rows = explained["rows"]
    if len(rows) <= 2:
        lines += [format_row(row, explained["rows_per_step"]) for row in rows]
    else:
        lines += [format_rows(rows, explained["totals"]), "--row R lists the documents of a row"]
    lines.append(f"rows hash {explained['rows_hash']}")
    lines += [f"saved {path}" for path in explained["saved"]]
    return "\n".join(lines)


def _rows_to_explain(replay: Replay, row: int | None, rank: int | None, world: int) -> range:
    if row is not None:
        if not 0 <= row < replay.rows_per_step:
            raise ConfigError(
                f"--row {row}: a step has {replay.rows_per_step} rows, numbered from 0 to {replay.rows_per_step - 1}"
            )
        return range(row, row + 1)
    if rank is not None:
        return replay.rows_of_rank(rank, world)
    return range(replay.rows_per_step)


def _code_notes(run_dir: Path) -> list[str]:
    """A note when the run's last attempt was made by other code than this."""
    commit = None
    for line in _json_lines(run_dir / "events.jsonl"):
        if line.get("event") in ("start", "resume") and line.get("git_commit"):
            commit = str(line["git_commit"])
    here = git_commit()
    if commit is None or here is None or commit == here:
        return []
    return [
        f"the code changed since the run: it was trained by {_short(commit)}, this is {_short(here)}. "
        "Rows stay the same unless the data layer changed; "
        "when it did, check out the run's commit"
    ]


def _short(commit: str) -> str:
    number, dirty, _ = commit.partition("-dirty")
    return number[:12] + dirty


def _metrics_line(path: Path, step: int) -> dict[str, Any] | None:
    last = None
    for line in _json_lines(path):
        if line.get("step") == step and "tokens/total" in line:
            last = line
    return last


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace") as file:
            yield from filter(None, read_json_lines(file))
