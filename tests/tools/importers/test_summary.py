"""What an import says at its end: recipe lines that load, shards that expand, reasons with safe examples."""

from __future__ import annotations

import json

import pytest
import yaml

from jp_train.data.shards import expand_shards
from jp_train.data.writer import WrittenShard
from jp_train.tools.importers.manifest import OutputState
from jp_train.tools.importers.summary import recipe_lines, shard_spec, skipped_examples, skipped_lines


@pytest.mark.parametrize("name", ["llava", "on", "7", "two words", "größe: {a}", "a'b\"c", "a/b.c-d"])
def test_recipe_lines_load_as_the_sources_they_describe(name):
    sources = [
        {"name": name, "kind": "generation", "spec": "/data/a b/{000000..000002}.tar", "class_prompt": "first_lemma"},
        {"name": "text", "kind": "text", "spec": "/data/text/000000.tar"},
    ]
    loaded = yaml.safe_load("\n".join(recipe_lines(sources)))["data"]["sources"]
    assert list(loaded) == [name, "text"]
    assert loaded[name] == {
        "kind": "generation",
        "shards": "/data/a b/{000000..000002}.tar",
        "class_prompt": "first_lemma",
        "license": "",
    }
    assert loaded["text"] == {"kind": "text", "shards": "/data/text/000000.tar", "license": ""}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("folder", ["plain", "with {braces}", "back\\slash"])
def test_the_spec_of_an_output_expands_to_its_shards(tmp_path, folder, count):
    (tmp_path / folder).mkdir()
    names = [f"{number:06d}.tar" for number in range(count)]
    for name in names:
        (tmp_path / folder / name).touch()
    shards = [WrittenShard(name=name, size=0, samples=1, sha256="") for name in names]
    spec = shard_spec(OutputState(folder=str(tmp_path / folder), shards=shards))
    assert expand_shards(spec) == [str(tmp_path / folder / name) for name in names]


def test_reasons_come_by_their_counts_with_two_examples_that_steer_no_terminal(tmp_path):
    path = tmp_path / "skipped.jsonl"
    lines = [{"name": f"a.jsonl:{n}", "reason": "no_image", "message": "\x1b[2Jempty"} for n in range(3)]
    lines.append({"name": "b", "reason": "empty_text", "message": "nothing"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "torn')
    examples = skipped_examples(path)
    assert examples == {
        "no_image": ["a.jsonl:0: \x1b[2Jempty", "a.jsonl:1: \x1b[2Jempty"],
        "empty_text": ["b: nothing"],
    }
    text = skipped_lines({"empty_text": 1, "no_image": 3}, examples)
    assert [line.split()[0] for line in text] == ["3", "e.g.", "e.g.", "1", "e.g."]
    assert "an entry without an image" in text[0] and "the training loader would reject the sample" in text[3]
    assert "\x1b" not in "".join(text) and "\\x1b[2Jempty" in text[1]
    assert skipped_examples(tmp_path / "none") == {}
