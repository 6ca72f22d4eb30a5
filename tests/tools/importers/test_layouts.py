"""Every layout becomes the samples it means, and those go through index and loader."""

from __future__ import annotations

import itertools
import json

import pytest
import yaml

from jp_train.config.batch import batch_plan
from jp_train.config.schema import BatchUnit, ClassPrompt, MixtureConfig, SourceConfig, SourceKind
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan
from jp_train.tools.importers.command import import_command
from jp_train.tools.importers.records import Columns, record_reader
from jp_train.tools.importers.run import ImportSettings
from jp_train.types import Kind
from tests.tools.importers.import_layouts import (
    coco,
    conversations,
    image_folder,
    image_name,
    imagenet,
    pairs_csv,
    pairs_jsonl,
    parquet,
    picture,
    run,
    samples_in,
    text_jsonl,
)


def parquet_binary(tmp, kind="generation"):
    return parquet(tmp, kind=kind, image=lambda n: picture(n))


LAYOUTS = {
    "imagenet": (imagenet, "generation"),
    "coco generation": (coco, "generation"),
    "coco understanding": (lambda tmp: coco(tmp, kind=Kind.UNDERSTANDING), "understanding"),
    "conversations": (conversations, "understanding"),
    "pairs csv": (pairs_csv, "generation"),
    "pairs csv questions": (lambda tmp: pairs_csv(tmp, kind="understanding", question="ask"), "understanding"),
    "pairs jsonl": (pairs_jsonl, "generation"),
    "text jsonl": (text_jsonl, "text"),
    "parquet": (parquet, "generation"),
    "parquet binary": (parquet_binary, "generation"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_imported_source_goes_through_recipe_index_and_loader_whole(layout, cfg, tokenizer, tmp_path):
    make, kind = LAYOUTS[layout]
    summary, text = import_command(make(tmp_path / "source"), ImportSettings(out=tmp_path / "out", shard_samples=4))
    recipe = yaml.safe_load(summary["recipe"])["data"]["sources"]["out"]
    assert summary["recipe"] in text and recipe["kind"] == kind
    prompt = ClassPrompt(recipe.get("class_prompt", "as_is"))
    cfg.data.sources = {"out": SourceConfig(**{**recipe, "kind": SourceKind(recipe["kind"]), "class_prompt": prompt})}
    (index,) = index_sources(cfg, tokenizer)
    assert not index.bad and len(index) == summary["samples"] == len(samples_in(tmp_path / "out"))
    cfg.stage.mixture = MixtureConfig(**{name: int(name == kind) for name in ("understanding", "text", "generation")})
    cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, 2
    batch = batch_plan(cfg, 1)
    with StepLoader(
        cfg,
        build_plan(cfg, [index], batch, tokenizer),
        [index],
        tokenizer,
        dp_rank=0,
        dp_world_size=1,
        batch_plan=batch,
    ) as loader:
        steps = list(itertools.islice(loader, 12))
    batches = [part for step in steps for part in step.micro_batches]
    assert not any(part.skipped for part in batches)
    read = {document.key for part in batches for row in part.provenance for document in row}
    assert read == {key for key, _ in samples_in(tmp_path / "out")}, "12 steps see every sample"


def test_images_are_copied_byte_for_byte_and_named_by_what_they_are(tmp_path):
    folder = image_folder(tmp_path / "images", 6)
    (folder / "misnamed.txt").write_bytes(picture(9, "WEBP"))
    names = [*map(image_name, range(6)), "misnamed.txt"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"image": name, "caption": "c"}) for name in names))
    run(record_reader("pairs", path, folder, "generation", Columns()), tmp_path / "out")
    samples = samples_in(tmp_path / "out")
    assert [sorted(fields) for _, fields in samples] == [
        sorted([e, "json"]) for e in ("jpg", "png", "webp", "jpg", "png", "webp", "webp")
    ]
    for name, (_, fields) in zip(names, samples, strict=True):
        assert next(data for extension, data in fields.items() if extension != "json") == (folder / name).read_bytes()


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path):
    reader = conversations(tmp_path / "in")
    (tmp_path / "in" / "images" / image_name(0)).unlink()
    summary, text = import_command(reader, ImportSettings(out=tmp_path / "out"), dry_run=True)
    assert (summary["entries"], summary["samples"], summary["text_only"]) == (13, 9, 4)
    assert (summary["read"], summary["rejected"], summary["estimated_samples"]) == (9, {"image_missing": 1}, 8)
    assert "000.jpg" in text and "--text-out" in text
    assert not (tmp_path / "out").exists()
    summary, _ = import_command(
        parquet(tmp_path / "p"), ImportSettings(out=tmp_path / "out", shard_samples=2), dry_run=True
    )
    assert (summary["samples"], summary["estimated_shards"]) == (9, 5) and not (tmp_path / "out").exists()


def test_the_size_a_dry_run_estimates_is_that_of_the_import(tmp_path):
    reader = pairs_jsonl(tmp_path / "in", 60)
    for path in (tmp_path / "in" / "images").iterdir():
        path.write_bytes(path.read_bytes() + bytes(200_000))  # what follows an image's end is copied too
    summary, _ = import_command(reader, ImportSettings(out=tmp_path / "out", shard_mib=2), dry_run=True)
    manifest = run(reader, tmp_path / "out", shard_mib=2)
    assert summary["estimated_mib"] == pytest.approx(manifest.outputs["shards"].size / 2**20, rel=0.05)
    assert (
        summary["estimated_shards"] == pytest.approx(len(manifest.outputs["shards"].shards), abs=1)
        and summary["estimated_shards"] > 4
    )
