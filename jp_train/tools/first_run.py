"""`jp-train init`: run.yaml, recipe.yaml and hostfile of a first run, with the keys that newcomers miss."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from jp_train.cluster.facts import device_count
from jp_train.config import RunConfig, batch_plan, load_config
from jp_train.config.choices import Crop, SourceKind
from jp_train.config.load import preset_files
from jp_train.config.schema import LanguageConfig, SourceConfig, TokenizerConfig
from jp_train.data.field_map import field_map
from jp_train.data.sample_fields import read_fields
from jp_train.data.shards import ShardReader, expand_shards, imported_in_place, scan_members
from jp_train.data.tokenizer import load_tokenizer, tokenizer_place
from jp_train.errors import CheckpointError, ConfigError, SkipSample, named
from jp_train.files import write_atomically
from jp_train.model.weight_places import export_folder, files_of, whole_model
from jp_train.tools.importers.manifest import NAME as MANIFEST
from jp_train.tools.importers.samples import check_sample
from jp_train.tools.importers.summary import quoted, recipe_lines

TOKENIZER = "a folder with a Hugging Face tokenizer, or a SentencePiece .model file"
CONFIG, RECIPE, HOSTFILE = "run.yaml", "recipe.yaml", "hostfile"
RANDOM = "random"
"""In place of a folder of weights: none."""
TINY_WEIGHTS = (
    "In a clone of jp_train `make smoke-stage1 SMOKE_ARGS=--tiny` (2 minutes) makes weights and a tokenizer for the "
    "tiny preset, runs/smoke/init; `--init-from random --tokenizer PATH` starts without any"
)
CPU_SLOTS = 2
"""Ranks of a first run without a GPU."""

RUN = """\
# every key, its value and meaning: jp-train config {config}
preset: {preset}    # model, steps, rates, mixture; `jp-train config --presets` lists all
recipe: {recipe}    # the data, in the file beside this one
run_dir: {run_dir}
{precision}tokenizer: {{path: {tokenizer}}}
model: {weights}
stage:
  training_steps: {steps}    # a trial; the preset has {preset_steps:,}. Raised later, the same run goes on
{early_stop}\
  ratio_unit: samples    # what `mixture` counts; `tokens` where texts are long: 6,000 tokens outweigh ten images
  mixture: {{{mixture}}}    # shares of the kinds of sources
