"""The parts of a run, opened one by one on one real rank, and what a resumed run refuses."""

from __future__ import annotations

import copy
import io
import math
import socket
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2

from jp_train.config import RunConfig, batch_plan
from jp_train.config.schema import SourceConfig, SourceKind
from jp_train.data.ledger import Ledger
from jp_train.data.loader import build_plan
from jp_train.data.shards import expand_shards
from jp_train.engine.checkpoint.files import Checkpoint
from jp_train.engine.checkpoint.saver import Saver
from jp_train.engine.checkpoint.store import CheckpointStore
from jp_train.engine.init import Engine, Ranks, init_process_group
from jp_train.engine.watch.guard import SequenceGuard
from jp_train.errors import CheckpointError, DataError
from jp_train.model.export import RUN_CONFIG
from jp_train.model.freeze import module_of
from jp_train.run.log import RunLog
from jp_train.train.preparation import (
    RESUMED_INPUTS,
    OpenData,
    changed_template,
    check_resumed_inputs,
    describe_inputs,
    open_data,
    open_engine,
    open_held_out,
    resume,
)
from jp_train.train.session import train
from tests.engine.tiny_run import tiny_run, write_data


def small(data: Path, run_dir: Path, **options) -> RunConfig:
    cfg = tiny_run(data, run_dir, **options)
    cfg.model.vision.layers = cfg.model.language.layers = 1
    return cfg


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank; its environment is put back."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {**place, "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(key, value)
        yield init_process_group(RunConfig())
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def finished(data, ranks, tmp_path_factory) -> RunConfig:
    """A run of two steps with a checkpoint after the last."""
    cfg = small(data, tmp_path_factory.mktemp("finished"), steps=2)
    cfg.checkpoint.export_at_end = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jp_train.train.session.leave_process_group", lambda code: None)  # the tests below need it
        assert train(cfg) == 0
    return cfg


@pytest.fixture(scope="module")
def opened(finished, ranks) -> tuple[OpenData, Engine]:
    log = quiet(finished)
    inputs = open_data(finished, ranks, log, SequenceGuard(None, 0))
    return inputs, open_engine(finished, batch_plan(finished, 1), ranks, log, inputs.tokenizer)


def quiet(cfg: RunConfig) -> RunLog:
    return RunLog(cfg, active=False, dp_world_size=1)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: parameter.ds_tensor.clone() for name, parameter in engine.model.named_parameters()}


def newest(cfg: RunConfig) -> Checkpoint:
    store = CheckpointStore(Path(cfg.run_dir), cfg.checkpoint, dp_rank=0, dp_world_size=1)
    checkpoint = store.newest(on_damage=pytest.fail)
    assert checkpoint is not None
    return checkpoint


def test_open_data_indexes_every_source_and_says_which_vq_ids_would_fit(opened, finished):
    inputs, engine = opened
    assert [index.name for index in inputs.indexes] == list(finished.data.sources)
    assert inputs.held_out_indexes == [] and inputs.ids_recipe is not None
    assert inputs.ids_recipe.vq == engine.vq.fingerprint()


