from __future__ import annotations

import io
import json
import os
import pickle
import time
from typing import Any

import numpy as np
import pytest

from jp_train.config.schema import ClassPrompt, SourceConfig, SourceKind, Template
from jp_train.data import index as index_module
from jp_train.data import sidecar
from jp_train.data.encode import Encoder
from jp_train.data.field_map import field_map
from jp_train.data.index import index_sources, source_fingerprint
from jp_train.data.sample_fields import read_fields
from jp_train.data.samples import parse_sample
from jp_train.data.shards import ShardReader
from jp_train.errors import DataError
from jp_train.types import Kind
from tests.data.data_samples import (
    conversation,
    generation_samples,
    json_bytes,
    png,
    text_samples,
    understanding_samples,
    write_shard,
)


def only(cfg, name="s", kind="text", shards="a.tar", **options):
    cfg.data.sources = {name: SourceConfig(kind=SourceKind(kind), shards=shards, **options)}
    return cfg


def test_the_index_has_place_and_length_of_every_sample(mixed, tokenizer):
    cfg = mixed()
    encoder, reader = Encoder(cfg, tokenizer), ShardReader()
    written = {"real": generation_samples(25), "und": understanding_samples(17), "text": text_samples(21)}
    for index in index_sources(cfg, tokenizer):
        if index.name == "stored":
            continue
        assert len(index) == len(written[index.name]) and not index.bad
        for number, (key, files) in enumerate(written[index.name]):
            shard_number, entry = index.locator.locate(number)
            shard = index.shards[shard_number]
            fields = index.locator.fields
            members, tokens = sidecar.load_members(shard), sidecar.load_tokens(shard, index.locator.fingerprint)
            raw = read_fields(shard, members, int(tokens.sample[entry]), fields, cfg.data.crop, reader, index.name)
            assert raw.info.key == key and raw.fields == files
            sample = parse_sample(raw, fields, image_slots=16, codebook_size=64)
            counts = encoder.token_counts(sample)
            assert (index.tokens[number], index.short_tokens[number]) == (counts.tokens, counts.short_tokens)


def test_a_second_run_reads_the_sidecars_and_a_touched_shard_is_indexed_again(cfg, tmp_path, tokenizer, monkeypatch):
    cfg.data.root = str(tmp_path)
    path = write_shard(tmp_path / "a.tar", text_samples(4))
    built = []
    original = index_module.index_shard
    monkeypatch.setattr(index_module, "index_shard", lambda *a, **k: built.append(1) or original(*a, **k))
    first = index_sources(only(cfg), tokenizer)[0]
    assert len(built) == 1
    again = index_sources(only(cfg), tokenizer)[0]
    assert len(built) == 1
    np.testing.assert_array_equal(first.tokens, again.tokens)
    write_shard(path, text_samples(6))
    assert len(index_sources(only(cfg), tokenizer)[0]) == 6 and len(built) == 2
    os.utime(path, ns=(1, 1))
    index_sources(only(cfg), tokenizer)
    assert len(built) == 3


def test_stages_and_options_have_their_own_counts_and_do_not_overwrite_each_other(cfg, tmp_path, tokenizer):
    cfg.data.root = str(tmp_path)
    write_shard(tmp_path / "a.tar", generation_samples(3))
    only(cfg, kind="generation")
    lengths = {}
    for template in (Template.stage2, Template.stage3, Template.stage2):
        cfg.stage.template = template
        lengths.setdefault(template, []).append(index_sources(cfg, tokenizer)[0].tokens.tolist())
    assert lengths[Template.stage2][0] == lengths[Template.stage2][1] != lengths[Template.stage3][0]
    assert len(list(tmp_path.glob("*.jp-tokens-*.npz"))) == 2 and len(list(tmp_path.glob("*.jp-members.npz"))) == 1
    encoder = Encoder(cfg, tokenizer)

    def fingerprint(**settings: Any) -> str:
        return source_fingerprint(encoder, field_map(SourceConfig(kind=SourceKind.generation, **settings)))

    others = [
        {"class_prompt": ClassPrompt.first_lemma},
        {"fields": {"caption": "txt"}},
        {"fields": {"caption": "txt", "image": "png"}},
        {"filter": ["width > 1"]},
        {"filter": ["width > 2"]},
    ]
    assert len({fingerprint(), *(fingerprint(**settings) for settings in others)}) == 1 + len(others)