"""


@dataclass(frozen=True, kw_only=True)
class FirstRun:
    """What the questions of `jp-train init` give. `data`: folders of shards, as `FOLDER` or `KIND=FOLDER`; `weights`:
    their folder, or RANDOM, which needs a `tokenizer`."""

    folder: Path
    preset: str
    stage: int
    data: list[str]
    weights: str
    tokenizer: str = ""
    steps: int = 20


def write_first_run(first: FirstRun) -> list[str]:
    """Write the files, and return the lines about them and the commands that come next.

    Raises ConfigError where a file of that name is there, no kind or several fit a folder, or the configuration would
    not load (then nothing is left); DataError and CheckpointError for missing shards or weights.
    """
    config, recipe, hostfile = (first.folder / name for name in (CONFIG, RECIPE, HOSTFILE))
    if there := [str(path) for path in (config, recipe, hostfile) if path.exists()]:
        raise ConfigError(f"{', '.join(there)} exists and is not overwritten: name another folder")
    sources = [
        {"name": Path(path).name, "kind": kind, "spec": imported_in_place(Path(path)) or path}
        for path, kind in map(source_of, first.data)
    ]
    names = [source["name"] for source in sources]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"--data: several folders are called {min(twice)}, and a source is named after its folder")
    kinds = {source["kind"] for source in sources}
    texts = {recipe: "\n".join(recipe_lines(sources)) + "\n", config: _run_text(first, kinds)}
    try:
        first.folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            write_atomically(path, text)
        slots = _slots(load_config(config))
        write_atomically(hostfile, f"localhost slots={slots}\n")
    except BaseException:
        for path in (config, recipe, hostfile):
            path.unlink(missing_ok=True)
        raise
    words = f"{shlex.quote(str(config))} --hostfile {shlex.quote(str(hostfile))}"
    written = [f"wrote {config} ({first.preset}/stage{first.stage}, {first.steps} steps), {recipe}, {hostfile}"]
    return [*written, "next:", f"  jp-train check {words}", f"  jp-train launch {words}"]


def source_of(data: str) -> tuple[str, str]:
    """(absolute folder, kind) of one --data: the kind is given, or is that of the import that wrote the folder, or the
    only one that its first sample fits. Shards that an import left in place are looked for there."""
    kind, sign, folder = data.partition("=")
    if not sign or kind not in SourceKind.__members__:
        kind, folder = "", data
    path = str(Path(folder).expanduser().absolute())
    shards = expand_shards(imported_in_place(Path(path)) or path)
    if kind:
        return path, kind
    with contextlib.suppress(OSError, ValueError, KeyError):
        options = json.loads((Path(path) / MANIFEST).read_text(encoding="utf-8"))["options"]
        return path, SourceKind(options["kind"]).value
    fits = _fitting(shards[0])
    if len(fits) != 1:
        found = f"its first sample may be {' or '.join(fits)}" if fits else "its first sample fits no kind"
        raise ConfigError(f"--data {folder}: {found}; say which: --data {fits[0] if fits else 'text'}={folder}")
    return path, fits[0]


def _fitting(path: str) -> list[str]:
    with contextlib.closing(ShardReader()) as reader:
        shard = reader.stat(path)
        members = scan_members(shard, reader)
        fits = []
        for kind in SourceKind if members.keys else ():
            fields = field_map(SourceConfig(kind=kind))
            try:
                raw = read_fields(shard, members, 0, fields, Crop.centre, reader, "", images=False)
                check_sample(members.keys[0], raw.fields, fields.kind)
            except SkipSample:
                continue
            fits.append(kind.value)
    return fits


def _run_text(first: FirstRun, kinds: set[str]) -> str:
    """run.yaml; a kind without a source has the share 0. Raises ConfigError (preset, tokenizer), CheckpointError."""
    preset = f"{first.preset}/stage{first.stage}"
    stage = yaml.safe_load(preset_files(preset)[-1].read_text(encoding="utf-8"))["stage"]
    shares = {kind: share if kind in kinds else 0 for kind, share in stage["mixture"].items()}
    if not any(shares.values()):
        used = " and ".join(kind for kind, share in stage["mixture"].items() if share)
        raise ConfigError(f"--data: {preset} trains on {used}, and no folder has one of these kinds")
    model, tokenizer = _random_start(first) if first.weights == RANDOM else _start(first)
    stops = stage.get("early_stop", {}).get("at_step", 0)
    note = f"  early_stop: {{at_step: null}}    # the preset stops at {stops:,}, which must lie within training_steps\n"
    return RUN.format(
        config=first.folder / CONFIG, preset=preset, recipe=RECIPE,
        run_dir=quoted(str(first.folder.absolute() / "run")),
        precision="" if device_count() else "precision: fp32    # without a GPU\n",
        tokenizer=quoted(str(tokenizer)), weights=model, steps=first.steps,
        preset_steps=stage["training_steps"], early_stop=note if stops else "",
        mixture=", ".join(f"{kind}: {share}" for kind, share in shares.items()),
    )  # fmt: skip


def _start(first: FirstRun) -> tuple[str, Path]:
    """(the section `model`, the tokenizer) of a start from weights."""
    weights = Path(first.weights).absolute()
    with named("--init-from"):
        try:
            files_of(whole_model(weights))
        except CheckpointError as error:
            raise CheckpointError(f"{error}. {TINY_WEIGHTS}" if first.preset == "tiny" else str(error)) from error
    model = f"{{init_from: {quoted(str(weights))}}}    # all weights: a released, exported or finished model"
    return model, _tokenizer(first.tokenizer or export_folder(weights))


def _random_start(first: FirstRun) -> tuple[str, Path]:
    """The same without weights; the embedding is made as large as the tokenizer needs it."""
    tokenizer = _tokenizer(first.tokenizer)
    model = yaml.safe_load(preset_files(f"{first.preset}/stage{first.stage}")[0].read_text(encoding="utf-8"))["model"]
    entries, rows = load_tokenizer(TokenizerConfig(path=str(tokenizer))).vocab_size, LanguageConfig().vocab_size
    larger = entries > model.get("language", {}).get("vocab_size", rows)
    size = f", language: {{vocab_size: {entries}}}" if larger else ""
    return f"{{init: random{size}}}    # untrained: shows that data and settings work, learns little", tokenizer


def _tokenizer(path: str | Path) -> Path:
    place = Path(path).absolute()
    with named("--tokenizer"):
        tokenizer_place(TokenizerConfig(path=str(place)))
    return place


def _slots(config: RunConfig) -> int:
    """Ranks on this host that the rows of a step divide among: one a GPU, at most CPU_SLOTS without one."""
    for slots in range(device_count() or min(CPU_SLOTS, len(os.sched_getaffinity(0))), 1, -1):
        with contextlib.suppress(ConfigError):
            batch_plan(config, slots)
            return slots
    return 1