@pytest.mark.parametrize("place", ["data", "validation"])
def test_a_source_of_which_too_much_is_bad_does_not_start_and_below_the_limit_is_named(
    place, finished, ranks, tmp_path, monkeypatch
):
    cfg = copy.deepcopy(finished)
    with tarfile.open(tmp_path / "text.tar", "w") as tar:
        for number in range(20):
            content = b"" if number % 4 == 0 else b"A text of its own."
            member = tarfile.TarInfo(f"{number:02}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    getattr(cfg, place).sources = {"some": SourceConfig(kind=SourceKind.text, shards=str(tmp_path / "text.tar"))}
    with pytest.raises(DataError, match=rf"{place}\.sources\.some: 5 of 20 samples \(25 %\) are bad.*is empty"):
        open_data(cfg, ranks, quiet(cfg), SequenceGuard(None, 0))
    cfg.data.max_bad_share = 0.25
    said: list[str] = []
    log = quiet(cfg)
    monkeypatch.setattr(log, "say", said.append)
    open_data(cfg, ranks, log, SequenceGuard(None, 0))
    assert sum("5 of 20 samples" in text and "ledger.jsonl" in text for text in said) == 1


def test_tars_that_are_no_shards_are_named_at_the_start(finished, ranks, monkeypatch):
    cfg = copy.deepcopy(finished)
    root = Path(cfg.data.root)
    (root / "only").mkdir()
    (name, source), *_ = cfg.data.sources.items()
    (root / "only" / "a.tar").symlink_to(expand_shards(source.shards, root)[0])
    (root / "only" / "b.tar.gz").write_bytes(b"")
    cfg.data.sources = {name: source}
    source.shards = "only"
    said: list[str] = []
    log = quiet(cfg)
    monkeypatch.setattr(log, "say", said.append)
    open_data(cfg, ranks, log, SequenceGuard(None, 0))
    assert f"source {name}: 1 *.tar.gz passed over" in "\n".join(said)


def test_open_engine_trains_what_the_stage_names_and_nothing_else(opened, finished):
    _, engine = opened
    trained = {module_of(name) for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    assert trained == set(finished.stage.trainable) and engine.weights.startswith("fresh")


@pytest.mark.parametrize(
    ("before", "stage", "noted"), [("stage2", 3, True), ("stage1", 2, False), ("stage3", 3, False)]
)
def test_a_stage_says_at_its_start_when_it_asks_in_another_form_than_the_run_it_starts_from(
    tmp_path, before, stage, noted
):
    cfg = tiny_run(tmp_path, tmp_path / "run", stage=stage, init_from=tmp_path)
    assert changed_template(cfg) == "", "a released model has no configuration of a run"
    (tmp_path / RUN_CONFIG).write_text(f"stage:\n  template: {before}\n")
    sentence = changed_template(cfg)
    assert bool(sentence) == noted
    if noted:
        assert sentence.startswith("stage.template stage2 -> stage3: ") and str(tmp_path) in sentence


@pytest.mark.parametrize("file", ["export/jp_train.yaml", "jp_train.yaml", "config.yaml"])
def test_the_form_before_is_read_from_a_run_folder_an_export_and_a_checkpoint(tmp_path, file):
    cfg = tiny_run(tmp_path, tmp_path / "run", stage=3, init_from=tmp_path / "before")
    (tmp_path / "before" / file).parent.mkdir(parents=True)
    (tmp_path / "before" / file).write_text("stage:\n  template: stage2\n")
    assert changed_template(cfg).startswith("stage.template stage2 -> stage3: ")
    for damaged in ("stage: [", "stage: 2", "[]"):
        (tmp_path / "before" / file).write_text(damaged)
        assert changed_template(cfg) == "", "a damaged file stops no training"


def test_a_held_out_source_is_measured_and_their_absence_is_none(opened, finished, ranks):
    inputs, engine = opened
    ledger = Ledger(finished.run_dir, finished)
    assert not open_held_out(finished, ranks, quiet(finished), inputs, engine, ledger)
    cfg = copy.deepcopy(finished)
    cfg.validation.sources = {"held": SourceConfig(kind=SourceKind.generation, shards="held-gen.tar")}
    measured = open_held_out(cfg, ranks, quiet(cfg), inputs, engine, ledger).measure(engine)
    assert list(measured) == ["val/held", "val/generation", "val/total"]
    assert abs(measured["val/total"] - math.log(cfg.model.vq.codebook_size)) < 0.2, "untrained: all ids equally likely"


def test_resume_puts_weights_plan_and_ledger_back(opened, finished, ranks):
    inputs, engine = opened
    checkpoint = newest(finished)
    before = weights(engine)
    plan = build_plan(finished, inputs.indexes, batch_plan(finished, 1), inputs.tokenizer)
    ledger = Ledger(finished.run_dir, finished)
    store = CheckpointStore(Path(finished.run_dir), finished.checkpoint, dp_rank=0, dp_world_size=1)
    saver = Saver(finished, store, engine, quiet(finished), saved_step=checkpoint.step)
    resume(checkpoint, plan, saver, ledger)
    assert plan.state() == checkpoint.state["plan"] and plan.state()["step"] == 2
    assert ledger.state() == checkpoint.state["ledger"]
    assert engine.deepspeed.global_steps == 2
    moved = {module_of(name) for name, tensor in weights(engine).items() if not torch.equal(tensor, before[name])}
    assert moved == set(finished.stage.trainable), "two steps moved what is trained; resume brings that back, no more"
    check_resumed_inputs(checkpoint, describe_inputs(ranks, inputs.tokenizer, engine))


@pytest.mark.parametrize("key", ["tokenizer", "frozen_checksum", "vq_fingerprint"])
def test_a_resume_with_another_tokenizer_other_frozen_weights_or_another_vq_is_refused(key, finished):
    checkpoint = newest(finished)
    about = copy.deepcopy(dict(checkpoint.manifest))
    check_resumed_inputs(checkpoint, about)  # the same contents: nothing to refuse
    about[key] = "another"
    with pytest.raises(CheckpointError) as refused:
        check_resumed_inputs(checkpoint, about)
    assert RESUMED_INPUTS[key] in str(refused.value) and str(checkpoint.path) in str(refused.value)
    assert "put the old files back" in str(refused.value)


def test_a_run_whose_tokenizer_file_was_replaced_does_not_resume(data, finished, tmp_path, monkeypatch, ranks):
    monkeypatch.setattr("jp_train.train.session.leave_process_group", lambda code: None)
    other = copy.deepcopy(finished)
    other.stage.training_steps = 3
    # one score of the SentencePiece model: every id stays, the contents differ
    proto = sentencepiece_model_pb2.ModelProto.FromString(Path(finished.tokenizer.path).read_bytes())
    proto.pieces[-1].score -= 1.0
    replaced = tmp_path / "tiny.model"
    replaced.write_bytes(proto.SerializeToString())
    other.tokenizer.path = str(replaced)
    with pytest.raises(CheckpointError, match="made with another tokenizer"):
        train(other)
    assert newest(finished).step == 2
