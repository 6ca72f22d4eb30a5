"""Every layout becomes the samples it means, and those go through index and loader."""

from __future__ import annotations

import gzip
import itertools
import json

import pytest
import yaml

from jp_train.config.batch import batch_plan
from jp_train.config.schema import BatchUnit, ClassPrompt, MixtureConfig, SourceConfig, SourceKind
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan
from jp_train.errors import ConfigError, DataError
from jp_train.tools.importers import readers
from jp_train.tools.importers.command import import_command
from jp_train.tools.importers.files import array_items
from jp_train.tools.importers.readers import Columns
from jp_train.tools.importers.run import ImportSettings
from jp_train.types import Kind
from tests.tools.importers.import_layouts import (
    coco,
    conversations,
    dialogue,
    dump,
    image_folder,
    image_name,
    imagenet,
    notes_in,
    pairs_csv,
    pairs_jsonl,
    parquet,
    picture,
    run,
    samples_in,
    skipped_in,
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
    batches = [one for step in steps for one in step.micro_batches]
    assert not any(one.skipped for one in batches)
    read = {document.key for one in batches for row in one.provenance for document in row}
    assert read == {key for key, _ in samples_in(tmp_path / "out")}, "12 steps see every sample"


def test_pictures_are_copied_byte_for_byte_and_named_by_what_they_are(tmp_path):
    folder = image_folder(tmp_path / "images", 6)
    (folder / "misnamed.txt").write_bytes(picture(9, "WEBP"))
    names = [*map(image_name, range(6)), "misnamed.txt"]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"image": name, "caption": "c"}) for name in names))
    run(readers.record_reader("pairs", path, folder, "generation", Columns()), tmp_path / "out")
    found = samples_in(tmp_path / "out")
    assert [sorted(fields) for _, fields in found] == [
        sorted([e, "json"]) for e in ("jpg", "png", "webp", "jpg", "png", "webp", "webp")
    ]
    for name, (_, fields) in zip(names, found, strict=True):
        assert next(data for extension, data in fields.items() if extension != "json") == (folder / name).read_bytes()


def test_imagenet_takes_kaggles_names_a_file_or_the_folders(tmp_path):
    run(imagenet(tmp_path), tmp_path / "a")
    assert [note["caption"] for note in notes_in(tmp_path / "a")] == [
        f"name {n}, other name" for n in range(3) for _ in range(3)
    ]
    assert samples_in(tmp_path / "a")[4][0] == "000000004-n00000001-n00000001_4"
    assert notes_in(tmp_path / "a")[4]["source_id"] == "n00000001/n00000001_4.JPEG"
    torchvision = dump(tmp_path / "index.json", {str(n): [f"n0000000{n}", f"great_shark_{n}"] for n in range(3)})
    run(readers.ImageNetReader(source=tmp_path / "train", class_names=torchvision), tmp_path / "b")
    assert {note["caption"] for note in notes_in(tmp_path / "b")} == {f"great shark {n}" for n in range(3)}
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(ConfigError, match=r"WordNet numbers \(n00000000\).*--class-names"):
        run(readers.ImageNetReader(source=tmp_path / "train"), tmp_path / "c")
    for number in range(3):
        (tmp_path / "train" / f"n0000000{number}").rename(tmp_path / "train" / f"red_fox_{number}")
    run(readers.ImageNetReader(source=tmp_path / "train"), tmp_path / "c")
    assert {note["caption"] for note in notes_in(tmp_path / "c")} == {f"red fox {n}" for n in range(3)}
    with pytest.raises(ConfigError, match="names no class for 3 of the 3 folders.*red_fox_0"):
        run(readers.ImageNetReader(source=tmp_path / "train", class_names=torchvision), tmp_path / "d")


def test_coco_gives_a_sample_for_every_caption_or_for_every_image(tmp_path):
    run(coco(tmp_path, 3), tmp_path / "captions")
    assert [note["caption"] for note in notes_in(tmp_path / "captions")] == [
        f"Caption {n}. More." for n in (0, 3, 1, 4, 2, 5)
    ]
    run(coco(tmp_path, 3, per="image"), tmp_path / "images-only")
    assert [note["caption"] for note in notes_in(tmp_path / "images-only")] == [f"Caption {n}. More." for n in range(3)]
    assert notes_in(tmp_path / "images-only")[1]["source_id"] == "captions.json image 101 annotation 1"


def test_dialogues_without_a_picture_have_shards_of_their_own_when_asked_for(tmp_path):
    reader = conversations(tmp_path)
    manifest = run(reader, tmp_path / "a")
    assert manifest.counts["skipped:text_only"] == 4 and len(skipped_in(tmp_path / "a")) == 4
    manifest = run(reader, tmp_path / "b", text_out=tmp_path / "text")
    assert not skipped_in(tmp_path / "b") and manifest.counts["entries"] == 13
    assert [note["conversations"] for note in notes_in(tmp_path / "b")] == [dialogue(n) for n in range(9)]
    assert [note["conversations"] for note in notes_in(tmp_path / "text")] == [dialogue(n, "") for n in range(4)]


def test_roles_and_contents_are_dialogues_too(tmp_path):
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    run(readers.text_reader(path, "file", Columns()), tmp_path / "out")
    assert notes_in(tmp_path / "out")[0]["conversations"] == [
        {"from": "user", "value": "Hello?"},
        {"from": "assistant", "value": "Hi."},
    ]


