from __future__ import annotations

import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from jp_train.config.batch import batch_plan
from jp_train.config.schema import OverLong, PadDropoutForm, SourceConfig, SourceKind, Template
from jp_train.data.encode import Encoder
from jp_train.data.index import index_sources
from jp_train.data.ledger import Ledger
from jp_train.data.loader import StepLoader, build_plan, rows_hash, validation_batches
from jp_train.data.shards import ShardReader
from jp_train.errors import ConfigError, DataError
from jp_train.types import KINDS, PENDING_VQ_ID, Kind, PackedBatch
from tests.data.killed_fork_server import fork_server_killed_at_a_start

STEPS = 6


def loader_for(cfg, tokenizer, *, rank=0, world=1, workers=0, state=None) -> StepLoader:
    cfg.data.workers = workers
    indexes = index_sources(cfg, tokenizer)
    batch = batch_plan(cfg, world)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    if state is not None:
        plan.restore(state)
    return StepLoader(cfg, plan, indexes, tokenizer, dp_rank=rank, dp_world_size=world, batch_plan=batch)


def take(cfg, tokenizer, steps=STEPS, **options):
    with loader_for(cfg, tokenizer, **options) as loader:
        return list(itertools.islice(loader, steps))


def tensors_hash(batches: list[PackedBatch]) -> list[bytes]:
    """Every tensor of every batch, bit for bit."""
    return [
        getattr(batch, name).numpy().tobytes()
        for batch in batches
        for name in PackedBatch.__slots__
        if isinstance(getattr(batch, name), torch.Tensor)
    ]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_the_rows_of_a_step_do_not_know_how_many_ranks_or_workers_exist(mixed, tokenizer, workers):
    cfg = mixed()
    reference = take(cfg, tokenizer)
    expected_rows = [rows_hash(step.micro_batches) for step in reference]
    expected_tensors = [tensors_hash(step.micro_batches) for step in reference]
    for world in (1, 2, 4):
        ranks = [take(cfg, tokenizer, rank=rank, world=world, workers=workers) for rank in range(world)]
        for number, steps in enumerate(zip(*ranks, strict=True)):
            batches = [batch for step in steps for batch in step.micro_batches]
            assert [step.step for step in steps] == [number] * world
            assert rows_hash(batches) == expected_rows[number]
            assert tensors_hash(batches) == expected_tensors[number]
            assert all(step.plan_state == reference[number].plan_state for step in steps)


@pytest.mark.parametrize(("workers", "world"), [(0, 1), (2, 2), (1, 4)])
def test_a_loader_restored_from_any_steps_state_gives_the_same_remaining_rows(mixed, tokenizer, workers, world):
    cfg = mixed()
    whole = take(cfg, tokenizer, steps=12)
    cut = random.Random(workers).randrange(1, 9)
    # the killed run: stopped without notice after `cut` steps, while its workers are ahead
    killed = loader_for(cfg, tokenizer, workers=workers)
    state = json.loads(json.dumps([next(killed) for _ in range(cut)][-1].plan_state))
    killed.close()
    ranks = [
        take(cfg, tokenizer, steps=12 - cut, rank=rank, world=world, workers=workers, state=state)
        for rank in range(world)
    ]
    for expected, steps in zip(whole[cut:], zip(*ranks, strict=True), strict=True):
        batches = [batch for step in steps for batch in step.micro_batches]
        assert rows_hash(batches) == rows_hash(expected.micro_batches)
        assert tensors_hash(batches) == tensors_hash(expected.micro_batches)


