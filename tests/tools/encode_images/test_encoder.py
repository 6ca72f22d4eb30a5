"""encode-images for real: ids against the VQ itself, shares of ranks, kills, verification, and training that cannot
tell where ids come from."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jp_train.cli.main import main
from jp_train.cluster.options import LaunchOptions
from jp_train.config import RunConfig, batch_plan, save_config
from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.image import load_generation_image
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan, rows_hash, validation_batches
from jp_train.data.shards import ShardReader
from jp_train.data.tokenizer import load_tokenizer
from jp_train.data.vq_ids import load_manifest, open_ids
from jp_train.data.vq_use import use_stored_ids
from jp_train.engine.vq_recipe import ids_recipe
from jp_train.errors import ConfigError, DataError
from jp_train.model.pretrained import load_vq, prepare_weights
from jp_train.model.vq import VQTokenizer, fill_pending
from jp_train.tools.encode_images.command import encode_images, encode_on_hosts
from jp_train.tools.encode_images.encoder import Place
from jp_train.types import PackedBatch
from tests.data.data_samples import generation_samples, write_shard
from tests.distributed import Launch, Nursery
from tests.engine.tiny_run import tiny_run, write_data

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
ALONE = Place(rank=0, world_size=1, device=CPU)
BROKEN = ("g0003", "g0008")


def configuration(data: Path) -> RunConfig:
    """The tiny run with a second generation source, two of whose pictures are broken, and held-out pictures."""
    cfg = tiny_run(data, data.parent / "run")
    cfg.data.sources["broken"] = SourceConfig(kind=SourceKind.generation, shards="gen-broken.tar")
    cfg.validation.sources = {"held": SourceConfig(kind=SourceKind.generation, shards="held-gen.tar")}
    return cfg


def sidecars(data: Path) -> dict[str, bytes]:
    """What is stored, by file name; a hidden name is the rest of a killed write."""
    return {path.name: path.read_bytes() for path in sorted(data.glob("*.jp-vq-*")) if not path.name.startswith(".")}


def copied(data: Path, to: Path) -> Path:
    """The folder again, sidecars and modification times included."""
    return Path(shutil.copytree(data, to))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("plain") / "data")


@pytest.fixture(scope="module")
def encoded(plain, tmp_path_factory) -> Path:
    """The same shards with their ids."""
    data = copied(plain, tmp_path_factory.mktemp("encoded") / "data")
    told, code = encode_images(configuration(data), ALONE)
    assert code == 0 and told["encoded"] == 3 and told["pictures"] == 25 + 12 - 2 + 3
    assert [key for key in BROKEN if any(key in line for line in told["unusable"])] == list(BROKEN) and len(
        told["unusable"]
    ) == 2
    return data


def test_stored_ids_are_what_the_vq_says_of_each_picture_alone(encoded) -> None:
    cfg = configuration(encoded)
    vq, recipe, reader = load_vq(cfg.model, seed=cfg.seed), ids_recipe(cfg), ShardReader()
    for name, samples in (
        ("gen.tar", generation_samples(25)),
        ("gen-broken.tar", generation_samples(12)),
        ("held-gen.tar", generation_samples(3, 100)),
    ):
        stored = open_ids(reader.stat(str(encoded / name)), recipe.fingerprint, reader)
        for number, (key, fields) in enumerate(samples):
            row = stored.row(number)
            if name == "gen-broken.tar" and key in BROKEN:
                assert row is None and "undecodable" in stored.unusable[key]
                continue
            pixels = torch.from_numpy(load_generation_image(fields["png"], cfg.model.vision.image_size))[None]
            np.testing.assert_array_equal(row, vq.encode(pixels)[0].numpy())


def test_the_vq_alone_is_the_one_that_training_loads(tmp_path) -> None:
    from jp_train.model.janus_pro import JanusPro

    cfg = tiny_run(tmp_path, tmp_path / "run")
    vq = VQTokenizer(cfg.model.vq, cfg.model.vision.image_size)
    model = JanusPro(cfg.model, cfg.loss, 1, False, 0)
    prepare_weights(model, vq, cfg.model, trainable=cfg.stage.trainable, seed=cfg.seed)
    torch.save(vq.vqmodel.state_dict(), tmp_path / "vq.pt")
    assert load_vq(cfg.model, seed=cfg.seed).fingerprint() == vq.fingerprint()
    cfg.model.init_parts.gen_vision_model = str(tmp_path / "vq.pt")
    assert load_vq(cfg.model, seed=cfg.seed + 1).fingerprint() == vq.fingerprint()
    cfg.model.init_parts.gen_vision_model = None
    assert load_vq(cfg.model, seed=cfg.seed + 1).fingerprint() != vq.fingerprint()


def filled(cfg: RunConfig, steps: int = 6) -> list[PackedBatch]:
    """Training rows and held-out batches as the model gets them: every id known, no picture to generate left."""
    tokenizer, vq, recipe = load_tokenizer(cfg.tokenizer), load_vq(cfg.model, seed=cfg.seed), ids_recipe(cfg)
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
        batches = [one for step in itertools.islice(loader, steps) for one in step.micro_batches]
    batches += validation_batches(cfg, tokenizer, "held", 0, 1, recipe)
    return [fill_pending(one, vq) for one in batches]


def test_rows_are_bit_for_bit_the_same_with_stored_ids_and_encoded_on_the_fly(plain, encoded) -> None:
    expected, found = filled(configuration(plain)), filled(configuration(encoded))
    assert rows_hash(expected) == rows_hash(found)
    assert any(len(batch.gen_ids) for batch in expected)
    skipped = 0
    for before, after in zip(expected, found, strict=True):
        for name in PackedBatch.__slots__:
            if isinstance(getattr(before, name), torch.Tensor):
                assert torch.equal(getattr(before, name), getattr(after, name)), name
        entries = [
            [(skip.info.source, skip.info.key, skip.ref, skip.reason) for skip in batch.skipped]
            for batch in (before, after)
        ]
        assert entries[0] == entries[1]
        skipped += len(entries[0])
    assert skipped


@pytest.mark.parametrize("world", [2, 5])
def test_ranks_together_write_what_one_process_writes(plain, encoded, tmp_path, world) -> None:
    data = copied(plain, tmp_path / "data")
    cfg = configuration(data)
    for rank in reversed(range(world)):
        told, _ = encode_images(cfg, Place(rank=rank, world_size=world, device=CPU))
        assert len(told["recipe"]) == 5 and told["already_done"] == 0
        assert told["encoded"] == [1, 2][rank] if world == 2 else told["encoded"] == (rank < 3)
    assert sidecars(data) == sidecars(encoded)
    assert all(line["mib_left"] == 0 for line in told["ranks"]) and len(told["ranks"]) == world


def test_a_second_run_finds_everything_done_and_a_dry_run_writes_nothing(plain, encoded, tmp_path, capsys) -> None:
    data = copied(plain, tmp_path / "data")
    told, _ = encode_images(configuration(data), ALONE, dry_run=True, world_size=2)
    assert sidecars(data) == {} and [(line["shards"], line["done"]) for line in told["ranks"]] == [(1, 0), (2, 0)]
    assert told["fingerprint"] in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in encoded.glob("*.jp-vq-*")}
    told, _ = encode_images(configuration(encoded), ALONE)
    assert (told["encoded"], told["already_done"], told["pictures"]) == (0, 3, 0)
    assert before == {path: path.stat().st_mtime_ns for path in encoded.glob("*.jp-vq-*")}


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
from pathlib import Path
import tests.tools.encode_images.test_encoder as tests
from jp_train.data import vq_ids

def run_and_die(data, where):
    real, calls = vq_ids.write_sidecar, 0

    def fatal(shard, suffix, write):
        nonlocal calls
        calls += 1
        if calls == 3 and where == "in-the-file":  # the ids of the second shard, half written
            def write(file, whole=write):
                whole(file); file.truncate(200); file.flush(); os.kill(os.getpid(), signal.SIGKILL)
        path = real(shard, suffix, write)
        if calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)  # the ids are there, their manifest is not
        return path

    vq_ids.write_sidecar = fatal
    tests.encode_images(tests.configuration(Path(data)), tests.ALONE)

children = []
for data, where in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    children.append(os.fork())
    if not children[-1]:
        run_and_die(data, where)
assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [-signal.SIGKILL] * 2
"""


