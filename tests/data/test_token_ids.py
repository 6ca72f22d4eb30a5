"""Stored token ids: rows that do not know whether their texts were tokenised now or by the index, and files that are
current, whole or refused."""

from __future__ import annotations

import dataclasses
import enum
import io
import itertools
import json
import os
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from jp_train.config.batch import batch_plan
from jp_train.config.schema import (
    ClassPrompt,
    ImageEnd,
    MixtureConfig,
    PadDropoutForm,
    SourceConfig,
    SourceKind,
    Template,
    TokenIds,
)
from jp_train.data import index as index_module
from jp_train.data import sidecar
from jp_train.data.encode import Encoder
from jp_train.data.index import index_sources
from jp_train.data.layouts import LEARN
from jp_train.data.loader import StepLoader, build_plan
from jp_train.data.shards import ShardReader
from jp_train.data.token_ids import RecordSpool, pack, planes_for, unpack
from jp_train.data.vq_ids import IdsRecipe, store_ids
from jp_train.data.vq_use import use_stored_ids
from jp_train.errors import DataError, SkipSample
from jp_train.tools.index import index_command
from jp_train.types import (
    GenerationSample,
    PackedBatch,
    SourceInfo,
    SpecialTokens,
    TextSample,
    Turn,
    UnderstandingSample,
)
from tests.data.data_samples import conversation, generation_samples, json_bytes, png, text_samples, write_shard
from tests.data.range_server import range_server

INFO = SourceInfo(source="s", shard="s.tar", key="k")
RECIPE = IdsRecipe(vq="a" * 32, transform=1, image_side=32, max_image_pixels=1000)


class CodePoints:
    """A tokenizer of one id a character, of which an emoji takes more than 16 bits."""

    special = SpecialTokens(bos=0, eos=1, pad=2, boi=3, eoi=4, image_placeholder=5)
    user, assistant, fingerprint = "<|User|>", "<|Assistant|>", "code points"
    vocab_size = 8 + 0x110000

    def encode(self, text):
        return [8 + ord(character) for character in text]

    def encode_many(self, texts):
        return [self.encode(text) for text in texts]

    def role(self, marker):
        return {self.user: 6, self.assistant: 7}[marker]


def turns(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(question=question, answer=answer) for question, answer in pairs)


SAMPLES = [
    UnderstandingSample(info=INFO, images=(png(1),), turns=turns(("", "a red square"))),
    UnderstandingSample(info=INFO, images=(png(1),), turns=turns(("what?", "a 🦊"))),
    UnderstandingSample(
        info=INFO, images=(png(1),), turns=turns(("what?", "ein Fuchs."), ("", "no question"), ("why?", "🦊🦊"))
    ),
    TextSample(info=INFO, text="one line. 🦊\nanother"),
    TextSample(info=INFO, text="x" * 700),
    TextSample(info=INFO, turns=turns(("who?", "me"), ("why?", "because"))),
    GenerationSample(info=INFO, caption="a red square", vq_ids=np.arange(16, dtype=np.uint16)),
    GenerationSample(info=INFO, caption="A fox 🦊. In the snow! At night.", vq_ids=np.arange(16, dtype=np.uint16)),
    GenerationSample(info=INFO, caption="雪の中の狐。夜。", vq_ids=np.arange(16, dtype=np.uint16)),
    GenerationSample(info=INFO, caption="word " * 300, vq_ids=np.arange(16, dtype=np.uint16)),
]
OPTIONS = [
    {},
    {"mask_question": True, "system_prompt": ""},
    {"supervise_eoi": True, "image_end": ImageEnd.eoi, "pad_dropout_form": PadDropoutForm.single_pad},
    {"image_end": ImageEnd.none, "space_before_boi": True, "pad_dropout_form": PadDropoutForm.empty},
]


def without_text(sample, record: bytes):
    """The sample as a reader of stored ids makes it."""
    common = {"info": sample.info, "token_ids": record}
    if isinstance(sample, UnderstandingSample):
        return UnderstandingSample(images=sample.images, **common)
    if isinstance(sample, TextSample):
        return TextSample(**common)
    return GenerationSample(caption="", vq_ids=sample.vq_ids, **common)


