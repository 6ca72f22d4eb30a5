"""What `jp-train check` says about the mixture in tokens, against what `jp-train data simulate` plans."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jp_train.cli.main import main
from jp_train.config import RunConfig
from jp_train.config.choices import Init, RatioUnit
from jp_train.config.schema import MixtureConfig, SourceConfig, SourceKind
from jp_train.engine.vq_recipe import ids_recipe
from jp_train.tools.check import sources
from jp_train.tools.check.check import check
from jp_train.tools.check.subject import Subject
from jp_train.tools.check.text import format_check
from jp_train.tools.simulate.stage import SimulateOptions, simulate_stage
from tests.data.data_samples import text_samples, words, write_shard
from tests.data.test_vq_ids import store


@pytest.fixture
def with_books(mixed: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    """2:3:5 in samples, and each text is a whole file of about 20 rows, as `data import text` makes them."""
    cfg = mixed()
    books = tmp_path / "books"
    books.mkdir()
    for number in range(12):
        (books / f"{number}.txt").write_text("\n\n".join(words(100 * number + n, 150) for n in range(20)))
    assert main(["data", "import", "text", str(books), str(tmp_path / "imported"), "--json"]) == 0
    cfg.data.sources["text"] = SourceConfig(kind=SourceKind.text, shards=str(tmp_path / "imported"))
    cfg.stage.training_steps, cfg.data.pad_dropout, cfg.data.first_sentence = 400, 0.0, 0.0
    return cfg


def test_texts_of_many_rows_are_named_with_their_share_in_tokens_and_the_cures(with_books: RunConfig) -> None:
    plan = check(with_books)
    long, far = plan["warnings"]
    assert "source text: 100 % of its documents are longer than data.seq_len 256" in long and "--document" in long
    text = 100 * plan["shares"]["tokens"]["text"]
    assert text > 90 and f"text {text:.1f} % instead of 30.0 %" in far and "generation" in far
    assert "stage.ratio_unit=tokens" in far and "--document paragraph" in far
    assert plan["shares"]["samples"] == pytest.approx({"understanding": 0.2, "text": 0.3, "generation": 0.5})
    told = format_check(plan)
    assert f"warning: {far}" in told and f"text {text:.1f} %" in told and "in samples" in told
    assert "every stage has an index of its own" in told


def test_check_and_simulate_give_the_same_shares_and_epochs(with_books: RunConfig) -> None:
    plan, forecast = check(with_books), simulate_stage(with_books, SimulateOptions(sample_steps=40))
    for unit in ("samples", "tokens"):
        assert plan["shares"][unit] == pytest.approx(forecast["mixture"][unit]["overall"], rel=1e-9)
    fill = forecast["fill"]["mean"]
    epochs = {source["name"]: source["epochs"] for source in forecast["sources"]}
    for row in plan["sources"]:  # check takes rows as full
        assert row["epochs"] * fill == pytest.approx(epochs[row["name"]], rel=1e-6)


def test_shares_that_are_meant_in_tokens_and_sources_that_are_not_used_are_no_warning(
    with_books: RunConfig, mixed: Callable[..., RunConfig]
) -> None:
    with_books.stage.ratio_unit = RatioUnit.tokens
    subject = Subject(config=with_books)
    assert sources.shares(subject)["tokens"] == pytest.approx({"understanding": 0.2, "text": 0.3, "generation": 0.5})
    assert subject.warnings == []
    usual = mixed()
    usual.stage.ratio_unit, usual.stage.mixture = (
        RatioUnit.samples,
        MixtureConfig(understanding=2, text=0, generation=5),
    )
    assert check(usual)["warnings"] == []


def test_tars_that_a_folder_passes_over_are_a_warning(mixed: Callable[..., RunConfig], tmp_path: Path) -> None:
    cfg = mixed()
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "text.tar").rename(folder / "text.tar")
    (folder / "more.tar.gz").write_bytes(b"")
    cfg.data.sources["text"].shards = "folder"
    (warning,) = [text for text in check(cfg)["warnings"] if "passed over: " in text]
    assert warning.startswith("source text: 1 *.tar.gz passed over: ") and "data import webdataset" in warning


@pytest.mark.parametrize("place", ["data", "validation"])
def test_bad_samples_are_a_warning_up_to_the_limit_and_a_problem_above_it(
    mixed: Callable[..., RunConfig], tmp_path: Path, place: str
) -> None:
    cfg = mixed()
    texts = text_samples(21)
    write_shard(tmp_path / "some.tar", [*texts[:18], *((key, {"txt": b" "}) for key, _ in texts[18:])])
    getattr(cfg, place).sources["some"] = SourceConfig(kind=SourceKind.text, shards="some.tar")
    for limit, where in ((0.14, "problems"), (0.15, "warnings")):
        cfg.data.max_bad_share = limit
        (text,) = [text for text in check(cfg)[where] if "are bad" in text]
        assert text.startswith(f"{place}.sources.some: 3 of 21 samples (14.3 %) are bad") and "is empty" in text


def test_stored_ids_are_compared_with_the_vq_tokenizer_of_the_starting_weights(
    mixed: Callable[..., RunConfig], tmp_path: Path
) -> None:
    cfg = mixed()
    del cfg.data.sources["stored"]  # its ids are of unknown origin
    cfg.model.init, cfg.model.vq.base_channels, cfg.model.vq.res_blocks = Init.random, 32, 1
    told = format_check(check(cfg))
    assert "no VQ ids stored for real" in told and "PROBLEM" not in told
    recipe = ids_recipe(cfg)
    assert recipe is not None
    store(tmp_path / "real-0.tar", 13, recipe)
    plan = check(cfg)
    assert plan["problems"] == [] and plan["vq_ids"] == {"fingerprint": recipe.fingerprint}
    assert f"{recipe.fingerprint} for 1 of 2 shards, as in the starting weights" in format_check(plan)
    cfg.seed += 1  # other random weights
    (problem,) = check(cfg)["problems"]
    assert f"has VQ ids with fingerprint {recipe.fingerprint}" in problem and "its ids mean other images" in problem
    cfg.model.init_from = "/absent"
    plan = check(cfg)
    assert len(plan["problems"]) == 1 and "/absent" in plan["problems"][0] and plan["vq_ids"] == {"fingerprint": None}
    assert "1 of 2 shards; not compared: the starting weights cannot be used" in format_check(plan)


def test_a_source_that_cannot_be_read_leaves_the_table_of_the_others_and_is_announced_once(
    mixed: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = mixed()
    del cfg.data.sources["stored"]  # its ids are of unknown origin
    cfg.model.init, cfg.model.vq.base_channels, cfg.model.vq.res_blocks = Init.random, 32, 1
    whole = {row["name"]: row for row in check(cfg)["sources"]}
    for name in ("text", "und"):
        shard = tmp_path / f"{name}.tar"
        os.truncate(shard, shard.stat().st_size // 2)
    capsys.readouterr()
    plan = check(cfg)
    assert [problem.split(" (")[0] for problem in plan["problems"]] == [
        f"shard {tmp_path / name}.tar" for name in ("und", "text")
    ]
    assert "of a folder, move the file away" in plan["problems"][0]
    rows = {row["name"]: row for row in plan["sources"]}
    assert rows == {name: {**row, "epochs": None} for name, row in whole.items() if name not in ("text", "und")}
    assert plan["exit_status"] == 3
    assert "real " in format_check(plan) and capsys.readouterr().err.count("are to be indexed") == 1


@pytest.mark.parametrize("place", ["data", "validation"])
def test_what_a_filter_leaves_out_is_said_with_the_reason(
    mixed: Callable[..., RunConfig], tmp_path: Path, place: str
) -> None:
    cfg = mixed()
    del cfg.data.sources["stored"]  # its ids are of unknown origin
    cfg.model.init, cfg.model.vq.base_channels, cfg.model.vq.res_blocks = Init.random, 32, 1
    samples = [(key, {**fields, "json": b'{"score": %d}' % (n % 3)}) for n, (key, fields) in enumerate(text_samples(9))]
    write_shard(tmp_path / "some.tar", samples)
    source = SourceConfig(kind=SourceKind.text, shards="some.tar", filter=["score >= 1"], fields={"text": "txt"})
    getattr(cfg, place).sources["some"] = source
    plan = check(cfg)
    name = "some" if place == "data" else "validation/some"
    assert plan["problems"] == [] and f"\n  left out of {name}: 3 not score >= 1" in format_check(plan)


def test_every_source_whose_shards_are_not_there_is_a_problem_said_once(mixed: Callable[..., RunConfig]) -> None:
    cfg = mixed()
    del cfg.data.sources["stored"]  # its ids are of unknown origin
    cfg.model.init = Init.random
    for name in ("und", "text"):
        cfg.data.sources[name].shards = f"absent-{name}.tar"
    problems = check(cfg)["problems"]
    assert len(problems) == 2 and all(f"absent-{name}.tar" in text for name, text in zip(("und", "text"), problems))