def test_a_corrupt_picture_changes_no_other_document_and_is_in_the_ledger(mixed, tokenizer, tmp_path):
    cfg = mixed()
    clean = take(cfg, tokenizer)
    broken = frozenset({"g0003", "u0005"})
    cfg = mixed(broken)
    damaged = take(cfg, tokenizer, workers=1)
    cfg.data.skip_minimum = 1000
    ledger = Ledger(tmp_path / "run", cfg)
    skipped = 0
    for before, after in zip(clean, damaged, strict=True):
        assert before.plan_state["step"] == after.plan_state["step"]
        for old, new in zip(before.micro_batches, after.micro_batches, strict=True):
            kept = [tuple(d for d in row if d.key not in broken) for row in old.provenance]
            assert list(new.provenance) == kept
            lost = [d.key for row in old.provenance for d in row if d.key in broken]
            assert [bad.info.key for bad in new.skipped] == lost
            skipped += len(lost)
            good = [n for n, d in enumerate(itertools.chain(*old.provenance)) if d.key not in broken]
            for name in ("input_ids", "labels", "gen_labels", "position_ids"):
                parts = torch.split(getattr(old, name), old.document_lengths.tolist())
                if good:
                    assert torch.equal(getattr(new, name), torch.cat([parts[n] for n in good]))
        bad = [skip for batch in after.micro_batches for skip in batch.skipped]
        ledger.record(bad, after.used_per_source, after.step)
    assert skipped >= 2
    entries = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert len(entries) == skipped and {entry["key"] for entry in entries} == broken
    assert all("undecodable" in entry["reason"] and entry["shard"].endswith(".tar") for entry in entries)


def test_batches_follow_the_plan_and_their_own_invariants(mixed, tokenizer):
    cfg = mixed()
    cfg.engine.micro_batch_rows = 4
    sources = list(cfg.data.sources)
    for step in take(cfg, tokenizer):
        assert [batch.rows for batch in step.micro_batches] == [4, 4]
        for batch in step.micro_batches:
            documents = [d for row in batch.provenance for d in row]
            assert [len(batch.input_ids)] == [sum(d.length for d in documents)]
            assert batch.document_lengths.tolist() == [d.length for d in documents]
            assert [sources[n] for n in batch.document_sources] == [d.source for d in documents]
            assert [KINDS[n] for n in batch.document_kinds] == [d.kind for d in documents]
            assert all(sum(d.length for d in row) <= cfg.data.seq_len for row in batch.provenance)
            assert not ((batch.labels != -100) & (batch.gen_labels != -100)).any()
            placeholder = tokenizer.special.image_placeholder
            slots = torch.cat([batch.und_slots, batch.gen_slots]).sort().values
            assert torch.equal((batch.input_ids == placeholder).nonzero()[:, 0], slots)
            pending = torch.zeros(len(batch.gen_ids), dtype=torch.bool)
            pending[batch.gen_pending] = True
            assert torch.equal((batch.gen_ids == PENDING_VQ_ID).all(1), pending)
            assert len(batch.gen_images) == int(pending.sum())


def test_documents_follow_the_mixture(mixed, tokenizer):
    started = dict.fromkeys(KINDS, 0)
    for step in take(mixed(), tokenizer, steps=25):
        for document in itertools.chain(*(row for batch in step.micro_batches for row in batch.provenance)):
            started[document.kind] += document.start == 0
    total = sum(started.values())
    for kind, share in zip(KINDS, (0.2, 0.3, 0.5), strict=True):
        assert abs(started[kind] / total - share) < 0.02


@pytest.mark.parametrize("form", list(PadDropoutForm))
def test_lengths_of_dropped_and_short_documents_agree_with_the_plan(mixed, tokenizer, form):
    cfg = mixed()
    cfg.data.pad_dropout, cfg.data.pad_dropout_form = 0.5, form
    for step in take(cfg, tokenizer):
        for batch in step.micro_batches:
            assert sum(d.length for row in batch.provenance for d in row) == len(batch.input_ids)


@pytest.mark.parametrize("template", list(Template))
def test_long_documents_are_truncated_or_cut_to_what_the_plan_says(mixed, tokenizer, template):
    cfg = mixed()
    cfg.stage.template = template
    cfg.data.seq_len = 60
    truncated, cut = 0, 0
    for step in take(cfg, tokenizer, steps=12):
        for batch in step.micro_batches:
            truncated += batch.truncated_tokens
            cut += sum(d.start > 0 for row in batch.provenance for d in row)
            assert all(sum(d.length for d in row) <= 60 for row in batch.provenance)
    assert cut > 0  # the text source is plain text, so it may be cut in every stage
    if template is Template.stage3:
        assert truncated > 0