def documents(encoder: Encoder, sample) -> list:
    """The sample under all draws, whole and truncated: tokens as lists, or why it is skipped."""
    result = []
    for short, drop, longest in itertools.product((False, True), (False, True), (None, 400, 200, 60, 30, 19)):
        if not isinstance(sample, GenerationSample) and (short or drop):
            continue
        draft = encoder.draft(sample, short_caption=short, drop_condition=drop)
        try:
            cut = longest is not None and draft.length > longest
            tokens, start = encoder.truncated(draft, longest) if cut else (encoder.written(draft), draft.image_starts)
            result.append((draft.length, tokens.tolist(), start))
        except SkipSample as reason:
            result.append(str(reason))
    return result


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")
@pytest.mark.parametrize("template", list(Template))
def test_a_document_of_stored_ids_equals_the_one_of_its_text(cfg, template, options):
    cfg.stage.template, cfg.model.language.vocab_size = template, CodePoints.vocab_size
    storing = Encoder(cfg, CodePoints())
    records = [storing.record(storing.texts(sample)) for sample in SAMPLES]
    same_lengths = {"mask_question", "supervise_eoi"}  # what is learnt may change without another index
    for late in (False, True):
        for name, value in options.items():
            if late or name not in same_lengths:
                setattr(cfg.data, name, value)
        encoder = Encoder(cfg, CodePoints())
        if not late:
            records = [encoder.record(encoder.texts(sample)) for sample in SAMPLES]
        for sample, record in zip(SAMPLES, records, strict=True):
            assert documents(encoder, without_text(sample, record)) == documents(encoder, sample)


def test_no_data_option_changes_what_is_stored_without_another_fingerprint(cfg):
    cfg.stage.template, cfg.model.language.vocab_size = Template.stage3, CodePoints.vocab_size

    def stored() -> tuple[str, list[bytes]]:
        encoder = Encoder(cfg, CodePoints())
        return encoder.fingerprint, [encoder.record(encoder.texts(sample)) for sample in SAMPLES]

    (fingerprint, records), decisive = stored(), set()
    for option in dataclasses.fields(cfg.data):
        value = getattr(cfg.data, option.name)
        others = {
            bool: lambda value: [not value],
            int: lambda value: [value + 1],
            float: lambda _: [0.5],
            str: lambda value: [value[::-1]],
        }
        for other in (
            list(type(value)) if isinstance(value, enum.Enum) else others.get(type(value), lambda _: [])(value)
        ):
            setattr(cfg.data, option.name, other)
            changed_print, changed = stored()
            assert changed_print != fingerprint or changed == records, option.name
            decisive |= {option.name} if changed != records else set()
        setattr(cfg.data, option.name, value)
    assert decisive == {"space_before_boi", "system_prompt", "caption_question"}


