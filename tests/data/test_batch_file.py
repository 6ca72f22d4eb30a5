"""`data explain`: descriptions of rows, saved batches, replay of any step, plan snapshots. A real ZeRO-3 run is
replayed in tests/tools/explain/test_step.py."""

from __future__ import annotations

import itertools
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

import jp_train.data.plan as plan_module
from jp_train.config.batch import batch_plan
from jp_train.config.schema import SourceConfig, SourceKind, TokenizerConfig
from jp_train.data.batch_file import describe_batch, load_batch, save_batch, sidecar_of
from jp_train.data.batch_text import Shown, pieces, printable, snippet
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan, rows_hash
from jp_train.data.snapshots import SNAPSHOTS_FILE, append_snapshot, nearest_snapshots
from jp_train.data.tokenizer import load_tokenizer
from jp_train.errors import ConfigError, DataError
from jp_train.terminal import ProgressLine
from jp_train.tools.explain.replay import Replay
from jp_train.tools.explain.table import format_row, format_rows, remarks_of, totals
from jp_train.types import IGNORE_INDEX, KINDS, PackedBatch, Provenance
from tests.data.data_samples import text_samples
from tests.engine.tiny_run import write_tokenizer

STEPS = 5


def trained(cfg, tokenizer, *, rank=0, world=1, steps=STEPS, state=None):
    """The steps as a trainer's loader gives them."""
    indexes = index_sources(cfg, tokenizer)
    batch = batch_plan(cfg, world)
    plan = build_plan(cfg, indexes, batch, tokenizer)
    if state is not None:
        plan.restore(state)
    with StepLoader(cfg, plan, indexes, tokenizer, dp_rank=rank, dp_world_size=world, batch_plan=batch) as loader:
        return list(itertools.islice(loader, steps))


def differing_fields(batch: PackedBatch, other: PackedBatch) -> list[str]:
    """Names of the fields that are not equal, tensors bit for bit."""
    return [
        field.name
        for field in fields(PackedBatch)
        if not (
            torch.equal(mine, theirs) and mine.dtype == theirs.dtype
            if isinstance(mine := getattr(batch, field.name), torch.Tensor)
            and isinstance(theirs := getattr(other, field.name), torch.Tensor)
            else getattr(batch, field.name) == getattr(other, field.name)
        )
    ]


@pytest.fixture
def damaged(mixed):
    """Rows with cut texts, dropped conditions, two undecodable pictures; two rows a micro-batch."""
    cfg = mixed(frozenset({"g0003", "u0005"}))
    cfg.engine.micro_batch_rows = 2
    return cfg


def described_steps(cfg, tokenizer):
    with Replay(cfg) as replay:
        for step in range(1, STEPS + 1):
            for micro in replay.micro_batches(step):
                yield micro, describe_batch(micro.batch, tokenizer, first_row=micro.first_row, specs=micro.specs)


def test_described_spans_reproduce_the_exact_tokens_of_every_text(damaged, tokenizer):
    texts = {key: fields["txt"].decode() for key, fields in text_samples(21)}
    special = tokenizer.special
    cut = 0
    for micro, rows in described_steps(damaged, tokenizer):
        start = 0
        for row in rows:
            ids = micro.batch.input_ids[start : start + row["tokens"]].tolist()
            for document in row["documents"]:
                a, b = document["row_span"]
                first, last = document["document_span"]
                assert b - a == last - first
                if document["kind"] == "text":
                    whole = [special.bos, *tokenizer.encode(texts[document["key"]]), special.eos]
                    assert ids[a:b] == whole[first:last]
                    assert document["begun_before"] == (first > 0) and document["goes_on"] == (last < len(whole))
                    cut += document["goes_on"]
            assert [document["row_span"][0] for document in row["documents"][1:]] == [
                d["row_span"][1] for d in row["documents"][:-1]
            ]
            start += row["tokens"]
        assert start == sum(row["tokens"] for row in rows)
    assert cut