def test_a_run_killed_while_it_writes_is_resumed_and_no_half_file_is_taken_for_whole(plain, encoded, tmp_path) -> None:
    places = {where: copied(plain, tmp_path / where / "data") for where in ("in-the-file", "before-the-manifest")}
    words = [str(word) for where, data in places.items() for word in (data, where)]
    script = KILLED.format(paths=[str(ROOT)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for where, data in places.items():
        assert (
            sorted(name.endswith(".json") for name in sidecars(data))
            == {"in-the-file": [False, True], "before-the-manifest": [False, False, True]}[where]
        )
        cfg = configuration(data)
        indexes = use_stored_ids(cfg.data, index_sources(cfg, load_tokenizer(cfg.tokenizer)), ids_recipe(cfg))
        assert sum(len(index.locator.shards_with_ids) for index in indexes) == 1
        told, _ = encode_images(cfg, ALONE)
        assert (told["encoded"], told["already_done"]) == (2, 1)
        assert sidecars(data) == sidecars(encoded)


def test_a_touched_shard_is_recognised_and_a_changed_picture_is_not(encoded, tmp_path) -> None:
    data = copied(encoded, tmp_path / "data")
    cfg = configuration(data)
    os.utime(data / "gen.tar", ns=(5, 5))
    changed = generation_samples(3, first=100)
    changed[1] = (changed[1][0], {**changed[1][1], "png": generation_samples(1, first=7)[0][1]["png"]})
    write_shard(data / "held-gen.tar", changed)
    ids = (data / "gen.tar").parent.glob("gen.tar*.npy").__next__().read_bytes()
    told, _ = encode_images(cfg, ALONE)
    assert (told["recognised"], told["encoded"], told["already_done"]) == (1, 1, 1)
    assert next(data.glob("gen.tar*.npy")).read_bytes() == ids
    reader, recipe = ShardReader(), ids_recipe(cfg)
    before, after = (
        open_ids(reader.stat(str(folder / "held-gen.tar")), recipe.fingerprint, reader) for folder in (encoded, data)
    )
    same = [bool((before.row(number) == after.row(number)).all()) for number in range(3)]
    assert same == [True, False, True]


def planted(encoded: Path, to: Path, *, hide: bool) -> tuple[Path, RunConfig]:
    """A copy in which one id of sample 2 of gen.tar is wrong; `hide`: the manifest vouches for it."""
    data = copied(encoded, to)
    cfg = configuration(data)
    path = next(data.glob("gen.tar*.npy"))
    stored = bytearray(path.read_bytes())
    stored[128 + 2 * 16 * 2] ^= 1
    path.write_bytes(stored)
    if hide:
        manifest = path.with_suffix(".json")
        told = json.loads(manifest.read_text()) | {"ids_sha256": hashlib.sha256(stored).hexdigest()}
        manifest.write_text(json.dumps(told))
    return data, cfg


def test_verification_compares_ids_exactly_and_names_what_differs(encoded, tmp_path) -> None:
    told, code = encode_images(configuration(encoded), ALONE, verify_sample=1000)
    assert (
        code == 0
        and told["verified"]["samples"] == 40
        and told["verified"]["ids"] == 38 * 16
        and not told["verified"]["problems"]
    )
    _, cfg = planted(encoded, tmp_path / "hidden", hide=True)
    told, code = encode_images(cfg, ALONE, verify_sample=1000)
    assert code == DataError.exit_code
    assert told["verified"]["mismatches"] == [f"{tmp_path / 'hidden' / 'gen.tar'}, key g0002: 1 of 16 ids differ"]
    assert told["verified"]["rate"] == 1 / (38 * 16)
    assert encode_images(cfg, ALONE, verify_sample=1000, max_mismatch=0.01)[1] == 0
    _, cfg = planted(encoded, tmp_path / "open", hide=False)
    told, code = encode_images(cfg, ALONE, verify_sample=1000, max_mismatch=1.0)
    assert code == DataError.exit_code and "SHA-256" in told["verified"]["problems"][0]


def test_verifying_before_encoding_says_so(plain) -> None:
    # a rank without a shard
    told, code = encode_images(configuration(plain), Place(rank=4, world_size=5, device=CPU), verify_sample=3)
    assert code == 0 and told["verified"]["samples"] == 0
    with pytest.raises(DataError, match="encode first"):
        encode_images(configuration(plain), ALONE, verify_sample=3)


def test_the_command_line_prints_one_object_and_refuses_what_cannot_be(
    encoded, plain, tmp_path, capsys, monkeypatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    save_config(configuration(encoded), tmp_path / "run.yaml")
    assert main(["data", "encode-images", str(tmp_path / "run.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["already_done"] == 3 and told["ranks"][0]["mib_left"] == 0
    assert main(["data", "encode-images", str(tmp_path / "run.yaml"), "--batch", "0"]) == ConfigError.exit_code
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["data", "encode-images", str(tmp_path / "run.yaml")]) == ConfigError.exit_code
    assert "RANK 2 is not among" in capsys.readouterr().err


def test_a_hostfile_gives_the_deepspeed_command_and_the_share_of_every_slot(encoded, tmp_path, capsys) -> None:
    save_config(configuration(encoded), tmp_path / "run.yaml")
    (tmp_path / "hosts").write_text("localhost slots=3\n")
    options = LaunchOptions(hostfile=tmp_path / "hosts", master_port=29700, dry_run=True)
    assert encode_on_hosts(tmp_path / "run.yaml", ["seed=7"], options, batch=4) == 0
    out = capsys.readouterr().out
    assert (
        f"--module jp_train.cluster.rank data encode-images {tmp_path / 'run.yaml'} seed=7 --batch=4" in out
        and "-m deepspeed.launcher.runner" in out
    )
    assert [line.split()[:3] for line in out.splitlines() if line.strip()[:1] in "012" and len(line.split()) == 5] == [
        ["0", "1", "1"],
        ["1", "1", "1"],
        ["2", "1", "1"],
    ]


@pytest.fixture(scope="module")
def trained(plain, encoded, tmp_path_factory) -> tuple[Launch, Path]:
    """Two ZeRO-3 ranks: without ids, with ids, and with a VQ of another seed that the ids do not belong to."""
    runs = tmp_path_factory.mktemp("runs")
    small = {
        "kind": "train",
        "steps": 4,
        "broken": True,
        "held_out": True,
        "model.vision.layers": 1,
        "model.language.layers": 1,
    }
    scenarios = [
        {"name": "fly", **small, "data": str(plain), "run_dir": str(runs / "fly")},
        {"name": "stored", **small, "data": str(encoded), "run_dir": str(runs / "stored")},
        {"name": "other", **small, "data": str(encoded), "run_dir": str(runs / "other"), "seed": 8},
    ]
    with Nursery(ROOT / "tests" / "engine" / "worker.py") as nursery:
        return nursery.run(runs / "launch", scenarios, world=2, timeout_s=900), runs


def test_two_zero3_ranks_train_to_the_same_losses_with_stored_ids(trained) -> None:
    launch, runs = trained
    assert launch.result("fly")["code"] == launch.result("stored")["code"] == 0
    assert [launch.result("fly", rank)["hashes"] for rank in (0, 1)] == [
        launch.result("stored", rank)["hashes"] for rank in (0, 1)
    ]
    measured = []
    for name in ("fly", "stored"):
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        kept = ("step", "loss/", "val/", "tokens/", "optim/", "data/skipped")
        measured.append([{key: value for key, value in line.items() if key.startswith(kept)} for line in lines])
    assert measured[0] == measured[1] and len(measured[0]) == 5
    assert sum("loss/generation" in line for line in measured[0]) >= 2
    ledgers = [
        [json.loads(line) for line in (runs / name / "ledger.jsonl").read_text().splitlines()]
        for name in ("fly", "stored")
    ]
    texts = [[(entry["key"], entry["reason"], entry["step"]) for entry in ledger] for ledger in ledgers]
    assert texts[0] == texts[1] and {key for key, *_ in texts[0]} <= set(BROKEN) and texts[0]


def test_training_refuses_ids_of_another_vq_on_every_rank_before_the_first_step(trained) -> None:
    launch, _ = trained
    for rank in (0, 1):
        result = launch.result("other", rank)
        assert (result["error"], result["exit_code"], result["hashes"]) == ("DataError", 3, {})
        assert "gen-broken.tar" in result["message"] and "encode-images" in result["message"]


def test_the_manifest_says_what_the_ids_were_made_with(encoded) -> None:
    cfg = configuration(encoded)
    recipe = ids_recipe(cfg)
    manifest = load_manifest(ShardReader().stat(str(encoded / "gen.tar")), recipe.fingerprint)
    assert manifest.recipe == recipe and recipe.vq == load_vq(cfg.model, seed=cfg.seed).fingerprint()
    assert (manifest.samples, manifest.slots, manifest.codebook_size, manifest.without_picture) == (25, 16, 64, 0)