@pytest.mark.parametrize("vocab_size", [500, 65_536, 65_537, 102_400, 131_072, 131_073, 300_000])
def test_a_record_is_the_runs_and_as_small_as_its_ids_allow(vocab_size):
    random, planes = np.random.default_rng(vocab_size), planes_for(vocab_size)
    assert vocab_size <= 2 ** (16 + planes) and (planes == 0 or vocab_size > 2 ** (15 + planes))
    for lengths in ([], [0], [7], [0, 0, 3], [1, 8, 9], [80, 2, 900]):
        runs = [(random.integers(0, vocab_size, length).tolist(), int(random.integers(4))) for length in lengths]
        record, total = pack(runs, planes), sum(lengths)
        assert len(record) == 4 + 4 * len(runs) + 2 * total + planes * -(-total // 8)
        unpacked, ids = unpack(record, planes)
        assert unpacked == [(len(values), role) for values, role in runs]
        assert ids.tolist() == [token for values, _ in runs for token in values]
        # By hand: the low halves, then a bit a plane, the first id in the highest bit of a byte.
        at = 4 + 4 * len(runs)
        for n, token in enumerate(ids.tolist()):
            low = int.from_bytes(record[at + 2 * n : at + 2 * n + 2], "little")
            high = [
                record[at + 2 * total + plane * -(-total // 8) + n // 8] >> (7 - n % 8) & 1 for plane in range(planes)
            ]
            assert low + sum(bit << (16 + plane) for plane, bit in enumerate(high)) == token


def loader(cfg, tokenizer, *, workers=0, recipe=None) -> StepLoader:
    cfg.data.workers = workers
    indexes, batch = index_sources(cfg, tokenizer), batch_plan(cfg, 1)
    if recipe is not None:
        indexes = use_stored_ids(cfg.data, indexes, recipe)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    return StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch)


def content(steps) -> list:
    """Everything of steps: each tensor bit for bit, provenance, skipped documents with their reasons."""
    result = []
    for step in steps:
        for batch in step.micro_batches:
            for name in PackedBatch.__slots__:
                value = getattr(batch, name)
                tensor = isinstance(value, torch.Tensor)
                result.append((name, (value.dtype, value.shape, value.numpy().tobytes()) if tensor else value))
    return result


def taken(cfg, tokenizer, steps=4, **options) -> list:
    with loader(cfg, tokenizer, **options) as made:
        return content(itertools.islice(made, steps))


def with_dialogues(cfg, folder):
    """Two more sources: text dialogues, and class names as prompts."""
    dialogues = [(f"d{n:03d}", {"json": conversation(f"who is {n}?", f"number {n}. " * (n % 3 + 1))}) for n in range(9)]
    classes = [
        (f"c{n:03d}", {"png": png(n), "json": json_bytes({"caption": f"tench{n}, Tinca tinca"})}) for n in range(9)
    ]
    write_shard(folder / "dialogues.tar", dialogues)
    write_shard(folder / "classes.tar", classes)
    cfg.data.sources["dialogues"] = SourceConfig(kind=SourceKind.text, shards="dialogues.tar")
    cfg.data.sources["classes"] = SourceConfig(
        kind=SourceKind.generation,
        shards="classes.tar",
        class_prompt=ClassPrompt.template,
        class_template="a photo of {}.",
    )
    return cfg


@pytest.mark.parametrize(("template", "workers"), [(Template.stage1, 0), (Template.stage2, 1), (Template.stage3, 0)])
def test_rows_are_bit_identical_with_and_without_stored_ids(mixed, tokenizer, tmp_path, template, workers):
    cfg = with_dialogues(mixed(broken=frozenset({"g0003", "u0005", "g0014"})), tmp_path)
    cfg.stage.template, cfg.data.skip_minimum, cfg.data.seq_len = template, 10_000, 52
    cfg.data.token_ids = TokenIds.off
    plain = taken(cfg, tokenizer, 6)
    assert not any("records" in np.load(path).files for path in tmp_path.glob("*.jp-tokens-*.npz"))
    cfg.data.token_ids = TokenIds.auto
    stored = taken(cfg, tokenizer, 6, workers=workers)
    assert stored == plain
    skipped = [skip.reason for name, value in plain if name == "skipped" for skip in value]
    assert skipped and sum(value for name, value in plain if name == "truncated_tokens")
    assert all("records" in np.load(path).files for path in tmp_path.glob("*.jp-tokens-*.npz"))


def test_with_both_kinds_of_ids_stored_nothing_of_the_shards_is_read(mixed, tokenizer, tmp_path):
    cfg = mixed()
    cfg.data.sources = {name: cfg.data.sources[name] for name in ("real", "text")}
    cfg.stage.mixture = MixtureConfig(understanding=0, text=1, generation=2)
    faults = [("g0004", "no picture"), ("g0015", "no picture either")]
    for name, count, unusable in (("real-0.tar", 13, faults[:1]), ("real-1.tar", 12, faults[1:])):
        ids = (np.arange(count)[:, None] * 7 + np.arange(16)).astype(np.uint16) % 64
        ids[4 if name == "real-0.tar" else 2] = 65535
        shard = ShardReader().stat(str(tmp_path / name))
        store_ids(shard, RECIPE, ids, codebook_size=64, without_picture=0, pictures_sha256="", unusable=unusable)
    cfg.data.skip_minimum, cfg.data.token_ids = 10_000, TokenIds.off
    plain = taken(cfg, tokenizer, recipe=RECIPE)
    assert {skip.reason for name, value in plain if name == "skipped" for skip in value} == {
        reason for _, reason in faults
    }
    cfg.data.token_ids = TokenIds.auto
    with loader(cfg, tokenizer, recipe=RECIPE) as made:
        for path in tmp_path.glob("*.tar"):
            path.unlink()
        assert content(itertools.islice(made, 4)) == plain


def test_texts_on_a_server_are_not_asked_for_again(cfg, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cfg.stage.mixture = MixtureConfig(understanding=0, text=1, generation=0)
    cfg.stage.batch_unit, cfg.stage.batch_size = type(cfg.stage.batch_unit).packed, 4
    with range_server() as server:
        server.content["/text.tar"] = write_shard(tmp_path / "text.tar", text_samples(21)).read_bytes()
        cfg.data.sources = {"text": SourceConfig(kind=SourceKind.text, shards=f"{server.url}/text.tar")}
        index_sources(cfg, tokenizer)
        before = server.requests
        with loader(cfg, tokenizer) as made:
            rows = content(itertools.islice(made, 4))
        assert server.requests == before > 0
        cfg.data.token_ids = TokenIds.off
        assert taken(cfg, tokenizer) == rows and server.requests > before


def test_another_runs_rebuilt_sidecar_does_not_stop_a_run(mixed, tokenizer, tmp_path, monkeypatch):
    cfg = mixed()
    expected = taken(cfg, tokenizer)
    monkeypatch.setattr("jp_train.data.shards.MAX_OPEN_SHARDS", 1)  # so that files are opened again
    with loader(cfg, tokenizer) as made:
        batches = content(itertools.islice(made, 1))
        for path in tmp_path.glob("*.jp-tokens-*.npz"):
            path.unlink()
        index_sources(cfg, tokenizer)
        for path in tmp_path.glob("*.jp-tokens-*.npz"):
            os.utime(path, ns=(1, 1))
        batches += content(itertools.islice(made, 3))
    assert batches == expected


def text_source(cfg, folder, samples=3):
    write_shard(folder / "a.tar", text_samples(samples))
    cfg.data.root = str(folder)
    cfg.data.sources = {"s": SourceConfig(kind=SourceKind.text, shards="a.tar")}
    cfg.stage.mixture = MixtureConfig(understanding=0, text=1, generation=0)
    cfg.stage.batch_unit, cfg.stage.batch_size = type(cfg.stage.batch_unit).packed, 2
    return cfg


def test_an_index_without_ids_is_stale_unless_they_are_off(cfg, tokenizer, tmp_path, monkeypatch):
    built = []
    original = index_module.index_shard
    monkeypatch.setattr(index_module, "index_shard", lambda *a, **k: built.append(1) or original(*a, **k))
    text_source(cfg, tmp_path)
    modes = (TokenIds.off, TokenIds.off, TokenIds.auto, TokenIds.auto, TokenIds.off)
    stored = []
    for mode in modes:
        cfg.data.token_ids = mode
        (index,) = index_sources(cfg, tokenizer)
        stored.append((len(built), index.locator.token_ids, index.ids_bytes > 0))
    assert stored == [(1, False, False), (1, False, False), (2, True, True), (2, True, True), (2, False, False)]


def test_what_an_index_without_ids_costs_is_told_beforehand_with_the_way_around(cfg, tokenizer, tmp_path):
    text_source(cfg, tmp_path).data.token_ids = TokenIds.off
    index_sources(cfg, tokenizer)
    write_shard(tmp_path / "b.tar", text_samples(2))
    cfg.data.sources["new"] = SourceConfig(kind=SourceKind.text, shards="b.tar")
    cfg.data.token_ids = TokenIds.auto
    lines = []
    for _ in range(2):
        progress = io.StringIO()
        index_command(cfg, 1, table=io.StringIO(), progress=progress)
        lines.append(progress.getvalue().splitlines())
    assert (
        lines[0][0].startswith("index: 2 shards (")
        and "1 of them lack only token ids: data.token_ids=off" in lines[0][0]
    )
    assert len(lines[0]) > 1 and lines[1] == []


def test_a_read_only_index_without_ids_is_completed_in_the_cache_folder_once(cfg, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text_source(cfg, tmp_path / "shards").data.token_ids = TokenIds.off
    index_sources(cfg, tokenizer)
    real_open = open

    def guarded(path, mode="r", *args, **kwargs):
        if "x" in mode and str(path).startswith(str(tmp_path / "shards")):
            raise PermissionError(30, "Read-only file system")
        return real_open(path, mode, *args, **kwargs)

    monkeypatch.setattr(sidecar, "open", guarded, raising=False)
    cfg.data.token_ids = TokenIds.auto
    index_sources(cfg, tokenizer)
    monkeypatch.setattr(index_module, "index_shard", lambda *a, **k: pytest.fail("built again"))
    with loader(cfg, tokenizer) as made:
        next(made)


def damage(cfg, tokenizer, change):
    """Let `change` alter the bytes of all records of the only shard; returns the message that stops a run."""
    index_sources(cfg, tokenizer)
    (path,) = Path(cfg.data.root).glob("*.jp-tokens-*.npz")
    with np.load(path, allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    change(memoryview(held["records"]), held["record_start"].tolist())
    np.savez(path, **held)
    with loader(cfg, tokenizer) as made, pytest.raises(DataError) as caught:
        next(made)
    return str(caught.value)


def test_damaged_records_stop_the_run_with_sample_and_remedy(cfg, tokenizer, tmp_path):
    def large_ids(data, starts):
        for start in starts[:-1]:
            data[start + 12 : start + 14] = b"\xff\xff"

    def many_runs(data, starts):
        for start in starts[:-1]:
            data[start : start + 4] = b"\xff\xff\xff\x7f"

    def shorter(data, starts):
        for start in starts[:-1]:
            data[start + 8 : start + 12] = b"\x05\0\0\0"

    def image_slots(data, starts):
        for start in starts[:-1]:
            data[start + 12 : start + 14] = tokenizer.special.image_placeholder.to_bytes(2, "little")

    def images(data, starts):
        for start in starts[:-1]:
            data[start + 4] |= 3

    def learnt_start(data, starts):
        for start in starts[:-1]:
            data[start + 4] |= LEARN

    cases = {
        large_ids: "id 65535 of 500",
        many_runs: "runs",
        shorter: "bytes for",
        image_slots: "image slot",
        images: "number of images",
    }
    cases[learnt_start] = "does not begin with BOS"
    for change, cause in cases.items():
        message = damage(text_source(cfg, tmp_path), tokenizer, change)
        assert "the stored token ids of source 's'" in message and cause in message and "data.token_ids=off" in message
        for path in tmp_path.glob("*.npz"):
            path.unlink()


@pytest.mark.parametrize("template", list(Template))
def test_no_damage_of_a_record_ends_in_another_error(cfg, tokenizer, template):
    cfg.stage.template = template
    encoder, random = Encoder(cfg, tokenizer), np.random.default_rng(0)
    outcomes = set()
    for number in range(1500):
        sample = SAMPLES[(0, 2, 5, 7)[number % 4]]
        record = bytearray(encoder.record(encoder.texts(sample)))
        for at in random.integers(0, min(len(record), 40), 1 + number % 3):
            record[at] = random.integers(256)
        record = bytes(record[: random.integers(len(record))] if number % 5 == 0 else record)
        try:
            draft = encoder.draft(without_text(sample, record))
            tokens = encoder.written(draft)
            assert tokens[0].min() >= 0 and tokens[0].max() < tokenizer.vocab_size
            slots = 16 * (not isinstance(sample, TextSample))
            assert (tokens[0] == tokenizer.special.image_placeholder).sum() == slots
            outcomes.add("another text")
        except DataError as error:
            assert "delete the shard's .jp-tokens sidecar" in str(error)
            outcomes.add("refused")
    assert outcomes == {"another text", "refused"}


@pytest.mark.parametrize(
    "wrong", [np.array([0, 5]), np.array([0, 9, 5, 20]), np.array([0.0, 1, 2, 3]), np.array([1, 2, 3, 4])]
)
def test_a_sidecar_whose_records_contradict_it_is_refused_by_name(cfg, tokenizer, tmp_path, wrong):
    (index,) = index_sources(text_source(cfg, tmp_path), tokenizer)
    (path,) = tmp_path.glob("*.jp-tokens-*.npz")
    with np.load(path, allow_pickle=False) as file:
        held = {name: file[name] for name in file.files}
    np.savez(path, **held)
    assert sidecar.open_tokens(index.shards[0], index.locator.fingerprint, ShardReader()) is not None
    np.savez(path, **held | {"record_start": wrong})
    with loader(cfg, tokenizer) as made, pytest.raises(DataError, match=r"a\.tar.*gone, stale or damaged.*delete"):
        next(made)


def test_records_that_are_said_to_be_longer_than_their_file_are_refused_unread(cfg, tokenizer, tmp_path):
    (index,) = index_sources(text_source(cfg, tmp_path), tokenizer)
    (path,) = tmp_path.glob("*.jp-tokens-*.npz")
    opened = []
    for claimed in (0, 1 << 40):  # the central directory and the array's header say so; no byte of it exists
        with np.load(path, allow_pickle=False) as file:
            held = {name: file[name] for name in file.files}
        meta = json.loads(bytes(held["meta"])) | ({"ids_bytes": claimed} if claimed else {})
        with zipfile.ZipFile(tmp_path / "hostile.npz", "w") as made:
            for name, array in held.items():
                content = io.BytesIO()
                if name == "meta":
                    array = np.frombuffer(json.dumps(meta).encode(), np.uint8)
                if name == "record_start" and claimed:
                    array = np.linspace(0, claimed, len(array)).astype(np.int64)
                if name == "records" and claimed:
                    np.lib.format.write_array_header_1_0(
                        content, {"descr": "|u1", "fortran_order": False, "shape": (claimed,)}
                    )
                else:
                    np.lib.format.write_array(content, array)
                made.writestr(f"{name}.npy", content.getvalue())
                if name == "records" and claimed:
                    made.getinfo("records.npy").file_size += claimed
        os.replace(tmp_path / "hostile.npz", path)
        opened.append(sidecar.open_tokens(index.shards[0], index.locator.fingerprint, ShardReader()))
    assert opened[0] is not None and opened[1] is None


def test_records_on_their_way_to_the_sidecar_are_not_held_in_memory(tmp_path):
    block = os.urandom(1 << 16)
    tracemalloc.start()
    with RecordSpool() as spool:
        for _ in range(500):
            spool.add(block)
        arrays = spool.arrays()
        shard_bytes, peak = len(arrays["records"]), tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert shard_bytes == 500 << 16 and arrays["record_start"][-1] == shard_bytes
        assert bytes(arrays["records"][-len(block) :]) == block
    assert peak < shard_bytes / 8


def test_a_full_temporary_folder_is_one_clear_error(cfg, tokenizer, tmp_path, monkeypatch):
    text_source(cfg, tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"token ids of a shard cannot be kept.*nowhere.*TMPDIR.*data.token_ids=off"):
        index_sources(cfg, tokenizer)
    cfg.data.token_ids = TokenIds.off
    assert len(index_sources(cfg, tokenizer)[0]) == 3


def test_the_index_command_says_how_large_the_ids_are(cfg, tokenizer, tmp_path):
    table = io.StringIO()
    text_source(cfg, tmp_path, 20)
    write_shard(tmp_path / "g.tar", generation_samples(5))
    cfg.data.sources["g"] = SourceConfig(kind=SourceKind.generation, shards="g.tar")
    summary = index_command(cfg, 1, table=table, progress=io.StringIO())
    text, generation = summary["sources"]
    # two runs, 16 bits a token
    assert text["id_bytes_per_sample"] == pytest.approx(4 + 2 * 4 + 2 * text["tokens"] / 20)
    assert generation["id_bytes_per_sample"] > 16
    assert table.getvalue().splitlines()[0].split("  ")[-1].strip() == "id bytes/sample"
    cfg.data.token_ids = TokenIds.off
    assert index_command(cfg, 1, table=io.StringIO(), progress=io.StringIO())["sources"][0]["id_bytes_per_sample"] == 0
    json.dumps(summary)