def test_described_loss_spans_are_the_labels_of_the_batch(damaged, tokenizer):
    for micro, rows in described_steps(damaged, tokenizer):
        start = 0
        for row in rows:
            for head, name in (("text", "labels"), ("image", "gen_labels")):
                labels = getattr(micro.batch, name)[start : start + row["tokens"]]
                spans = [span for document in row["documents"] for span in document["loss"][head]["spans"]]
                positions = [position for a, b in spans for position in range(a, b)]
                for document in row["documents"]:
                    of_document = document["loss"][head]["spans"]
                    assert all(before[1] < after[0] for before, after in itertools.pairwise(of_document)), (
                        "neighbours are one span"
                    )
                assert positions == (labels != IGNORE_INDEX).nonzero()[:, 0].tolist()
                assert (
                    len(positions)
                    == row["supervised"][head]
                    == sum(d["loss"][head]["tokens"] for d in row["documents"])
                )
            for kind, name in (("understanding", "und_slots"), ("generation", "gen_slots")):
                slots = [
                    p for document in row["documents"] for a, b in document["image_slots"][kind] for p in range(a, b)
                ]
                held = getattr(micro.batch, name) - start
                assert slots == held[(held >= 0) & (held < row["tokens"])].tolist()
            start += row["tokens"]


def test_skipped_documents_are_described_in_the_row_whose_place_they_leave_empty(damaged, tokenizer):
    count = 0
    for micro, rows in described_steps(damaged, tokenizer):
        for row, spec in zip(rows, micro.specs, strict=True):
            count += len(row["skipped"])
            assert {skip["key"] for skip in row["skipped"]} <= {"g0003", "u0005"}
            assert all("undecodable" in skip["reason"] for skip in row["skipped"])
            lost = sum(skip["document_span"][1] - skip["document_span"][0] for skip in row["skipped"])
            assert row["tokens"] + lost == sum(ref.length for ref in spec.documents)
            assert len(row["documents"]) + len(row["skipped"]) == len(spec.documents)
        assert sum(len(row["skipped"]) for row in describe_batch(micro.batch)) == len(micro.batch.skipped)
    assert count >= 2


def test_a_row_alone_in_a_batch_and_beside_others_is_described_alike(damaged, tokenizer):
    with Replay(damaged) as replay:
        for micro in replay.micro_batches(2):
            together = describe_batch(micro.batch, tokenizer, first_row=micro.first_row, specs=micro.specs)
            for number, (row, spec) in enumerate(zip(micro.rows, micro.specs, strict=True)):
                alone = replay._collator([row])
                assert describe_batch(alone, tokenizer, first_row=row.row, specs=(spec,)) == [together[number]]
                assert json.loads(json.dumps(together[number])) == together[number]


def test_totals_are_the_sums_of_the_batches(damaged, tokenizer):
    everything = list(described_steps(damaged, tokenizer))
    total = totals(row for _, rows in everything for row in rows)
    batches = [micro.batch for micro, _ in everything]
    assert total["rows"] == STEPS * 8
    assert total["tokens"] == sum(int(batch.document_lengths.sum()) for batch in batches)
    assert total["supervised"] == {
        "text": sum(batch.supervised_text_tokens for batch in batches),
        "image": sum(batch.supervised_image_tokens for batch in batches),
    }
    assert total["skipped"] == sum(len(batch.skipped) for batch in batches)
    assert total["truncated_tokens"] == sum(batch.truncated_tokens for batch in batches)
    assert sum(kind["tokens"] for kind in total["kinds"].values()) == total["tokens"]


def test_the_tables_name_every_document_and_hold_no_control_character(damaged, tokenizer):
    for _, rows in itertools.islice(described_steps(damaged, tokenizer), 6):
        for row in rows:
            row["documents"][0]["key"] = "evil\x1b[2J\u202e\nkey"
            table = format_row(row, 8)
            for document in row["documents"][1:]:
                assert document["key"] in table and document["shard"] in table
            assert printable(table) == table and "\x1b" not in table
            assert "[U+202E]" in table and "␛" in table
        assert all(f"{row['tokens']:,}" in format_rows(rows, totals(rows)) for row in rows)


