"""The campaign: over 10,000 sound and damaged samples through `data verify` and through training's own index, loader
and ledger.

The invariant is equality: both name exactly the same samples as bad, each once, and everything else is used.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from jp_train.config.batch import batch_plan
from jp_train.config.schema import BatchUnit, MixtureConfig, RunConfig, SourceConfig, SourceKind
from jp_train.data.encode import Encoder
from jp_train.data.field_map import field_map
from jp_train.data.index import index_shard, index_sources, source_fingerprint
from jp_train.data.ledger import Ledger
from jp_train.data.loader import StepLoader, build_plan
from jp_train.data.shards import ShardReader
from jp_train.errors import DataError
from jp_train.tools.verify.faults import REMEDIES
from jp_train.tools.verify.shard import VerifyTask, verify_shard
from jp_train.tools.verify.verify import VerifyOptions, verify_sources
from tests.data.data_samples import write_shard
from tests.data.faulty_shards import NASTY_JSON, NASTY_TEXT, mutated, nasty_npy, picture, raw_tar, sound

KINDS = {"understanding": 3600, "generation": 3600, "text": 2000, "stored": 1000}
SHARDS = 2
ROWS = 128


def damaged(kind: str, seed: int, pool: list[dict[str, bytes]]) -> dict[str, bytes]:
    """One sample: about two in five are sound, the others have one of many faults, or two."""
    random = np.random.default_rng((seed, list(KINDS).index(kind)))
    fields = dict(pool[seed % len(pool)])
    for _ in range(int(random.choice([0, 1, 2], p=[0.4, 0.5, 0.1]))):
        name = str(random.choice(sorted(fields))) if fields else "json"
        match int(random.integers(5)):
            case 0 | 1:
                fields[name] = mutated(fields.get(name, b""), random)
            case 2:
                nasty = {"txt": NASTY_TEXT, "json": NASTY_JSON, "vq.npy": nasty_npy()}.get(
                    name, (b"", b"GIF89a" + bytes(40), b"\xff\xd8")
                )
                fields[name] = nasty[int(random.integers(len(nasty)))]
            case 3:
                fields.pop(name, None)
            case _:
                extra = ("png", "jpg", "webp", "json", "txt", "vq.npy", "pkl", "pth", "cls", "tar.gz")[
                    int(random.integers(10))
                ]
                fields.setdefault(
                    extra, b"cos\nsystem\n(S'touch /tmp/owned'\ntR." if extra in ("pkl", "pth") else picture(seed)
                )
    return fields or {"cls": b"7"}


@pytest.fixture(scope="module")
def damaged_shards(tmp_path_factory) -> tuple[Path, dict[str, set[tuple[str, str]]]]:
    """Shards KIND-N.tar in a folder, and (shard name, key) of all their samples by kind."""
    folder = tmp_path_factory.mktemp("damaged")
    samples: dict[str, set[tuple[str, str]]] = {kind: set() for kind in KINDS}
    for kind, count in KINDS.items():
        pool = [sound(kind, seed) for seed in range(60)]
        for number in range(SHARDS):
            name = f"{kind}-{number}.tar"
            keys = [f"{kind[0]}{seed:05d}" for seed in range(number, count, SHARDS)]
            write_shard(folder / name, ((key, damaged(kind, int(key[1:]), pool)) for key in keys))
            samples[kind] |= {(name, key) for key in keys}
    return folder, samples


@dataclass(frozen=True)
class Campaign:
    cfg: RunConfig
    samples: set[tuple[str, str, str]]


@pytest.fixture
def campaign(cfg, tmp_path, damaged_shards) -> Campaign:
    folder, names = damaged_shards
    for path in folder.glob("*.tar"):
        shutil.copy(path, tmp_path)
    samples = {(kind, str(tmp_path / name), key) for kind in KINDS for name, key in names[kind]}
    for kind in KINDS:
        kind_of = SourceKind.generation if kind == "stored" else SourceKind(kind)
        cfg.data.sources[kind] = SourceConfig(kind=kind_of, shards=f"{kind}-*.tar")
    cfg.data.root, cfg.run_dir = str(tmp_path), str(tmp_path / "run")
    cfg.data.workers, cfg.data.prefetch_rows = 2, 32
    cfg.data.skip_budget, cfg.data.skip_consecutive = 1.0, 10**6
    cfg.data.pad_dropout, cfg.data.first_sentence = 0.2, 0.4
    cfg.data.max_image_pixels = 100_000
    cfg.stage.mixture = MixtureConfig(understanding=36, text=20, generation=46)
    cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, ROWS
    return Campaign(cfg=cfg, samples=samples)


def test_verify_and_training_agree_on_every_one_of_ten_thousand_damaged_samples(campaign, tokenizer):
    cfg = campaign.cfg
    assert len(campaign.samples) >= 10_000
    report = verify_sources(cfg, tokenizer, VerifyOptions(processes=2))
    faults = [fault for fault in report.findings if not fault.warning]
    named = Counter((fault.source, fault.shard, fault.key) for fault in faults)
    assert max(named.values()) == 1 and named.keys() <= campaign.samples
    assert all(shard.whole for shard in report.shards) and {fault.fault for fault in faults} <= REMEDIES.keys()
    # the campaign is neither harmless nor hopeless
    assert 2000 < len(named) < 9000 and len({fault.fault for fault in faults}) >= 12
    assert "internal_error" not in {fault.fault for fault in faults}
    # no memory address: another pass says the same
    assert not [fault.reason for fault in faults if " at 0x" in fault.reason]

    indexes = index_sources(cfg, tokenizer)
    usable = {index.name: len(index) for index in indexes}
    ledger = Ledger(cfg.run_dir, cfg)
    ledger.record_index(indexes)
    left_out = sum(len(index.bad) for index in indexes)
    batch = batch_plan(cfg, 1)
    used: set[tuple[str, str]] = set()
    skipped: set[tuple[str, str]] = set()
    with StepLoader(
        cfg,
        build_plan(cfg, indexes, batch, tokenizer),
        indexes,
        tokenizer,
        dp_rank=0,
        dp_world_size=1,
        batch_plan=batch,
    ) as steps:
        for step in steps:
            bad = [entry for part in step.micro_batches for entry in part.skipped]
            ledger.record(bad, step.used_per_source, step.step)
            skipped |= {(entry.info.source, entry.info.key) for entry in bad}
            used |= {
                (entry.source, entry.key) for part in step.micro_batches for row in part.provenance for entry in row
            }
            seen = Counter(source for source, _ in used | skipped)
            if all(seen[name] >= count for name, count in usable.items()):
                break
            assert step.step < 400, f"some samples never came: {seen} of {usable}"

    entries = [json.loads(line) for line in Path(cfg.run_dir, "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    at_index = Counter((entry["source"], entry["shard"], entry["key"]) for entry in entries if entry["step"] is None)
    in_training = {(entry["source"], entry["shard"], entry["key"]) for entry in entries if entry["step"] is not None}
    assert left_out == len(at_index) and max(at_index.values()) == 1
    assert not at_index.keys() & in_training
    assert at_index.keys() | in_training == set(named)
    assert used == {(source, key) for source, _, key in campaign.samples - named.keys()}
    only_decoding = {(fault.source, fault.shard, fault.key) for fault in faults if fault.image}
    assert only_decoding == in_training


def test_after_excluding_training_meets_no_bad_picture_and_verify_is_clean_of_them(campaign, tokenizer):
    cfg = campaign.cfg
    cfg.data.sources = {"generation": cfg.data.sources["generation"]}
    first = verify_sources(cfg, tokenizer, VerifyOptions(exclude=True))
    pictures = {(fault.shard, fault.key) for fault in first.findings if fault.image}
    assert pictures and not first.clean
    (index,) = index_sources(cfg, tokenizer)
    assert pictures == {
        (bad.info.shard, bad.info.key) for bad in index.bad if bad.reason.startswith("excluded by data verify")
    }
    assert {(fault.shard, fault.key) for fault in first.findings if not fault.warning} == {
        (bad.info.shard, bad.info.key) for bad in index.bad
    }
    assert len(index) == sum(shard.good for shard in first.shards)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_is_whole_for_verify_exactly_when_the_index_takes_it(cfg, tokenizer, tmp_path, form):
    """Damage anywhere in the bytes of a tar: headers, extensions, padding, end marker."""
    source = SourceConfig(kind=SourceKind.text, shards="x.tar")
    encoder, reader = Encoder(cfg, tokenizer), ShardReader(1)
    names = [
        "a.txt",
        "b.txt",
        "ключ.txt",
        "d/" + "n" * (60 if form == tarfile.USTAR_FORMAT else 160) + ".json",
        "../../e.txt",
    ]
    contents = [sound("text", 1)["txt"], b"", "два слова".encode(), sound("text", 2)["json"], sound("text", 3)["txt"]]
    original = raw_tar(tmp_path / "x.tar", zip(names, contents, strict=True), form).read_bytes()
    end = len(original.rstrip(b"\0"))
    random = np.random.default_rng(form)
    whole = 0
    for number in range(250):
        path = tmp_path / f"{form}-{number}.tar"
        data = mutated(original[: end + 1024], random) if number % 2 else _header_damage(original, end, random)
        path.write_bytes(data)
        shard = reader.stat(str(path))
        report = verify_shard(VerifyTask(source="t", config=source, shard=shard), cfg, encoder, reader)
        bad = {fault.key for fault in report.faults if not fault.warning}
        try:
            tokens = index_shard(
                shard,
                name="t",
                fields=field_map(source),
                fingerprint=source_fingerprint(encoder, field_map(source)),
                encoder=encoder,
                reader=reader,
                crop=cfg.data.crop,
            )
        except DataError as error:
            assert str(path) in str(error) and not report.whole and report.faults
            continue
        whole += 1
        assert report.whole and bad == {key for key, _ in tokens.bad} and report.good == len(tokens)
        assert sum(fault.key is None for fault in report.faults) == 0
    assert 20 < whole < 230


def _header_damage(original: bytes, end: int, random: np.random.Generator) -> bytes:
    """A header whose fields changed and whose checksum was made right again, so that it is believed."""
    data = bytearray(original)
    starts = [at for at in range(0, end, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = starts[int(random.integers(len(starts)))]
    place = int(random.choice([random.integers(100), random.integers(124, 136), 156, random.integers(345, 500)]))
    data[at + place] = int(
        random.choice([0, 0x2F, 0x2E, 0x31, 0x35, 0x37, 0x4C, 0x67, 0x78, 0x80, 0xFF, random.integers(256)])
    )
    block = data[at : at + 512]
    block[148:156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return bytes(data)