def test_plain_text_is_cut_into_files_paragraphs_or_lines(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufeffOne line.\nTwo.\n\n\n  \nThree.\n" + "long " * 300, encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress("Four é.\n".encode()))
    texts = {}
    for document in ("file", "paragraph", "line"):
        run(readers.text_reader(folder, document, Columns()), tmp_path / document)
        texts[document] = [note["text"] for note in notes_in(tmp_path / document)]
    long = ("long " * 300).strip()
    assert texts["file"] == [f"One line.\nTwo.\n\n\n  \nThree.\n{long}", "Four é."]
    assert texts["paragraph"] == ["One line.\nTwo.", f"Three.\n{long}", "Four é."]
    assert texts["line"] == ["One line.", "Two.", "Three.", long, "Four é."]
    assert [note["source_id"] for note in notes_in(tmp_path / "paragraph")] == ["a.txt:1", "a.txt:6", "b.txt.gz:1"]


def test_several_files_are_one_listing_in_the_order_of_their_names(tmp_path):
    for name, numbers in (("b.jsonl", (3, 4)), ("sub/c.jsonl.gz", (5,)), ("a.jsonl", (0, 1, 2))):
        data = "".join(json.dumps({"text": f"text {n}"}) + "\n\n" for n in numbers).encode()
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    run(readers.text_reader(tmp_path / "in", "file", Columns()), tmp_path / "out")
    assert [note["text"] for note in notes_in(tmp_path / "out")] == [f"text {n}" for n in range(6)]
    assert notes_in(tmp_path / "out")[4]["source_id"] == "b.jsonl:3", "a blank line counts as a line"


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "*/*/*.jsonl", "."])
def test_records_are_known_as_records_however_a_glob_finds_them(tmp_path, pattern):
    text_jsonl(tmp_path / "in" / "a" / "b")
    run(readers.text_reader(tmp_path / "in" / pattern, "file", Columns()), tmp_path / "out")
    assert len(samples_in(tmp_path / "out")) == 9


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_an_array_is_read_as_a_stream_like_json_reads_it(tmp_path, monkeypatch, block):
    items = [{"a": [1, "],["]}, {"b": '\\"é[]{}'}, -12.5e3, 123456, "x,y", None, [[]], {}, True]
    monkeypatch.setattr("jp_train.tools.importers.files._BUFFER", block)
    for indent in (None, 2):
        path = tmp_path / "a.json"
        path.write_text("\ufeff \n" + json.dumps(items, indent=indent, ensure_ascii=False) + "\n ", encoding="utf-8")
        assert [json.loads(item) for item, _ in array_items(path)] == items
    for broken, says in (
        ('[{"a": 1}, {"b"', "item 2"),
        ('[{"a": 1} {"b": 2}]', "after item 1"),
        ("[1, 2] 3", "goes on"),
        ('[{"a": 1}, ', "item 2"),
        ("{}", "no JSON array"),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=says):
            list(array_items(path))
    path.write_text("[]")
    assert list(array_items(path)) == []


def test_parquet_of_text_and_of_dialogues(tmp_path):
    import pyarrow
    from pyarrow import parquet as files

    (tmp_path / "t").mkdir()
    files.write_table(
        pyarrow.table({"body": [f"text {n}" for n in range(5)]}), tmp_path / "t" / "a.parquet", row_group_size=2
    )
    run(
        readers.ParquetReader(source=tmp_path / "t", images=None, kind=Kind.TEXT, columns=Columns(text="body")),
        tmp_path / "out",
    )
    assert [note["text"] for note in notes_in(tmp_path / "out")] == [f"text {n}" for n in range(5)]
    assert [note["source_id"] for note in notes_in(tmp_path / "out")] == [f"a.parquet:{n}" for n in range(1, 6)]
    rows = {
        "image": [{"bytes": picture(n), "path": None} for n in range(3)],
        "conversations": [dialogue(n) for n in range(3)],
    }
    files.write_table(pyarrow.table(rows), tmp_path / "d.parquet")
    run(readers.ParquetReader(source=tmp_path / "d.parquet", images=None, kind=Kind.UNDERSTANDING), tmp_path / "und")
    assert [note["conversations"] for note in notes_in(tmp_path / "und")] == [dialogue(n) for n in range(3)]
    with pytest.raises(ConfigError, match="no column 'text'; it has body.*--text-column"):
        run(readers.ParquetReader(source=tmp_path / "t", images=None, kind=Kind.TEXT), tmp_path / "none")


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    reader = parquet(tmp_path / "in")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'jp_train\[parquet\]'"):
        run(reader, tmp_path / "out")


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path):
    reader = conversations(tmp_path / "in")
    (tmp_path / "in" / "images" / image_name(0)).unlink()
    summary, text = import_command(reader, ImportSettings(out=tmp_path / "out"), dry_run=True)
    assert (summary["entries"], summary["samples"], summary["text_only"]) == (13, 9, 4)
    assert summary["pictures_bad"] == 1 and "000.jpg" in text and "--text-out" in text
    assert not (tmp_path / "out").exists()
    summary, _ = import_command(
        parquet(tmp_path / "p"), ImportSettings(out=tmp_path / "out", shard_samples=2), dry_run=True
    )
    assert (summary["samples"], summary["estimated_shards"]) == (9, 5) and not (tmp_path / "out").exists()


def test_the_size_a_dry_run_estimates_is_that_of_the_import(tmp_path):
    reader = pairs_jsonl(tmp_path / "in", 60)
    for path in (tmp_path / "in" / "images").iterdir():
        path.write_bytes(path.read_bytes() + bytes(200_000))  # what follows a picture's end is copied too
    summary, _ = import_command(reader, ImportSettings(out=tmp_path / "out", shard_mib=2), dry_run=True)
    manifest = run(reader, tmp_path / "out", shard_mib=2)
    assert summary["estimated_mib"] == pytest.approx(manifest.outputs["shards"].size / 2**20, rel=0.05)
    assert (
        summary["estimated_shards"] == pytest.approx(len(manifest.outputs["shards"].shards), abs=1)
        and summary["estimated_shards"] > 4
    )