# -- replay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_a_replayed_micro_batch_is_bit_equal_to_the_one_a_rank_gets(damaged, tokenizer, world):
    with Replay(damaged) as replay:
        for rank in range(world):
            steps = trained(damaged, tokenizer, rank=rank, world=world)
            for item in reversed(steps):
                again = list(replay.micro_batches(item.step + 1, replay.rows_of_rank(rank, world)))
                assert len(again) == len(item.micro_batches)
                for micro, batch in zip(again, item.micro_batches, strict=True):
                    assert differing_fields(micro.batch, batch) == []


def test_one_row_gives_the_micro_batch_that_holds_it(damaged):
    with Replay(damaged) as replay:
        whole = list(replay.micro_batches(3))
        for row in range(8):
            (micro,) = replay.micro_batches(3, range(row, row + 1))
            assert micro.first_row == 2 * (row // 2)
            assert differing_fields(micro.batch, whole[row // 2].batch) == []


def test_steps_rows_and_ranks_that_do_not_exist_are_refused(damaged):
    with Replay(damaged) as replay:
        with pytest.raises(ConfigError, match="the first optimizer step is 1, got 0"):
            replay.specs(0)
        with pytest.raises(ConfigError, match="8 rows, numbered from 0 to 7; asked for 8"):
            list(replay.micro_batches(1, range(8, 9)))
        with pytest.raises(ConfigError, match="expected 0 to 1 with --world 2, got 2"):
            replay.rows_of_rank(2, 2)
        with pytest.raises(ConfigError, match="cannot be split over 3 ranks"):
            replay.rows_of_rank(0, 3)


@pytest.fixture
def folds(monkeypatch):
    """Counts the steps that plans advance by, whoever asks."""
    counted = {"steps": 0}
    plain = plan_module._Fold.advance

    def advance(self, *args, **kwargs):
        counted["steps"] += 1
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(plan_module._Fold, "advance", advance)
    return counted


def test_with_a_runs_snapshots_no_step_is_further_than_the_nearest_one(damaged, tokenizer, tmp_path, folds):
    steps = trained(damaged, tokenizer, steps=30)
    for item in steps:
        if (item.step + 1) % 7 == 0:
            append_snapshot(tmp_path / SNAPSHOTS_FILE, item.plan_state)
    for step in (1, 7, 8, 20, 30):
        with Replay(damaged, tmp_path) as replay:
            folds["steps"] = 0
            batches = [micro.batch for micro in replay.micro_batches(step)]
            assert folds["steps"] == (step - 1) % 7 + 1
            assert rows_hash(batches) == rows_hash(steps[step - 1].micro_batches)
            assert replay.notes == []


def test_a_checkpoints_state_shortens_the_way_too(damaged, tokenizer, tmp_path, folds):
    steps = trained(damaged, tokenizer, steps=12)
    folder = tmp_path / "checkpoints" / "step_0000010"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"plan": steps[9].plan_state}))
    (tmp_path / "checkpoints" / "step_0000011").mkdir()  # one without its state
    with Replay(damaged, tmp_path) as replay:
        folds["steps"] = 0
        assert rows_hash(micro.batch for micro in replay.micro_batches(12)) == rows_hash(steps[11].micro_batches)
        assert folds["steps"] == 2


def test_a_run_without_plan_states_is_folded_from_the_start_and_says_so(damaged, tokenizer, tmp_path):
    with Replay(damaged, tmp_path) as replay:
        batches = [micro.batch for micro in replay.micro_batches(3)]
        assert rows_hash(batches) == rows_hash(trained(damaged, tokenizer, steps=3)[2].micro_batches)
        assert len(replay.notes) == 1 and "no plan state yet" in replay.notes[0]


def test_other_data_than_the_runs_are_refused_for_any_step(damaged, tokenizer, tmp_path):
    append_snapshot(tmp_path / SNAPSHOTS_FILE, trained(damaged, tokenizer, steps=4)[3].plan_state)
    damaged.seed += 1
    for step in (2, 9):
        with (
            Replay(damaged, tmp_path) as replay,
            pytest.raises(DataError, match="seed: the state has 7, this run has 8"),
        ):
            replay.specs(step)


