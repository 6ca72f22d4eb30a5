"""Stored VQ ids: the two files beside a shard, which of them a run may use, and rows that do not know where their
ids come from."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from jp_train.config import load_config, save_config, validate
from jp_train.config.batch import batch_plan
from jp_train.config.schema import Crop, MixtureConfig, SourceConfig, SourceKind, VqIds
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan, validation_batches
from jp_train.data.shards import Shard, ShardReader
from jp_train.data.vq_ids import NO_IDS, IdsRecipe, load_manifest, open_ids, restamp_ids, store_ids, stored_fingerprints
from jp_train.data.vq_use import describe_use, ids_summary, use_stored_ids
from jp_train.errors import ConfigError, DataError
from jp_train.tools.encode_images.work import IdsState, ids_state, shares
from jp_train.types import PENDING_VQ_ID
from tests.data.data_samples import (
    SLOTS,
    generation_samples,
    json_bytes,
    npy,
    png,
    stored_samples,
    text_samples,
    write_shard,
)

RECIPE = IdsRecipe(vq="a" * 32, transform=1, image_side=32, max_image_pixels=1000)
OTHER = IdsRecipe(vq="b" * 32, transform=1, image_side=32, max_image_pixels=1000)


def ids_of(samples: int, *, without: tuple[int, ...] = ()) -> np.ndarray:
    """Ids below 64 that are a function of sample and position."""
    ids = (np.arange(samples)[:, None] * 7 + np.arange(SLOTS)).astype(np.uint16) % 64
    ids[list(without)] = NO_IDS
    return ids


def store(
    path: Path,
    samples: int,
    recipe: IdsRecipe = RECIPE,
    *,
    unusable: dict[int, tuple[str, str]] | None = None,
    absent=(),
) -> Shard:
    """Ids for a shard; `unusable` maps sample numbers to (key, reason), `absent` are samples without a picture."""
    shard = ShardReader().stat(str(path))
    unusable = unusable or {}
    store_ids(
        shard,
        recipe,
        ids_of(samples, without=(*unusable, *absent)),
        codebook_size=64,
        without_picture=len(absent),
        pictures_sha256="0" * 64,
        unusable=list(unusable.values()),
    )
    return shard


@pytest.fixture
def generation(cfg, tmp_path):
    """Two shards of 6 and 5 pictures as the only source of `cfg`."""
    write_shard(tmp_path / "a.tar", generation_samples(6))
    write_shard(tmp_path / "b.tar", generation_samples(5, 6))
    cfg.data.root = str(tmp_path)
    cfg.data.sources = {"gen": SourceConfig(kind=SourceKind.generation, shards="{a,b}.tar")}
    cfg.stage.mixture = MixtureConfig(understanding=0, text=0, generation=1)
    cfg.stage.batch_unit = type(cfg.stage.batch_unit).packed
    cfg.stage.batch_size = 2
    return cfg


def rows(cfg, tokenizer, recipe, steps=3, workers=0):
    cfg.data.workers = workers
    indexes = use_stored_ids(cfg.data, index_sources(cfg, tokenizer), recipe)
    batch = batch_plan(cfg, 1)
    with StepLoader(
        cfg,
        build_plan(cfg, indexes, batch, tokenizer),
        indexes,
        tokenizer,
        dp_rank=0,
        dp_world_size=1,
        batch_plan=batch,
    ) as loader:
        return [micro for step in itertools.islice(loader, steps) for micro in step.micro_batches]


def test_what_is_stored_comes_back_row_by_row_and_as_a_plain_array(tmp_path):
    shard = store(
        write_shard(tmp_path / "a.tar", generation_samples(6)), 6, unusable={2: ("g0002", "broken")}, absent=(4,)
    )
    stored = open_ids(shard, RECIPE.fingerprint, ShardReader())
    expected = ids_of(6, without=(2, 4))
    for number in range(6):
        row = stored.row(number)
        assert (row is None) == (number in (2, 4))
        if row is not None:
            assert row.dtype == np.uint16
            np.testing.assert_array_equal(row, expected[number])
    assert stored.unusable == {"g0002": "broken"}
    (path,) = tmp_path.glob("*.npy")
    np.testing.assert_array_equal(np.load(path, mmap_mode="r", allow_pickle=False), expected)
    assert load_manifest(shard, RECIPE.fingerprint).ids_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(DataError, match="6 samples, number 6"):
        stored.row(6)


def test_every_part_of_the_recipe_changes_the_fingerprint():
    changed = [
        OTHER,
        IdsRecipe(vq="a" * 32, transform=2, image_side=32, max_image_pixels=1000),
        IdsRecipe(vq="a" * 32, transform=1, image_side=64, max_image_pixels=1000),
        IdsRecipe(vq="a" * 32, transform=1, image_side=32, max_image_pixels=1001),
        IdsRecipe(vq="a" * 32, transform=1, image_side=32, max_image_pixels=1000, decode="fast"),
    ]
    assert len({recipe.fingerprint for recipe in [RECIPE, *changed]}) == 6


def test_ids_of_several_vqs_lie_beside_each_other_and_are_listed(tmp_path):
    path = write_shard(tmp_path / "a.tar", generation_samples(3))
    store(path, 3)
    shard = store(path, 3, OTHER)
    other = ShardReader().stat(str(write_shard(tmp_path / "aa.tar", generation_samples(3))))
    stored = stored_fingerprints([shard, other])
    assert sorted(stored[str(path)]) == sorted([RECIPE.fingerprint, OTHER.fingerprint]) and stored[other.path] == []
    assert open_ids(shard, OTHER.fingerprint, ShardReader()) is not None


def test_only_a_manifest_makes_ids_complete(tmp_path):
    shard = store(write_shard(tmp_path / "a.tar", generation_samples(3)), 3)
    (manifest,) = tmp_path.glob("*.json")
    text = manifest.read_text()
    reader = ShardReader()
    for broken in ("", "{", "[]", "{}", text[: len(text) // 2], text.replace('"format": 1', '"format": 99')):
        manifest.write_text(broken)
        assert open_ids(shard, RECIPE.fingerprint, reader) is None
        assert ids_state(shard, RECIPE.fingerprint, reader) is IdsState.missing
    manifest.write_text(text)
    assert ids_state(shard, RECIPE.fingerprint, reader) is IdsState.done
    manifest.unlink()
    assert ids_state(shard, RECIPE.fingerprint, reader) is IdsState.missing


@pytest.mark.parametrize(
    "change",
    [
        {"samples": "3"},
        {"samples": True},
        {"slots": [16]},
        {"stamp": None},
        {"recipe": {"vq": ["a" * 32], "transform": 1, "image_side": 32, "max_image_pixels": 1000}},
        {"recipe": {"vq": "c" * 32, "transform": 1, "image_side": 32, "max_image_pixels": 1000}},
        {"unusable": [["k"]]},
        {"unusable": 7},
    ],
)
def test_a_manifest_of_other_types_or_of_another_recipe_than_its_fingerprint_is_none(tmp_path, change):
    shard = store(write_shard(tmp_path / "a.tar", generation_samples(3)), 3)
    (manifest,) = tmp_path.glob("*.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    assert (
        load_manifest(shard, RECIPE.fingerprint) is None and open_ids(shard, RECIPE.fingerprint, ShardReader()) is None
    )


def test_a_fingerprint_that_would_be_a_path_is_not_looked_for(tmp_path):
    shard = store(write_shard(tmp_path / "a.tar", generation_samples(3)), 3)
    (manifest,) = tmp_path.glob("*.json")
    for fingerprint in ("/../../../etc/x", 7, None, ["a" * 32], RECIPE.fingerprint.upper()):
        manifest.write_text(json.dumps({"fingerprint": fingerprint}))
        assert stored_fingerprints([shard]) == {shard.path: []}
    manifest.write_text("[" * 100_000)
    assert stored_fingerprints([shard]) == {shard.path: []} and load_manifest(shard, RECIPE.fingerprint) is None


@pytest.mark.parametrize("what", ["codes", "slots"])
def test_ids_that_the_model_cannot_have_stop_training_though_their_manifest_allows_them(
    generation, tokenizer, tmp_path, what
):
    ids = np.full((6, SLOTS), 5000, np.uint16) if what == "codes" else np.zeros((6, SLOTS - 1), np.uint16)
    for name, samples in (("a.tar", 6), ("b.tar", 5)):
        shard = ShardReader().stat(str(tmp_path / name))
        store_ids(shard, RECIPE, ids[:samples], codebook_size=6000, without_picture=0, pictures_sha256="", unusable=[])
    with pytest.raises(DataError, match="their manifest is wrong"):
        rows(generation, tokenizer, RECIPE)


@pytest.mark.parametrize("damage", ["missing", "short", "header", "id"])
def test_damaged_ids_are_an_error_that_names_the_file(tmp_path, damage):
    shard = store(write_shard(tmp_path / "a.tar", generation_samples(3)), 3)
    (path,) = tmp_path.glob("*.npy")
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        if damage == "header":
            data[60] ^= 1
        elif damage == "id":
            data[-1] = 0x7F
        path.write_bytes(data[:-2] if damage == "short" else data)
    reader = ShardReader()
    with pytest.raises(DataError, match=path.name):
        open_ids(shard, RECIPE.fingerprint, reader).row(2)
    expected = IdsState.done if damage == "id" else IdsState.missing  # only its digest tells
    assert ids_state(shard, RECIPE.fingerprint, reader) is expected


def test_ids_of_a_changed_shard_are_stale_until_they_are_restamped(tmp_path):
    path = write_shard(tmp_path / "a.tar", generation_samples(3))
    store(path, 3)
    os.utime(path, ns=(1, 1))
    reader = ShardReader()
    shard = reader.stat(str(path))
    assert open_ids(shard, RECIPE.fingerprint, reader) is None
    assert ids_state(shard, RECIPE.fingerprint, reader) is IdsState.stale
    restamp_ids(shard, load_manifest(shard, RECIPE.fingerprint))
    assert ids_state(shard, RECIPE.fingerprint, reader) is IdsState.done


def test_shares_are_whole_disjoint_balanced_and_the_same_whatever_the_order():
    shards = [Shard(path=f"/d/{n}.tar", size=1000 + 37 * (n * n % 11), stamp="") for n in range(23)]
    for world in (1, 2, 3, 8, 40):
        share = shares(shards, world)
        assert share == shares(shards[::-1], world)
        assert sorted(shard.path for of_rank in share for shard in of_rank) == sorted(shard.path for shard in shards)
        loads = [sum(shard.size for shard in of_rank) for of_rank in share]
        assert max(loads) - min(loads) <= max(shard.size for shard in shards)


def test_rows_take_stored_ids_and_read_no_picture(generation, tokenizer, tmp_path):
    plain = rows(generation, tokenizer, RECIPE)
    store(tmp_path / "a.tar", 6)
    store(tmp_path / "b.tar", 5)
    # a reader of any picture would see that it is broken: same sizes, so that the index stays valid
    for name in ("a.tar", "b.tar"):
        stamp = (tmp_path / name).stat().st_mtime_ns
        data = (tmp_path / name).read_bytes().replace(b"\x89PNG", b"XXXX")
        assert data != (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, ns=(stamp, stamp))
    for workers in (0, 1):
        cached = rows(generation, tokenizer, RECIPE, workers=workers)
        for before, after in zip(plain, cached, strict=True):
            assert after.provenance == before.provenance and not after.skipped
            for name in ("input_ids", "labels", "position_ids", "gen_slots", "cu_seqlens", "document_lengths"):
                assert getattr(before, name).equal(getattr(after, name)), name
            assert len(after.gen_images) == len(after.gen_pending) == 0 < len(before.gen_images)
            numbers = [int(document.key[1:]) for row in after.provenance for document in row]
            table = np.concatenate([ids_of(6), ids_of(5)])[numbers]
            np.testing.assert_array_equal(after.gen_ids.numpy(), table)
            labels = np.where(before.gen_labels.numpy() == PENDING_VQ_ID, -1, before.gen_labels.numpy())
            labels[after.gen_slots.numpy() - 1] = table.ravel()
            np.testing.assert_array_equal(after.gen_labels.numpy(), labels)


def test_an_unusable_picture_is_skipped_with_the_entry_it_has_without_stored_ids(generation, tokenizer, tmp_path):
    broken = [
        (key, {**fields, "png": fields["png"][:60]} if key == "g0001" else fields)
        for key, fields in generation_samples(6)
    ]
    write_shard(tmp_path / "a.tar", broken)
    plain = [skip for batch in rows(generation, tokenizer, RECIPE) for skip in batch.skipped]
    assert plain and {skip.info.key for skip in plain} == {"g0001"}
    store(tmp_path / "a.tar", 6, unusable={1: ("g0001", plain[0].reason)})
    store(tmp_path / "b.tar", 5)
    assert [skip for batch in rows(generation, tokenizer, RECIPE) for skip in batch.skipped] == plain


def test_a_shard_without_ids_is_read_as_before_and_the_log_says_so(generation, tokenizer, tmp_path):
    store(tmp_path / "a.tar", 6)
    (index,) = use_stored_ids(generation.data, index_sources(generation, tokenizer), RECIPE)
    assert describe_use(index) == "gen: stored for 1 of 2 shards, the other images are encoded in training"
    assert ids_summary(index) == {RECIPE.fingerprint: 1}
    for batch in rows(generation, tokenizer, RECIPE):
        keys = [document.key for row in batch.provenance for document in row]
        assert [keys[number] >= "g0006" for number in range(len(keys))] == [
            number in batch.gen_pending.tolist() for number in range(len(keys))
        ]


def test_ids_of_another_vq_are_refused_by_shard_fingerprints_and_remedy(generation, tokenizer, tmp_path):
    store(tmp_path / "a.tar", 6)
    store(tmp_path / "b.tar", 5, OTHER)
    with pytest.raises(DataError) as refusal:
        rows(generation, tokenizer, RECIPE)
    for part in (
        "b.tar",
        OTHER.fingerprint,
        RECIPE.fingerprint,
        "vq is " + "b" * 32,
        "encode-images",
        "data.vq_ids=off",
    ):
        assert part in str(refusal.value)
    store(tmp_path / "b.tar", 5)  # beside the others: now the run's own are there
    assert rows(generation, tokenizer, RECIPE)


def test_ids_of_an_older_file_are_refused(generation, tokenizer, tmp_path):
    store(tmp_path / "a.tar", 6)
    os.utime(tmp_path / "a.tar", ns=(1, 1))
    with pytest.raises(DataError, match=r"a\.tar.*encode-images` again"):
        rows(generation, tokenizer, RECIPE)


def test_off_is_a_word_on_the_command_line_and_in_yaml(generation, tmp_path):
    save_config(generation, tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml", ["data.vq_ids=off"]).data.vq_ids is VqIds.off
    (tmp_path / "short.yaml").write_text((tmp_path / "run.yaml").read_text().replace("vq_ids: auto", "vq_ids: off"))
    config = load_config(tmp_path / "short.yaml")
    assert config.data.vq_ids is VqIds.off
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml").data.vq_ids is VqIds.off


def test_require_names_the_shards_that_lack_ids(generation, tokenizer, tmp_path):
    generation.data.vq_ids = VqIds.require
    store(tmp_path / "a.tar", 6)
    with pytest.raises(DataError, match=r"1 of 2 shards.*b\.tar.*encode-images"):
        rows(generation, tokenizer, RECIPE)
    store(tmp_path / "b.tar", 5)
    assert rows(generation, tokenizer, RECIPE)
    generation.data.crop = Crop.random
    with pytest.raises(ConfigError, match="centre crop"):
        validate(generation)


@pytest.mark.parametrize("change", [{"vq_ids": VqIds.off}, {"crop": Crop.random}])
def test_ids_are_left_alone_when_switched_off_or_of_another_crop(generation, tokenizer, tmp_path, change):
    store(tmp_path / "a.tar", 6, OTHER)
    store(tmp_path / "b.tar", 5)
    for key, value in change.items():
        setattr(generation.data, key, value)
    assert all(len(batch.gen_pending) == len(batch.gen_ids) for batch in rows(generation, tokenizer, RECIPE))


def test_embedded_ids_need_a_known_fingerprint_or_trust(generation, tokenizer, tmp_path):
    write_shard(tmp_path / "a.tar", stored_samples(6))
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=rf"unknown origin: .*a\.tar.*{RECIPE.fingerprint}.*data\.vq_ids=trust"):
        rows(generation, tokenizer, RECIPE)
    generation.data.vq_ids = VqIds.off
    with pytest.raises(DataError, match="no image that could be encoded"):
        rows(generation, tokenizer, RECIPE)
    generation.data.vq_ids = VqIds.trust
    trusted = rows(generation, tokenizer, RECIPE)
    generation.data.vq_ids = VqIds.auto
    (tmp_path / "manifest.json").write_text(json.dumps({"vq": {"fingerprint": RECIPE.fingerprint}}))
    for before, after in zip(trusted, rows(generation, tokenizer, RECIPE), strict=True):
        assert before.gen_ids.equal(after.gen_ids) and before.gen_labels.equal(after.gen_labels)
    for mode in (VqIds.auto, VqIds.trust):
        generation.data.vq_ids = mode
        (tmp_path / "manifest.json").write_text(json.dumps({"vq": {"fingerprint": OTHER.fingerprint}}))
        with pytest.raises(DataError, match=f"{OTHER.fingerprint}.*{RECIPE.fingerprint}"):
            rows(generation, tokenizer, RECIPE)


def test_off_encodes_the_picture_of_a_sample_that_has_embedded_ids_too(generation, tokenizer, tmp_path):
    both = {"png": png(3), "json": json_bytes({"caption": "both"}), "vq.npy": npy(ids_of(1)[0])}
    write_shard(tmp_path / "a.tar", [(f"x{n}", both) for n in range(6)])
    generation.data.vq_ids = VqIds.off
    assert all(len(batch.gen_pending) == len(batch.gen_ids) for batch in rows(generation, tokenizer, RECIPE))
    generation.data.vq_ids = VqIds.auto
    store(tmp_path / "a.tar", 6)  # stored ids win over embedded ones, whose origin then does not matter
    store(tmp_path / "b.tar", 5)
    assert all(len(batch.gen_pending) == 0 for batch in rows(generation, tokenizer, RECIPE))


def test_held_out_batches_use_the_same_rules(generation, tokenizer, tmp_path):
    generation.validation.sources = dict(generation.data.sources)
    store(tmp_path / "a.tar", 6)
    store(tmp_path / "b.tar", 5)
    (batch, *_) = validation_batches(generation, tokenizer, "gen", 0, 1, RECIPE)
    assert len(batch.gen_ids) and not len(batch.gen_pending)
    with pytest.raises(DataError, match="fingerprint"):
        validation_batches(generation, tokenizer, "gen", 0, 1, OTHER)


def test_ids_go_to_the_cache_when_the_folder_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # a folder that does not exist cannot be written, also by root
    shard = Shard(path=str(tmp_path / "gone" / "a.tar"), size=1, stamp="1")
    store_ids(shard, RECIPE, ids_of(3), codebook_size=64, without_picture=0, pictures_sha256="", unusable=[])
    np.testing.assert_array_equal(open_ids(shard, RECIPE.fingerprint, ShardReader()).row(1), ids_of(3)[1])
    assert stored_fingerprints([shard])[shard.path] == [RECIPE.fingerprint]


def test_sources_of_other_kinds_need_no_vq(cfg, tokenizer, tmp_path):
    write_shard(tmp_path / "t.tar", text_samples(3))
    cfg.data.root = str(tmp_path)
    cfg.data.sources = {"text": SourceConfig(kind=SourceKind.text, shards="t.tar")}
    indexes = index_sources(cfg, tokenizer)
    assert use_stored_ids(cfg.data, indexes, None) == indexes


def test_with_index_dir_ids_beside_the_shards_are_read_and_never_touched(tmp_path):
    path = write_shard(tmp_path / "data" / "a.tar", generation_samples(3))
    here, away = ShardReader().stat(str(path)), ShardReader(index_dir=str(tmp_path / "index")).stat(str(path))
    given = dict(codebook_size=64, without_picture=0, pictures_sha256="p", unusable=())
    store_ids(here, RECIPE, ids_of(3), **given)
    beside = sorted(os.listdir(path.parent))
    np.testing.assert_array_equal(open_ids(away, RECIPE.fingerprint, ShardReader()).row(1), ids_of(3)[1])
    other = (ids_of(3) + 1) % 64
    manifest = store_ids(away, RECIPE, other, **given)
    assert manifest.ids_path.is_relative_to(tmp_path / "index") and sorted(os.listdir(path.parent)) == beside
    np.testing.assert_array_equal(open_ids(away, RECIPE.fingerprint, ShardReader()).row(1), other[1])
    assert stored_fingerprints([away])[away.path] == [RECIPE.fingerprint]