def test_a_damaged_sidecar_is_rebuilt_and_pickles_are_never_loaded(cfg, tmp_path, tokenizer):
    cfg.data.root = str(tmp_path)
    write_shard(tmp_path / "a.tar", text_samples(3))
    expected = index_sources(only(cfg), tokenizer)[0].tokens
    poison = io.BytesIO()
    np.savez(poison, meta=np.array([{"evil": 1}], dtype=object))
    for garbage in (b"", b"junk", poison.getvalue(), None):
        for path in tmp_path.glob("*.npz"):
            path.write_bytes(path.read_bytes()[:200] if garbage is None else garbage)
        np.testing.assert_array_equal(index_sources(only(cfg), tokenizer)[0].tokens, expected)


def _sidecar(path, **changes):
    """The sidecar again with other arrays, or (`meta=`) other meta data."""
    with np.load(path, allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    if "meta" in changes:
        meta = json.loads(bytes(held["meta"])) | changes.pop("meta")
        held["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(path, **held | changes)


HOSTILE_MEMBERS = {
    "an extension of another list": {"extension": np.array([0, 9, 0], np.int32)},
    "a negative extension": {"extension": np.array([0, -1, 0], np.int32)},
    "a negative offset": {"offset": np.array([-5, 512, 1024])},
    "bytes past the end": {"size": np.array([5, 5, 1 << 40])},
    "a sum that overflows": {"offset": np.array([512, 512, (1 << 63) - 1]), "size": np.array([1, 1, 5])},
    "fractions": {"offset": np.array([1.0, 2.0, 3.0])},
    "a start past the members": {"member_start": np.array([0, 1, 2, 300])},
    "starts that go back": {"member_start": np.array([0, 2, 1, 3])},
    "another number of keys": {"keys": np.frombuffer(b"a\0b", np.uint8)},
    "no list of extensions": {"meta": {"extensions": "txt"}},
    "extensions that are no texts": {"meta": {"extensions": [["txt"], 7]}},
    "stray files that are no pairs": {"meta": {"ignored": [["a"]]}},
}
HOSTILE_TOKENS = {
    "a negative sample": {"sample": np.array([-1, 1, 2], np.int32)},
    "a sample twice": {"sample": np.array([0, 1, 1], np.int32)},
    "another number of lengths": {"table": np.ones((4, 2), np.int32)},
    "a document of no tokens": {"table": np.zeros((4, 3), np.int32)},
    "negative lengths": {"table": np.full((4, 3), -7, np.int32)},
    "bad samples without reason": {"meta": {"bad": [["a"]]}},
    "dialogues that are no number": {"meta": {"dialogues": "many"}},
}


@pytest.mark.parametrize("which", [*HOSTILE_MEMBERS, *HOSTILE_TOKENS])
def test_a_sidecar_that_contradicts_itself_or_the_shard_is_built_again(cfg, tmp_path, tokenizer, which):
    cfg.data.root = str(tmp_path)
    write_shard(tmp_path / "a.tar", text_samples(3))
    (expected,) = index_sources(only(cfg), tokenizer)
    (members,), (tokens,) = tmp_path.glob("*.jp-members.npz"), tmp_path.glob("*.jp-tokens-*.npz")
    kept = sidecar.load_members(expected.shards[0])
    _sidecar(members)  # rewritten as it was: still good
    assert sidecar.load_members(expected.shards[0]).keys == kept.keys
    if which in HOSTILE_MEMBERS:
        _sidecar(members, **HOSTILE_MEMBERS[which])
        assert sidecar.load_members(expected.shards[0]) is None
        tokens.unlink()
    else:
        _sidecar(tokens, **HOSTILE_TOKENS[which])
        assert sidecar.load_tokens(expected.shards[0], expected.locator.fingerprint) is None
    (index,) = index_sources(only(cfg), tokenizer)
    np.testing.assert_array_equal(index.tokens, expected.tokens)
    np.testing.assert_array_equal(sidecar.load_members(index.shards[0]).offset, kept.offset)


def test_what_a_killed_writer_left_behind_is_removed_when_it_is_old_and_nothing_else_is(cfg, tmp_path, tokenizer):
    cfg.data.root = str(tmp_path)
    write_shard(tmp_path / "a.tar", text_samples(3))
    for name, age in (
        (".b.tar.jp-members.npz.7.abcd.tmp", 7200),
        (".a.tar.jp-vq-1.npy.7.abcd.tmp", 5),
        (".notes.tmp", 7200),
    ):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    index_sources(only(cfg), tokenizer)
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith(".tmp")) == [
        ".a.tar.jp-vq-1.npy.7.abcd.tmp",
        ".notes.tmp",
    ]


def test_a_read_only_shard_folder_falls_back_to_the_cache_folder(cfg, tmp_path, tokenizer, monkeypatch):
    shards, cache = tmp_path / "shards", tmp_path / "cache"
    cfg.data.root = str(shards)
    write_shard(shards / "a.tar", text_samples(3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    replacing = sidecar.replacing

    def guarded(path, **kwargs):
        if path.is_relative_to(shards):
            raise PermissionError(30, "Read-only file system")
        return replacing(path, **kwargs)

    monkeypatch.setattr(sidecar, "replacing", guarded)
    assert len(index_sources(only(cfg), tokenizer)[0]) == 3
    assert os.listdir(shards) == ["a.tar"]
    assert len(list((cache / "jp_train" / "index").rglob("*.npz"))) == 2
    monkeypatch.setattr(index_module, "index_shard", lambda *a, **k: pytest.fail("rebuilt"))
    assert len(index_sources(only(cfg), tokenizer)[0]) == 3


def test_malformed_samples_are_left_out_counted_and_named(cfg, tmp_path, tokenizer):
    cfg.data.root = str(tmp_path)
    samples = [
        ("good", {"png": png(1), "json": conversation("<image>\nq", "a")}),
        ("nojson", {"png": png(1)}),
        ("badjson", {"png": png(1), "json": b"{"}),
        ("nopicture", {"json": conversation("<image>\nq", "a")}),
        ("also", {"png": b"not decoded by the index", "json": json_bytes({"caption": "c"})}),
    ]
    write_shard(tmp_path / "a.tar", samples)
    index = index_sources(only(cfg, kind="understanding"), tokenizer)[0]
    assert len(index) == 2
    assert [(bad.info.key, bad.reason.split(":")[0]) for bad in index.bad] == [
        ("nojson", "no conversations and no caption and no text"),
        ("badjson", "malformed .json"),
        ("nopicture", "no image"),
    ]
    shard = index.shards[0]
    tokens = sidecar.load_tokens(shard, index.locator.fingerprint)
    assert tokens.sample.tolist() == [0, 4]


def test_a_source_without_a_usable_sample_is_an_error_with_reasons(cfg, tmp_path, tokenizer):
    cfg.data.root = str(tmp_path)
    write_shard(tmp_path / "a.tar", text_samples(2))
    with pytest.raises(DataError, match=r"'s'.*no usable generation sample: all 2 are bad, e.g. t0000"):
        index_sources(only(cfg, kind="generation"), tokenizer)
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="no usable text sample: the shards are empty"):
        index_sources(only(cfg, shards="empty.tar"), tokenizer)


def test_parallel_processes_build_the_same_index(mixed, tokenizer, tmp_path, monkeypatch):
    cfg = mixed()
    alone = index_sources(cfg, tokenizer)
    for path in tmp_path.glob("*.npz"):
        path.unlink()
    monkeypatch.setattr(index_module, "SMALL_BYTES", 0)
    seen = []
    together = index_sources(cfg, tokenizer, processes=2, progress=seen.append)
    for index, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(index.tokens, other.tokens)
        np.testing.assert_array_equal(index.dropped_tokens, other.dropped_tokens)
    assert [at.shards_done for at in seen] == [0, 1, 2, 3, 4, 5] and seen[-1].bytes_done == seen[-1].bytes > 0
    assert seen[-1].samples == sum(map(len, alone))
    (tmp_path / "text.tar").write_bytes(b"\xffjunk" * 500)
    with pytest.raises(DataError, match="text.tar.*corrupt"):
        index_sources(cfg, tokenizer, processes=2)


def test_dialogues_are_counted_because_they_may_not_be_cut(cfg, tmp_path, tokenizer):
    cfg.data.root = str(tmp_path)
    write_shard(tmp_path / "a.tar", [("a", {"json": conversation("q", "a")}), ("b", {"txt": b"plain"})])
    index = index_sources(only(cfg), tokenizer)[0]
    assert index.conversations == 1 and index.kind is Kind.TEXT


def test_with_index_dir_data_is_only_read_and_equal_names_do_not_clash(cfg, tmp_path, tokenizer):
    cfg.data.root, cfg.data.index_dir = str(tmp_path), str(tmp_path / "index")
    cfg.data.sources = {
        name: SourceConfig(kind=SourceKind.text, shards=f"{name}/000000.tar") for name in ("one", "two")
    }
    for name, count in (("one", 3), ("two", 5)):
        write_shard(tmp_path / name / "000000.tar", text_samples(count))
    assert [len(index) for index in index_sources(cfg, tokenizer)] == [3, 5]
    for name in ("one", "two"):
        assert os.listdir(tmp_path / name) == ["000000.tar"]
    assert len(list((tmp_path / "index").rglob("000000.tar.jp-*.npz"))) == 4
    assert [len(index) for index in index_sources(cfg, tokenizer)] == [3, 5]
    reader = ShardReader(index_dir=cfg.data.index_dir)
    assert pickle.loads(pickle.dumps(reader)).stat(str(tmp_path / "one" / "000000.tar")).index_dir == cfg.data.index_dir


def test_an_index_that_lies_beside_the_shards_is_read_with_index_dir_too(cfg, tmp_path, tokenizer, monkeypatch):
    cfg.data.root = str(tmp_path)
    write_shard(tmp_path / "a.tar", text_samples(3))
    index_sources(only(cfg), tokenizer)
    cfg.data.index_dir = str(tmp_path / "index")
    monkeypatch.setattr(index_module, "index_shard", lambda *a, **k: pytest.fail("rebuilt"))
    assert len(index_sources(only(cfg), tokenizer)[0]) == 3
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("given", ["", "index"])
def test_an_index_that_cannot_be_written_is_one_error_that_names_the_key(cfg, tmp_path, tokenizer, monkeypatch, given):
    cfg.data.root = str(tmp_path)
    cfg.data.index_dir = given and str(tmp_path / given)
    write_shard(tmp_path / "a.tar", text_samples(3))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.tar.jp-members.npz" / "taken").mkdir(parents=True)
    for place in ("cache", "index"):
        (tmp_path / place).touch()
    with pytest.raises(DataError, match=r"cannot write the index of shard \S+/a\.tar: .*data\.index_dir") as caught:
        index_sources(only(cfg), tokenizer)
    assert (str(tmp_path / "index") in str(caught.value)) == bool(given)