def test_planning_far_from_a_snapshot_tells_how_long_it_will_take(damaged, monkeypatch, capsys):
    clock = itertools.count()
    monkeypatch.setitem(ProgressLine.__init__.__kwdefaults__, "clock", lambda: float(2 * next(clock)))
    with Replay(damaged) as replay:
        replay.specs(160)
    error = capsys.readouterr().err
    assert "planning: step 50 of 159" in error and "s left" in error and "step 150 of 159" in error


# -- the snapshot file -----------------------------------------------------------------------------


def steps_of(run_dir, step):
    return [state["step"] for state in nearest_snapshots(run_dir, step)]


def test_snapshots_come_nearest_first_and_torn_lines_are_passed_over(tmp_path):
    path = tmp_path / SNAPSHOTS_FILE
    for step in (2, 4, 4, 6):
        append_snapshot(path, {"step": step, "schedule": {"step": 99}})
    (tmp_path / "long").mkdir()
    for step in range(11, 21):
        append_snapshot(tmp_path / "long" / SNAPSHOTS_FILE, {"step": step})
    assert steps_of(tmp_path / "long", 12) == [12, 11]
    assert steps_of(tmp_path, 5) == [4, 2] and steps_of(tmp_path, 1) == [] and steps_of(tmp_path / "nowhere", 1) == []
    with path.open("a") as file:
        file.write('{"step": 8, "pool": [[0,')  # a kill in the middle of a line
    assert steps_of(tmp_path, 100) == [6, 4, 2]
    append_snapshot(path, {"step": 10})
    assert steps_of(tmp_path, 100) == [10, 6, 4, 2]
    path.write_bytes(path.read_bytes() + b'[]\n"x"\n{"step": "7"}\n\xff\xfe\n')
    assert steps_of(tmp_path, 100) == [10, 6, 4, 2]


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_batch_loads_equal_in_every_field(damaged, tmp_path):
    with Replay(damaged) as replay:
        for micro in itertools.chain(replay.micro_batches(1), replay.micro_batches(2)):
            batch = replace(
                micro.batch, provenance=(*micro.batch.provenance[:-1], (hostile(micro.batch.provenance[-1][0]),))
            )
            path = save_batch(batch, tmp_path / "deep" / "batch.safetensors")
            assert differing_fields(load_batch(path), batch) == []
    assert sorted(file.name for file in path.parent.iterdir()) == ["batch.json", "batch.safetensors"]


def hostile(document: Provenance) -> Provenance:
    return replace(document, key='</script>"\x00\u202e\udcff', source="日本")


def test_a_saved_batch_that_is_missing_damaged_or_mixed_up_is_refused(damaged, tmp_path):
    with Replay(damaged) as replay:
        first, other = (next(iter(replay.micro_batches(step))).batch for step in (1, 2))
    path = save_batch(first, tmp_path / "one.safetensors")
    save_batch(other, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="not a saved batch"):
        load_batch(tmp_path / "none.safetensors")
    path.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(DataError, match="is not the file that"):
        load_batch(path)
    sidecar_of(path).write_text("[]")
    with pytest.raises(DataError, match="not a saved batch"):
        load_batch(path)


# -- text ------------------------------------------------------------------------------------------

