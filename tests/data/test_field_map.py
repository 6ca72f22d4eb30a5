"""Field maps against shards as img2dataset, LAION and webdataset write them; filters; one of several captions an
epoch."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from jp_train.config import batch_plan
from jp_train.config.choices import Template
from jp_train.config.schema import RunConfig, SourceConfig, SourceKind
from jp_train.data.encode import Encoder
from jp_train.data.field_map import Fields, field_map
from jp_train.data.index import index_sources
from jp_train.data.loader import build_plan
from jp_train.data.permute import document_uniform
from jp_train.data.rows import RowBuilder
from jp_train.data.samples import parse_variants
from jp_train.errors import DataError, SkipSample
from jp_train.types import RawSample, SourceInfo
from tests.data.data_samples import json_bytes, png, write_shard

INFO = SourceInfo(source="s", shard="s.tar", key="k")


def captions(files: dict[str, bytes], kind: str = "generation", **settings: Any) -> list[str]:
    """What a sample of these files is made of; understanding: the answers."""
    fields = field_map(SourceConfig(kind=SourceKind(kind), **settings))
    samples = parse_variants(Fields(RawSample(info=INFO, fields=files), fields), image_slots=16, codebook_size=64)
    if kind == "understanding":
        return [" | ".join(f"{turn.question}>{turn.answer}" for turn in sample.turns) for sample in samples]
    return [sample.text if kind == "text" else sample.caption for sample in samples]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"jpg": b"", "txt": b" A cat.\n"}, ["A cat."]),
        ({"jpg": b"", "txt": b"A cat.", "json": json_bytes({"width": 3, "url": "u"})}, ["A cat."]),
        ({"jpg": b"", "txt": b"text", "json": json_bytes({"caption": "json"})}, ["json"]),
        ({"jpg": b"", "txt": b"text", "json": json_bytes({"caption": None})}, ["text"]),
        ({"jpg": b"", "json": json_bytes({"TEXT": "A cat.", "URL": "u"})}, ["A cat."]),
        ({"jpg": b"", "json": json_bytes({"caption": ["a", "b"]})}, ["a", "b"]),
        ({"jfif": b"", "json": b"\xef\xbb\xbf" + json_bytes({"captions": ["a", "b", None]})}, ["a", "b"]),
    ],
)
def test_the_usual_names_of_captions_are_found_by_themselves(files, expected):
    assert captions(files) == expected
    assert captions(files, "understanding") == [f">{caption}" for caption in expected]


def test_a_field_map_takes_what_it_names_and_nothing_else():
    files = {
        "jpg": b"",
        "seg.png": b"",
        "txt": b"alt",
        "json": json_bytes({"caption": "c", "blip": {"texts": [{"t": "one"}, {"t": "two"}]}, "q": "What?", "a": "A."}),
    }
    assert captions(files, fields={"caption": "txt"}) == ["alt"]
    assert captions(files, fields={"caption": "json:blip.texts[1].t"}) == ["two"]
    assert captions(files, fields={"caption": "json:blip.texts[*].t"}) == ["one", "two"]
    assert captions(files, fields={"caption": "json:nothing;txt"}) == ["alt"]
    assert captions(files, "understanding", fields={"question": "json:q", "answer": "json:a"}) == ["What?>A."]
    with pytest.raises(SkipSample, match=r'no caption: looked for "nothing" of \.json; found .*with "caption"'):
        captions(files, fields={"caption": "json:nothing"})
    with pytest.raises(SkipSample, match='"blip" of .json is a dict, expected text'):
        captions(files, fields={"caption": "json:blip"})
    texts = {name: data for name, data in files.items() if name in ("txt", "json")}
    assert captions(texts, "text", fields={"text": "txt"}) == ["alt"]
    with pytest.raises(SkipSample, match="a question has <image>, and there is nothing that it stands for"):
        captions(
            {"json": json_bytes({"q": "<image>?", "a": "A."})},
            "text",
            fields={"question": "json:q", "answer": "json:a"},
        )
    only = field_map(SourceConfig(kind=SourceKind.generation, fields={"image": "seg.png", "caption": "txt"}))
    assert only.needed(list(files)) == ["txt", "seg.png"]


def test_the_fingerprint_of_a_map_with_one_image_is_that_of_the_first_release():
    def fingerprint(**settings) -> str:
        return field_map(SourceConfig(kind=SourceKind.generation, **settings)).fingerprint

    assert fingerprint() == ""
    assert (
        fingerprint(fields={"caption": "txt", "image": "jpg;png"}) == '[{"caption": [".txt"]}, ["jpg", "png"], [], []]'
    )
    usual = '["jpg", "jpeg", "png", "webp", "jfif", "jpe", "avif"]'
    assert fingerprint(fields={"caption": "txt"}) == f'[{{"caption": [".txt"]}}, {usual}, [], []]'


def test_class_numbers_become_the_names_of_a_list(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("tench, Tinca tinca\ngoldfish\n")
    settings = {"fields": {"caption": "cls"}, "class_names": str(names)}
    assert captions({"jpg": b"", "cls": b"1\n"}, **settings) == ["goldfish"]
    with pytest.raises(SkipSample, match="holds '2', expected a class number of 0 to 1"):
        captions({"jpg": b"", "cls": b"2"}, **settings)
    with pytest.raises(DataError, match="class_names"):
        captions({"jpg": b"", "cls": b"1"}, **settings | {"class_names": str(tmp_path / "absent")})


@pytest.mark.parametrize(
    ("condition", "passes"),
    [
        ("width >= 384", True),
        ("width < 384", False),
        ("punsafe < 0.1", True),
        ("similarity > 0.28", True),  # stored as text
        ("status == success", True),
        ("status != success", False),
        ("language in [en, de]", True),
        ("language in fr", False),
        ("aspect_ratio <= 2", True),
        ("aspect_ratio < 1.5", False),
        ("absent > 0", False),
        ("status > 0", False),
    ],
)
def test_a_filter_decides_by_the_metadata(condition, passes):
    metadata = {
        "width": 600,
        "height": 300,
        "punsafe": 0.05,
        "similarity": "0.3",
        "status": "success",
        "language": "de",
    }
    fields = field_map(SourceConfig(kind=SourceKind.generation, filter=[condition]))
    raw = RawSample(info=INFO, fields={"json": json.dumps(metadata).encode()})
    assert (Fields(raw, fields).rejected() == "") is passes


def generation_config(
    cfg: RunConfig, folder: Any, samples: list[tuple[str, dict[str, bytes]]], **settings: Any
) -> None:
    write_shard(folder / "a.tar", samples[: len(samples) // 2])
    write_shard(folder / "b.tar", samples[len(samples) // 2 :])
    cfg.data.root = str(folder)
    cfg.data.sources = {"laion": SourceConfig(kind=SourceKind.generation, shards="{a,b}.tar", **settings)}
    cfg.stage.mixture.understanding = cfg.stage.mixture.text = 0.0
    cfg.stage.template = Template.stage2


def test_the_index_counts_what_a_filter_leaves_out_and_says_where_the_texts_lay(cfg, tmp_path, tokenizer):
    samples = [
        (f"k{n}", {"png": png(n), "json": json_bytes({"caption": "c", "width": n})} | ({"txt": b"t"} if n % 2 else {}))
        for n in range(10)
    ]
    samples[9][1]["json"] = json_bytes({"width": 9})
    samples[8][1]["json"] = json_bytes({"caption": "c"})
    generation_config(cfg, tmp_path, samples, filter=["width >= 4"])
    (index,) = index_sources(cfg, tokenizer)
    assert len(index) == 5 and not index.bad
    assert index.filtered == {"not width >= 4": 4, 'not width >= 4: no "width" of .json': 1}
    assert index.taken == {'"caption" of .json': 4, ".txt": 1}
    cfg.data.sources["laion"].filter = ["width >= 40"]
    with pytest.raises(DataError, match="its filter leaves out 9 not width >= 40, 1 not width >= 40: no"):
        index_sources(cfg, tokenizer)


def test_an_index_of_older_rules_is_kept_unless_it_names_bad_samples(cfg, tmp_path, tokenizer, monkeypatch):
    sound = [(f"k{n}", {"png": png(n), "json": json_bytes({"caption": "c"})}) for n in range(4)]
    generation_config(cfg, tmp_path, [*sound[:3], ("bad", {"png": png(1), "json": b"{"})])
    monkeypatch.setattr("jp_train.data.sidecar.RULES", 1)
    index_sources(cfg, tokenizer)
    files = {path.name[0]: path for path in tmp_path.glob("*.jp-tokens-*")}
    before = {name: path.stat().st_mtime_ns for name, path in files.items()}
    monkeypatch.undo()
    index_sources(cfg, tokenizer)
    assert files["a"].stat().st_mtime_ns == before["a"] and files["b"].stat().st_mtime_ns != before["b"]


@pytest.mark.parametrize("token_ids", ["auto", "off"])
def test_every_epoch_draws_one_of_a_samples_captions_and_plan_and_rows_agree(cfg, tmp_path, tokenizer, token_ids):
    """Against the definition: entry int(u * captions) with u of (seed, source, epoch, sample), worked out here."""
    texts = {f"k{n}": [f"{'word ' * (k + n)}{n}.{k}" for k in range(1 + n % 4)] for n in range(24)}
    samples = [(key, {"png": png(1), "json": json_bytes({"captions": text})}) for key, text in texts.items()]
    generation_config(cfg, tmp_path, samples, fields={"caption": "json:captions[*]"})
    cfg.data.token_ids = type(cfg.data.token_ids)(token_ids)
    cfg.data.pad_dropout = 0.0
    cfg.stage.training_steps, cfg.stage.batch_size = 40, 8
    indexes = index_sources(cfg, tokenizer)
    assert len(indexes[0]) == 24 and len(indexes[0].tokens) == sum(map(len, texts.values()))
    plan, builder = (
        build_plan(cfg, indexes, batch_plan(cfg, 1), tokenizer),
        RowBuilder(cfg, [index.locator for index in indexes], tokenizer),
    )
    encoder = Encoder(cfg, tokenizer)
    drawn: Counter[tuple[str, int]] = Counter()
    for _ in range(12):
        for spec in plan.next_step():
            row = builder.build(spec)
            assert not row.skipped
            for ref, document in zip(spec.documents, row.documents, strict=True):
                options = texts[document.info.key]
                variant = int(document_uniform(cfg.seed, "laion", ref.epoch, ref.sample, "variant") * len(options))
                caption = tokenizer.encode_many([options[variant]])[0]
                ids = document.input_ids.tolist()
                assert ids[1 : 1 + len(caption)] == caption and ids[1 + len(caption)] == tokenizer.special.boi
                drawn[document.info.key, variant] += 1
    assert encoder.variant("laion", 0, 3, 4) in range(4)
    several = [key for key, options in texts.items() if len(options) == 4]
    assert all(len({variant for other, variant in drawn if other == key}) > 1 for key in several)
    np.testing.assert_allclose(
        indexes[0].mean_tokens,
        np.mean([np.mean([len(tokenizer.encode_many([text])[0]) for text in options]) for options in texts.values()])
        + encoder.image_slots
        + 4,
    )