def test_cut_texts_lose_no_token(mixed, tokenizer):
    cfg = mixed()
    cfg.data.sources = {"text": cfg.data.sources["text"]}
    cfg.stage.mixture.understanding = cfg.stage.mixture.generation = 0
    cfg.data.seq_len, cfg.data.over_long = 48, OverLong.truncate
    spans: dict[str, list[tuple[int, int]]] = {}
    for step in take(cfg, tokenizer, steps=8):
        for batch in step.micro_batches:
            for document in itertools.chain(*batch.provenance):
                spans.setdefault(document.key, []).append((document.start, document.length))
    index = index_sources(cfg, tokenizer)[0]
    whole = 0
    for key, parts in spans.items():
        tokens, position = int(index.tokens[int(key[1:])]), 0
        for start, length in parts:
            assert start == position
            position = (start + length) % tokens
            whole += position == 0
    assert whole > 10


def test_the_loader_draws_nothing_from_the_global_generators(mixed, tokenizer):
    cfg = mixed()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    before = torch.random.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate()
    take(cfg, tokenizer, steps=2, workers=1)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]


def test_a_killed_worker_is_an_error_that_names_the_row_and_its_first_document(mixed, tokenizer):
    cfg = mixed()
    loader = loader_for(cfg, tokenizer, workers=1)
    next(loader)
    (worker,) = loader._iterator._workers
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(
        DataError, match=r"worker died while row \d+ of step \d+ .*first document is source '\w+', shard .*\.tar, key"
    ):
        for _ in range(20):
            next(loader)
    loader.close()


def test_a_fork_server_that_is_killed_while_it_starts_a_worker_is_an_error_of_the_data(mixed, tokenizer):
    loader = loader_for(mixed(), tokenizer, workers=1)
    with fork_server_killed_at_a_start(), pytest.raises(DataError, match="worker died while the workers were started"):
        next(loader)
    loader.close()
    with loader_for(mixed(), tokenizer, workers=1) as again:
        assert next(again).step == 0, "the next start has a server of its own"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_shard_stops_the_run_with_its_name(mixed, tokenizer, tmp_path, workers):
    cfg = mixed()
    with loader_for(cfg, tokenizer, workers=workers) as loader:
        for name in ("real-0.tar", "real-1.tar", "und.tar", "text.tar", "stored.tar"):
            with open(tmp_path / name, "r+b") as file:
                file.truncate(600)
        with pytest.raises(DataError, match=r"row \d+ of step 0: .*\.tar.*(changed since|truncated|stale)"):
            for _ in range(3):
                next(loader)


def test_an_index_whose_counts_are_wrong_stops_the_run(mixed, tokenizer, monkeypatch):
    cfg = mixed()
    with monkeypatch.context() as patched:
        real = Encoder.token_counts
        patched.setattr(
            Encoder,
            "token_counts",
            lambda self, *of: type(c := real(self, *of))(
                tokens=c.tokens + 1,
                short_tokens=c.short_tokens + 1,
                dropped_tokens=c.dropped_tokens,
                short_dropped_tokens=c.short_dropped_tokens,
            ),
        )
        index_sources(cfg, tokenizer)
    with pytest.raises(DataError, match="stale index"):
        take(cfg, tokenizer, steps=1)


def test_an_unexpected_error_names_row_and_document(mixed, tokenizer, monkeypatch):
    cfg = mixed()
    monkeypatch.setattr("jp_train.data.rows.parse_sample", lambda *a, **k: 1 / 0)
    with pytest.raises(DataError, match=r"(?s)row 0 of step 0 \(first document: source .*ZeroDivisionError"):
        take(cfg, tokenizer, steps=1)


def test_io_errors_are_retried_then_stop_and_are_never_skips(mixed, tokenizer, monkeypatch):
    cfg = mixed()
    cfg.data.io_retries = 2
    indexes = index_sources(cfg, tokenizer)
    assert indexes

    def failing(self, shard, offset, size):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ShardReader, "_read_local", failing)
    with pytest.raises(DataError, match="after 2 tries"):
        take(cfg, tokenizer, steps=1)


def test_a_world_size_that_does_not_divide_the_rows_is_a_config_error(mixed, tokenizer):
    cfg = mixed()
    indexes = index_sources(cfg, tokenizer)
    batch = batch_plan(cfg, 1)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    with pytest.raises(ConfigError, match="8 rows"):
        StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=3, batch_plan=batch)


def test_rows_too_short_for_a_kinds_image_are_a_config_error(mixed, tokenizer):
    cfg = mixed()
    cfg.data.seq_len = 20
    with pytest.raises(ConfigError, match="data.seq_len 20"):
        build_plan(cfg, index_sources(cfg, tokenizer), batch_plan(cfg, 1), tokenizer)