TEXTS = [
    "a  b ",
    "日本語🎉 naïve",
    " \n\tx<|User|>:<end_of_image>",
    "مرحبا\u202e\u0000",
    "",
    "the object of Python classes",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_tile_the_tokens_and_join_to_what_the_tokenizer_decodes(tokenizer, text):
    special = tokenizer.special
    body = tokenizer.encode(text)
    ids = [special.bos, *body, special.boi, *[special.image_placeholder] * 5, special.eoi, *body, special.eos]
    parts = pieces(ids, tokenizer)
    assert [piece.start for piece in parts] == [0, *[piece.end for piece in parts[:-1]]] and parts[-1].end == len(ids)
    assert [piece.text for piece in parts if piece.shown is Shown.special] == [
        getattr(tokenizer.cfg, name) for name in ("bos", "boi", "eoi", "eos")
    ]
    assert [piece.end - piece.start for piece in parts if piece.shown is Shown.slots] == [5]
    words = [piece for piece in parts if piece.shown is Shown.text]
    assert "".join(piece.text for piece in words if piece.end <= len(body) + 1) == tokenizer.decode(body) == text
    assert max((piece.end - piece.start for piece in words), default=1) <= 8


def test_pieces_join_also_where_the_tokenizer_drops_leading_spaces(tmp_path):
    # sentencepiece's defaults: a space is put before every text, and taken off again
    write_tokenizer(tmp_path / "prefix.model")
    tokenizer = load_tokenizer(TokenizerConfig(path=str(tmp_path / "prefix.model")))
    space = tokenizer.encode("é")[0]
    body = tokenizer.encode("naïve é words é in the class")
    for ids in (body, [space, space, *body], [*body, space, *body[1:]], [body[-1], space, *body]):
        parts = pieces(ids, tokenizer)
        assert "".join(piece.text for piece in parts) == tokenizer.decode(ids)
        assert all(piece.shown is Shown.text for piece in parts)


def test_pieces_of_broken_bytes_still_tile(tokenizer):
    ids = tokenizer.encode("🎉")[:-1] * 7 + tokenizer.encode("end")
    parts = pieces(ids, tokenizer)
    assert [piece.start for piece in parts] == [0, *[piece.end for piece in parts[:-1]]] and parts[-1].end == len(ids)
    assert "end" in "".join(piece.text for piece in parts)


def test_printable_leaves_nothing_that_hides_reorders_or_breaks():
    hidden = "".join(
        map(
            chr,
            [
                0,
                7,
                27,
                0x7F,
                0x85,
                0xAD,
                0x61C,
                0x200B,
                0x200E,
                0x2028,
                *range(0x202A, 0x202F),
                0x2066,
                0xFEFF,
                0xD800,
                0xE000,
            ],
        )
    )
    shown = printable(hidden)
    assert not set(shown) & set(hidden) and shown.isprintable()
    assert "␀" in shown and "[U+202E]" in shown and "[U+D800]" in shown
    shown.encode("utf-8")
    assert printable("a b\n\té日🎉") == "a b\n\té日🎉"


def test_a_snippet_is_one_line_with_specials_named_and_repeats_counted(tokenizer):
    special = tokenizer.special
    ids = [
        special.bos,
        *[special.pad] * 9,
        special.boi,
        *[special.image_placeholder] * 4,
        special.eoi,
        *tokenizer.encode("two\nlines"),
        special.eos,
    ]
    assert snippet(ids, tokenizer) == "<bos><pad> x9 <boi><4 image slots><eoi>two↵lines<eos>"
    long = snippet(tokenizer.encode("word " * 200), tokenizer, 60)
    assert len(long) <= 60 and " … " in long


def test_a_document_of_stored_ids_and_a_causal_packing_are_described(mixed, tokenizer):
    cfg = mixed()
    cfg.data.sources = {"stored": SourceConfig(kind=SourceKind.generation, shards="stored.tar")}
    cfg.stage.mixture.understanding = cfg.stage.mixture.text = 0
    cfg.data.packing = type(cfg.data.packing).causal
    with Replay(cfg) as replay:
        micro = next(iter(replay.micro_batches(1)))
    (row,) = describe_batch(micro.batch, tokenizer)
    assert {document["source"] for document in row["documents"]} == {"stored"}
    assert all(document["loss"]["image"]["tokens"] == 16 for document in row["documents"])
    assert row["truncated_tokens"] == 0 and np.isclose(row["fill"], row["tokens"] / 256)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_generation_documents_that_lost_their_condition_say_so_and_no_others(mixed, tokenizer, share):
    cfg = mixed()
    cfg.data.pad_dropout = share
    with Replay(cfg) as replay:
        rows = [row for m in replay.micro_batches(1) for row in describe_batch(m.batch, tokenizer, specs=m.specs)]
    documents = [document for row in rows for document in row["documents"]]
    dropped = {kind: {d["condition_dropped"] for d in documents if d["kind"] == kind} for kind in map(str, KINDS)}
    assert dropped == {"understanding": {False}, "text": {False}, "generation": {share == 1.0}}
    assert all(("condition was dropped" in "".join(remarks_of(d))) == d["condition_dropped"] for d in documents)
