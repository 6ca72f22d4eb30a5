"""Records in JSON Lines, JSON arrays and CSV: conversations, image-text pairs and text."""

from __future__ import annotations

import gzip
import json

import pytest

from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.field_map import Fields, field_map
from jp_train.data.samples import parse_variants
from jp_train.errors import DataError
from jp_train.tools.importers.documents import text_reader
from jp_train.tools.importers.files import array_items
from jp_train.tools.importers.records import Columns, record_reader
from jp_train.types import RawSample, SourceInfo
from tests.data.dialogue_forms import FORMS, PICTURES
from tests.tools.importers.import_layouts import conversations, notes_in, run, samples_in, skipped_in, turns


def test_conversations_without_an_image_have_separate_shards_with_text_out(tmp_path):
    reader = conversations(tmp_path)
    manifest = run(reader, tmp_path / "a")
    assert manifest.counts["skipped:text_only"] == 4 and len(skipped_in(tmp_path / "a")) == 4
    manifest = run(reader, tmp_path / "b", text_out=tmp_path / "text")
    assert not skipped_in(tmp_path / "b") and manifest.counts["entries"] == 13
    assert [note["conversations"] for note in notes_in(tmp_path / "b")] == [turns(n) for n in range(9)]
    assert [note["conversations"] for note in notes_in(tmp_path / "text")] == [turns(n, "") for n in range(4)]


@pytest.fixture(scope="module")
def imported_forms(tmp_path_factory) -> dict[str, str | tuple[str, dict[str, bytes]]]:
    """What an import of all FORMS makes of each: a sample's output and files, or why it is skipped."""
    folder = tmp_path_factory.mktemp("forms")
    for path, number in (("0.png", 0), ("1.png", 1), ("sub/0.png", 0), ("my pic.png", 0)):
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / path).write_bytes(PICTURES[number])
    (folder / "a.jsonl").write_text("".join(json.dumps(form.record) + "\n" for form in FORMS.values()))
    reader = record_reader("conversations", folder / "a.jsonl", folder / "images", "understanding", Columns())
    run(reader, folder / "understanding", text_out=folder / "text")
    lines = map(json.loads, (folder / "understanding" / "skipped.jsonl").read_text().splitlines())
    results = {line["name"]: line["message"] for line in lines}
    for output in ("understanding", "text"):
        results |= {json.loads(files["json"])["source_id"]: (output, files) for _, files in samples_in(folder / output)}
    return {form: results[f"a.jsonl:{number}"] for number, form in enumerate(FORMS, 1)}


@pytest.mark.parametrize("name", FORMS)
def test_a_conversation_of_this_form_is_imported_as_the_sample_that_it_is_in_place_or_refused(imported_forms, name):
    form, result = FORMS[name], imported_forms[name]
    if form.says:
        assert isinstance(result, str) and form.says in result
        return
    output, files = result
    assert output == ("understanding" if form.images else "text")
    raw = RawSample(info=SourceInfo(source="s", shard="s.tar", key="k"), fields=files)
    texts = Fields(raw, field_map(SourceConfig(kind=SourceKind(output))))
    (sample,) = parse_variants(texts, image_slots=16, codebook_size=64)
    assert tuple((turn.question, turn.answer) for turn in sample.turns) == form.turns
    assert sample.system == form.system
    assert not form.images or sample.images == PICTURES[: form.images]


def test_roles_and_contents_are_conversations_too(tmp_path):
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")
    run(text_reader(path, "file", Columns()), tmp_path / "out")
    assert notes_in(tmp_path / "out")[0]["conversations"] == [
        {"from": "user", "value": "Hello?"},
        {"from": "assistant", "value": "Hi."},
    ]


def test_several_files_are_a_single_listing_in_the_order_of_their_names(tmp_path):
    for name, numbers in (("b.jsonl", (3, 4)), ("sub/c.jsonl.gz", (5,)), ("a.jsonl", (0, 1, 2))):
        data = "".join(json.dumps({"text": f"text {n}"}) + "\n\n" for n in numbers).encode()
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    run(text_reader(tmp_path / "in", "file", Columns()), tmp_path / "out")
    assert [note["text"] for note in notes_in(tmp_path / "out")] == [f"text {n}" for n in range(6)]
    assert notes_in(tmp_path / "out")[4]["source_id"] == "b.jsonl:3", "a blank line counts as a line"


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