def test_signals_meant_for_the_trainer_do_not_end_its_workers(mixed, tokenizer):
    cfg = mixed()
    expected = [rows_hash(step.micro_batches) for step in take(cfg, tokenizer)]
    with loader_for(cfg, tokenizer, workers=1) as loader:
        first = next(loader)
        for worker in loader._iterator._workers:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
                os.kill(worker.pid, number)
        rest = list(itertools.islice(loader, STEPS - 1))
    assert [rows_hash(step.micro_batches) for step in [first, *rest]] == expected


KILLED_TRAINER = """
import pickle, sys, time

def main():
    import psutil
    from jp_train.config.batch import batch_plan
    from jp_train.data.index import index_sources
    from jp_train.data.loader import StepLoader, build_plan
    from jp_train.data.tokenizer import load_tokenizer

    cfg = pickle.load(open(sys.argv[1], "rb"))
    cfg.data.workers = 2
    tokenizer = load_tokenizer(cfg.tokenizer)
    indexes, batch = index_sources(cfg, tokenizer), batch_plan(cfg, 1)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    loader = StepLoader(cfg, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch)
    next(loader)
    print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
    time.sleep(120)

if __name__ == "__main__":
    main()
"""


def test_workers_end_when_the_trainer_is_killed_outright(mixed, tokenizer, tmp_path):
    """SIGKILL leaves the trainer no time to say goodbye; its fork server and workers must still not stay behind."""
    cfg = mixed()
    (tmp_path / "cfg.pickle").write_bytes(pickle.dumps(cfg))
    script = tmp_path / "trainer.py"
    script.write_text(KILLED_TRAINER)
    trainer = subprocess.Popen([sys.executable, script, tmp_path / "cfg.pickle"], stdout=subprocess.PIPE, text=True)
    children = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(children) >= 3  # fork server and two workers, at least
    trainer.kill()
    trainer.wait()
    end = time.monotonic() + 30
    while time.monotonic() < end and any(_runs(pid) for pid in children):
        time.sleep(0.1)
    assert not [pid for pid in children if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_workers_end_with_the_loader(mixed, tokenizer):
    loader = loader_for(mixed(), tokenizer, workers=2)
    next(loader)
    workers = list(loader._iterator._workers)
    assert all(worker.is_alive() for worker in workers)
    loader.close()
    loader.close()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()


def test_rows_hash_sees_spans_order_and_empty_rows(mixed, tokenizer):
    step = take(mixed(), tokenizer, steps=1)[0]
    rows = [row for batch in step.micro_batches for row in batch.provenance]
    assert rows_hash(rows) == rows_hash(step.micro_batches)
    assert rows_hash(rows[::-1]) != rows_hash(rows) != rows_hash([*rows, ()])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_covers_the_first_documents_once_without_random_choices(mixed, tokenizer, world):
    cfg = mixed()
    cfg.validation.sources = {
        "other": SourceConfig(kind=SourceKind.text, shards="text.tar"),
        "held": SourceConfig(kind=SourceKind.generation, shards="real-{0..1}.tar"),
    }
    cfg.validation.documents, cfg.data.seq_len, cfg.engine.micro_batch_rows = 15, 130, 2
    cfg.data.pad_dropout = cfg.data.first_sentence = 1.0
    ranks = [validation_batches(cfg, tokenizer, "held", rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    documents = [d for batches in ranks for batch in batches for row in batch.provenance for d in row]
    assert [d.key for d in documents] == [f"g{n:04d}" for n in range(15)]
    index = index_sources(cfg, tokenizer, sources={"held": cfg.validation.sources["held"]})[0]
    assert [d.length for d in documents] == index.tokens[:15].tolist()
    for batch in itertools.chain(*ranks):
        assert not (batch.input_ids == tokenizer.special.pad).any() or not any(batch.provenance)
        assert set(batch.document_sources[: sum(map(len, batch.provenance))].tolist()) <= {1}
        assert all(d.kind is Kind.GENERATION for row in batch.provenance for d in row)
    with pytest.raises(ConfigError, match="unknown; validation.sources has other, held"):
        validation_batches(cfg, tokenizer, "none", 0, 1)
