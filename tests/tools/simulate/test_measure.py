"""A forecast agrees with what planning, loading and counting give, and says what it extrapolates."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jp_train.cli.main import main
from jp_train.config import load_config
from jp_train.config.batch import batch_plan
from jp_train.config.schema import TokenIds
from jp_train.data.index import index_sources
from jp_train.data.loader import StepLoader, build_plan
from jp_train.data.plan import Plan, PlanSource
from jp_train.errors import ConfigError, DataError
from jp_train.model.flops import BatchStatistics, step_flops
from jp_train.tools.simulate.measure import STATISTICS, SourceReads, StageSetup, simulate, step_at
from jp_train.tools.simulate.ranks import rank_balance
from jp_train.tools.simulate.sample import source_rates, take_sample
from jp_train.tools.simulate.stage import SimulateOptions, simulate_stage, unit_flops
from jp_train.tools.simulate.table import format_forecast
from jp_train.types import KINDS, Kind
from tests.data.data_samples import generation_samples, text_samples, understanding_samples

ROOT = Path(__file__).resolve().parents[3]
LAUNCH, SMOKE = ROOT / "launch", ROOT / "examples" / "smoke"


def lengths(kind: Kind, samples: int) -> np.ndarray:
    fixed, mean, sigma = {
        Kind.UNDERSTANDING: (579, 200, 0.6),
        Kind.TEXT: (2, 1000, 1.0),
        Kind.GENERATION: (580, 80, 0.8),
    }[kind]
    words = np.random.default_rng(KINDS.index(kind)).lognormal(np.log(mean) - sigma**2 / 2, sigma, samples)
    return (fixed + np.clip(words, 3, 20_000)).astype(np.int32)


def make_plan(**settings: object) -> Plan:
    """16 rows a step at 2:3:5; a fourth source that takes turns with "generation" from step 50 on."""
    sources = [
        PlanSource(name=kind.value, kind=kind, tokens=lengths(kind, 900), cuttable=kind is Kind.TEXT) for kind in KINDS
    ]
    sources.append(PlanSource(name="later", kind=Kind.GENERATION, tokens=lengths(Kind.GENERATION, 700), from_step=50))
    defaults = {"seed": 5, "rows_per_step": 16, "seq_len": 4096, "pool_size": 64, "mixture": (2, 3, 5)}
    return Plan(sources, **{**defaults, **settings})


def setup(plan: Plan, steps: int) -> StageSetup:
    return StageSetup(
        steps=steps,
        world=4,
        nodes=2,
        micro_batch_rows=2,
        flops=dict.fromkeys(STATISTICS, 1.0),
        reads={
            s.name: SourceReads(with_images=1000, with_ids=100, stored=0.25, samples=len(s.tokens))
            for s in plan.sources
        },
        image_slots=576,
        und_prefix=579,
        gen_text=0,
        causal=False,
        step_seconds=2.0,
        flops_per_second=1.0,
    )


@pytest.mark.parametrize(
    "settings",
    [{}, {"ratio_unit": "tokens"}, {"samples_per_row": 2, "mixture": (1, 0, 3)}, {"mix": "sampled"}],
    ids=lambda s: str(list(s.values())),
)
def test_a_forecast_from_a_fifth_of_the_steps_agrees_with_the_run_of_2400_rows_within_1_percent(
    settings: dict[str, object],
) -> None:
    steps = 150
    run, amounts, tokens = make_plan(**settings), {"samples": Counter(), "tokens": Counter()}, 0
    started: Counter[str] = Counter()
    for _ in range(steps):
        for row in run.next_step():
            for d in row.documents:
                source = run.sources[d.source]
                tokens += d.length
                started[source.name] += d.start == 0
                amounts["samples"][str(source.kind)] += d.start == 0
                amounts["tokens"][str(source.kind)] += d.length
    plan = make_plan(**settings)
    forecast = simulate(plan, setup(plan, steps), sample_steps=steps // 5, block_steps=3)
    assert forecast["sampled"]["steps"] <= steps // 4 and not forecast["sampled"]["whole_stage"]
    assert forecast["fill"]["mean"] == pytest.approx(tokens / (steps * 16 * 4096), rel=0.01)
    # independent draws: the run itself is that far from its mixture
    tolerance = 0.03 if settings.get("mix") == "sampled" else 0.01
    for unit in amounts:  # both: the one that the recipe counts, and the other by the mean lengths
        total = sum(amounts[unit].values())
        for kind, share in forecast["mixture"][unit]["overall"].items():
            assert share == pytest.approx(amounts[unit][kind] / total, abs=tolerance)
    for source in forecast["sources"]:
        relative = 2 * tolerance if settings.get("mix") == "sampled" else tolerance
        # A source that joins waits until the documents pooled before it are placed: up to 64 of 1200 here, of billions
        # in a real stage.
        waits = 32 / 700 if source["name"] == "later" else 0.01
        assert source["epochs"] == pytest.approx(started[source["name"]] / source["samples"], rel=relative, abs=waits)


def test_a_stage_that_is_planned_whole_is_exact_and_repeats_where_the_plan_does() -> None:
    plan, run = make_plan(), make_plan()
    forecast = simulate(plan, setup(plan, 80), sample_steps=100)
    assert forecast["sampled"]["whole_stage"] and forecast["fill"]["plus_minus"] == 0
    rows = [row for _ in range(80) for row in run.next_step()]
    per_row = [sum(d.length for d in row.documents) for row in rows]
    assert forecast["fill"]["mean"] == pytest.approx(np.mean(per_row) / 4096, rel=1e-12)
    assert forecast["per_step"]["tokens"]["mean"] * 80 == pytest.approx(sum(per_row))
    cuts = sum(d.start + d.length < int(run.sources[d.source].tokens[d.sample]) for row in rows for d in row.documents)
    assert forecast["per_step"]["cuts"]["mean"] * 80 == pytest.approx(cuts) and cuts > 10
    text_epoch_1 = next(row.step for row in rows for d in row.documents if d.source == 1 and d.epoch == 1)
    (text,) = (source for source in forecast["sources"] if source["name"] == "text")
    assert text["repeats_at_steps"][0] == pytest.approx(text_epoch_1, abs=3)


def test_rows_planned_from_a_constructed_far_state_are_like_any_other() -> None:
    plan = make_plan(rows_per_step=64)
    sample = take_sample(plan, 270_000, 60, source_rates(plan))
    assert max(block.start for block in sample.blocks) == 270_000 - 10
    tokens = np.bincount(sample.step, weights=sample.length) / (64 * 4096)
    near, far = tokens[:10].mean(), tokens[-10:].mean()
    assert far == pytest.approx(near, abs=0.002)
    assert sample.start.min() == 0 and set(np.unique(sample.source)) == {0, 1, 2, 3}
    assert len(np.unique(sample.row)) == 64


def test_truncated_and_passed_over_documents_are_forecast() -> None:
    tokens = np.array([700, 5000, 6000, 800] * 100, np.int32)
    for over_long, truncated, passed in (("truncate", (904 + 1904) / 4, 0), ("drop", 0, 50)):
        plan = make_plan(over_long=over_long)
        plan = Plan(
            [PlanSource(name="u", kind=Kind.UNDERSTANDING, tokens=tokens)],
            seed=0, rows_per_step=8, seq_len=4096, pool_size=16, mixture=(1, 0, 0), over_long=over_long,
        )  # fmt: skip
        (source,) = simulate(plan, setup(plan, 400), sample_steps=60)["sources"]
        assert source["passed_over_percent"] == pytest.approx(passed)
        assert source["truncated_tokens_per_step"] == pytest.approx(truncated * source["documents_per_step"], rel=0.05)


def test_balance_between_ranks_equals_counting_it_out() -> None:
    draw = np.random.default_rng(3)
    work, kinds = draw.random((5, 12)), draw.random((5, 12, 2)) < 0.5
    entries = {entry["world"]: entry for entry in rank_balance(work, kinds, ["a", "b"], 2)}
    assert list(entries) == [1, 2, 3, 4, 6, 12] and "micro_batch" not in entries[4] and "micro_batch" in entries[6]
    for world, name, size in ((3, "step", 4), (3, "micro_batch", 2), (12, "step", 1)):
        slowest, mean, lacking, meetings = [], [], 0, 0
        for step in range(5):
            for meeting in range(12 // world // size):
                ranks = [
                    range(rank * 12 // world + meeting * size, rank * 12 // world + meeting * size + size)
                    for rank in range(world)
                ]
                sums = [sum(work[step, row] for row in rows) for rows in ranks]
                slowest.append(max(sums))
                mean.append(sum(sums) / world)
                lacking += any(not any(kinds[step, row, 1] for row in rows) for rows in ranks)
                meetings += 1
        figures = entries[world][name]
        assert figures["lost_percent"] == pytest.approx(100 * (1 - sum(mean) / sum(slowest)))
        assert figures["max_over_mean"] == pytest.approx(np.mean(np.array(slowest) / mean))
        assert figures["some_rank_lacks"]["b"] == pytest.approx(lacking / meetings)


def test_a_curve_is_crossed_where_it_is() -> None:
    assert step_at([(0, 0.0), (100, 0.5), (200, 2.5)], 1) == 125
    with pytest.raises(ValueError, match="ends at 2.5"):
        step_at([(0, 0.0), (100, 2.5)], 3)


# Against rows that the loader builds


@pytest.fixture
def tiny(mixed):
    cfg = mixed()
    cfg.stage.training_steps = 6
    return cfg


def test_tokens_images_and_supervised_positions_are_those_of_the_rows_that_the_loader_builds(tiny, tokenizer) -> None:
    forecast = simulate_stage(tiny, SimulateOptions(world=2))
    indexes, batch = index_sources(tiny, tokenizer), batch_plan(tiny, 1)
    plan = build_plan(tiny, indexes, batch, tokenizer)
    with StepLoader(tiny, plan, indexes, tokenizer, dp_rank=0, dp_world_size=1, batch_plan=batch) as loader:
        batches = [micro_batch for _ in range(6) for micro_batch in next(loader).micro_batches]
    counted = {
        "tokens": sum(len(batch.input_ids) for batch in batches),
        "supervised_text_tokens": sum(batch.supervised_text_tokens for batch in batches),
        "supervised_image_tokens": sum(batch.supervised_image_tokens for batch in batches),
        "understanding_images": sum(len(batch.und_images) for batch in batches),
        "generation_images": sum(len(batch.gen_ids) for batch in batches),
        "truncated_tokens": sum(batch.truncated_tokens for batch in batches),
        "spans": sum(len(row) for batch in batches for row in batch.provenance),
    }
    assert {name: round(6 * forecast["per_step"][name]["mean"]) for name in counted} == counted
    assert forecast["sampled"]["whole_stage"] and forecast["world"] == 2 and forecast["synthetic"] == ""
    units = unit_flops(tiny)
    for batch in batches:
        statistics = BatchStatistics.of(batch)
        exact = step_flops(tiny.model, statistics, tiny.stage.trainable).total
        assert sum(
            units[name] * getattr(statistics, name) for name in STATISTICS if name != "encoded_images"
        ) == pytest.approx(exact)


@pytest.mark.parametrize("token_ids", list(TokenIds))
def test_reads_are_the_fields_that_training_reads(tiny, token_ids) -> None:
    tiny.data.token_ids = token_ids
    forecast = simulate_stage(tiny, SimulateOptions(world=1, step_seconds=0.5))
    per_sample = {
        "real": [
            len(fields["png"]) + len(fields["json"])
            for _, fields in generation_samples(13) + generation_samples(12, 13)
        ],
        "und": [len(fields["png"]) + len(fields["json"]) for _, fields in understanding_samples(17)],
        "text": [len(fields["txt"]) for _, fields in text_samples(21)],
    }
    if token_ids is TokenIds.auto:  # the stored ids are read in place of the texts
        for name, fields in (
            ("real", generation_samples(25)),
            ("und", understanding_samples(17)),
            ("text", text_samples(21)),
        ):
            sidecars = [np.load(path) for path in Path(tiny.data.root).glob(f"{name}*.jp-tokens-*.npz")]
            ids = sum(len(file["records"]) for file in sidecars) / len(fields)
            per_sample[name] = [ids + len(files.get("png", b"")) for _, files in fields]
    spans = Counter()
    plan = build_plan(tiny, index_sources(tiny, tok := _tokenizer(tiny)), batch_plan(tiny, 1), tok)
    for _ in range(6):
        for row in plan.next_step():
            spans.update(plan.sources[d.source].name for d in row.documents)
    stored = forecast["reads"]["per_step"]["bytes_with_pictures"] * 6 - sum(
        spans[name] * np.mean(sizes) for name, sizes in per_sample.items()
    )
    ids = 2 * 16 + 128  # of samples without an image: the ids and their .npy header, and a short JSON or its token ids
    assert ids < stored / spans["stored"] < ids + 120
    assert forecast["reads"]["per_node_per_second"]["samples"] == pytest.approx(2 * sum(spans.values()) / 6)
    images = np.mean([len(fields["png"]) for _, fields in generation_samples(13) + generation_samples(12, 13)])
    saved = forecast["reads"]["per_step"]["bytes_with_pictures"] - forecast["reads"]["per_step"]["bytes_with_ids"]
    assert saved == pytest.approx(spans["real"] / 6 * (images - 2 * 16))


def _tokenizer(cfg):
    from jp_train.data.tokenizer import load_tokenizer

    return load_tokenizer(cfg.tokenizer)


# Without data


def test_missing_data_is_an_error_that_says_how_to_forecast_without(tiny) -> None:
    tiny.data.sources["text"] = replace(tiny.data.sources["text"], shards="absent-{0..3}.tar")
    with pytest.raises(DataError, match=r"absent.*--lengths FILE or --synthetic"):
        simulate_stage(tiny, SimulateOptions())
    forecast = simulate_stage(tiny, SimulateOptions(synthetic=True, sample_steps=6))
    assert "default distributions" in forecast["synthetic"] and "SYNTHETIC" in format_forecast(forecast)


def test_reads_a_second_need_a_stated_time_where_flops_do_not_tell_it() -> None:
    toy = load_config(SMOKE / "stage2.yaml")
    forecast = simulate_stage(toy, SimulateOptions(synthetic=True, steps=6))
    text = format_forecast(forecast)
    assert forecast["reads"]["per_node_per_second"] is None and "a second and node" not in text
    assert "state its time with --step-seconds" in text and "MiB a step" in text
    stated = simulate_stage(toy, SimulateOptions(synthetic=True, steps=6, step_seconds=2.0))
    a_step = stated["reads"]["per_step"]["samples"]
    assert stated["reads"]["per_node_per_second"]["samples"] == pytest.approx(a_step / 2)
    assert "with a step in 2.00 s (stated)" in format_forecast(stated)


def test_the_command_writes_a_json_object_and_an_image(tmp_path, capsys) -> None:
    stated = tmp_path / "lengths.yaml"
    stated.write_text(
        "generation: {mean: 30, sigma: 0.2, samples: 1234}\ntext: {mean: 50, sigma: 0.5, samples: 2_000_000}\n"
    )
    arguments = [
        "--lengths",
        str(stated),
        "--world",
        "2",
        "--steps",
        "2000",
        "--sample-steps",
        "40",
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(["data", "simulate", str(SMOKE / "stage2.yaml"), *arguments]) == 0
    forecast = json.loads(capsys.readouterr().out)
    assert (
        forecast["steps"] == 2000
        and forecast["world"] == 2
        and {entry["world"] for entry in forecast["ranks"]} >= {1, 2}
    )
    generation = [source for source in forecast["sources"] if source["kind"] == "generation"]
    assert generation and all(source["samples"] == 1234 and source["repeats_at_steps"] for source in generation)
    assert json.loads((tmp_path / "out" / "simulate.json").read_text()) == forecast
    assert (tmp_path / "out" / "simulate.png").read_bytes().startswith(b"\x89PNG")
    assert "% +-" in format_forecast(forecast)


def test_impossible_options_are_refused(tiny) -> None:
    with pytest.raises(ConfigError, match="--steps must be positive"):
        simulate_stage(tiny, SimulateOptions(steps=0))
    with pytest.raises(ConfigError, match="8 rows a step cannot be split over 3 ranks"):
        simulate_stage(tiny, SimulateOptions(world=3))
