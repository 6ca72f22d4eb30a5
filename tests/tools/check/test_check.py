"""The plan that `jp-train check` prints, against the configuration and files it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jp_train.cluster.options import LaunchOptions
from jp_train.config import RunConfig, load_config
from jp_train.config.schema import InitPartsConfig, LossConfig
from jp_train.errors import CheckpointError, ConfigError, DataError
from jp_train.model.janus_pro import JanusPro
from jp_train.model.vq import VQTokenizer
from jp_train.tools.check.check import CHECKS, check, look, require_startable
from jp_train.tools.check.subject import Subject
from jp_train.tools.check.text import format_check

ROOT = Path(__file__).resolve().parents[3]
STAGE1 = ROOT / "launch" / "janus_pro_1b_stage1.yaml"


def test_the_plan_states_the_batch_for_the_ranks_of_a_hostfile_and_what_learns() -> None:
    cfg = load_config(STAGE1)
    plan = check(cfg, ROOT / "hostfiles" / "a100_16x8", config_only=True)
    assert plan["problems"] == [] and plan["stage"] == cfg.stage.name
    batch = plan["batch"]
    assert batch["ranks"] == 128
    assert batch["rows_per_step"] == 128 * batch["micro_batch_rows"] * batch["gradient_accumulation_steps"]
    with torch.device("meta"):
        model, vq = JanusPro(cfg.model, LossConfig(), 1, False, 0), VQTokenizer(cfg.model.vq, 384)
    elements = sum(p.numel() for part in (model, vq) for p in part.parameters())
    assert plan["parameters"]["total"] == elements and plan["parameters"]["trainable"] == 48_408_576
    assert "tokenizer" not in plan and "weights" not in plan and "sources" not in plan


def test_everything_that_would_stop_the_run_is_listed_first() -> None:
    cfg = load_config(STAGE1)
    cfg.tokenizer.path, cfg.model.init_from, cfg.data.sources = "/absent/tokenizer", "/absent/weights", {}
    cfg.model.init_parts = InitPartsConfig()
    cfg.model.vision.patch_size = 24
    problems = check(cfg)["problems"]
    for part in ("16 and 24 tokens a side", "data.sources is empty", "/absent/tokenizer", "/absent/weights"):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    lines = format_check(check(cfg)).splitlines()
    assert lines[: len(problems)] == [f"PROBLEM: {problem}" for problem in problems]


def test_every_problem_is_collected_once_and_in_the_order_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizer and sources both fail on the same missing tokenizer."""
    monkeypatch.chdir(ROOT)
    cfg = load_config(STAGE1, ["tokenizer.path=/absent/tokenizer", "stage.batch_size=130"])
    subject = Subject(config=cfg, options=LaunchOptions(hostfile=ROOT / "hostfiles" / "a100_16x8"))
    found = look(subject, {entry.name: entry.find for entry in CHECKS})
    parts, sources = vars(cfg.model.init_parts), cfg.data.sources
    kinds = [ConfigError] * 2 + [CheckpointError] * len(parts) + [DataError] * len(sources)
    assert [type(problem) for problem in subject.problems] == kinds
    words = ["65 rows a step cannot be split over 128 ranks", "tokenizer.path: /absent/tokenizer"]
    words += [f"model.init_parts.{name}: {ROOT / path} does not exist" for name, path in parts.items()]
    words += [f"source {name}: shards" for name in sources]
    assert [word for word, problem in zip(words, subject.problems, strict=True) if word not in str(problem)] == []
    assert set(found) == {"steps", "optimizer", "mixture", "parameters", "run_folder"}


def test_the_exit_status_is_that_of_the_only_kind_of_problem_and_2_for_several(
    runnable: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = {entry.name: entry for entry in CHECKS}
    quick = tuple(usual[name] for name in ("named_shards", "weight_files", "named_sources"))
    monkeypatch.setattr("jp_train.tools.check.check.CHECKS", quick)
    assert check(runnable)["exit_status"] == 0
    runnable.model.init_from = "absent"
    assert check(runnable)["exit_status"] == CheckpointError.exit_code == 4
    runnable.data.sources["text"].shards = "absent.tar"
    assert check(runnable)["exit_status"] == ConfigError.exit_code == 2
    runnable.model.init_from = None
    assert check(runnable)["exit_status"] == DataError.exit_code == 3


def test_a_raw_value_that_deepspeed_rejects_is_a_problem_and_one_that_it_takes_is_none() -> None:
    key = "engine.deepspeed.zero_optimization.reduce_bucket_size"
    assert check(load_config(STAGE1, [f"{key}=1000000"]), config_only=True)["problems"] == []
    (problem,) = check(load_config(STAGE1, [f"{key}=-1"]), config_only=True)["problems"]
    assert problem == (
        "engine.deepspeed: DeepSpeed rejects reduce_bucket_size: Input should be greater than 0, found -1"
    )


@pytest.fixture
def runnable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Everything that a launch looks at is there: a tokenizer's file, a file of weights, shards."""
    monkeypatch.chdir(tmp_path)
    for path in ("tokenizer/tokenizer.json", "weights/model.safetensors", "data/text.tar"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).touch()
    (tmp_path / "local").write_text("localhost slots=1\n")
    (tmp_path / "remote").write_text("node1 slots=1\n")
    (tmp_path / "run.yaml").write_text(
        "preset: tiny/stage2\nrun_dir: run\ntokenizer: {path: tokenizer}\nmodel: {init_from: weights}\n"
        "data: {root: data, sources: {text: {kind: text, shards: text.tar}}}\n"
        "stage: {mixture: {understanding: 0, generation: 0}}\n"
    )
    return load_config("run.yaml")


def local(**more: bool) -> LaunchOptions:
    return LaunchOptions(hostfile=Path("local"), **more)


def remote(**more: bool) -> LaunchOptions:
    return LaunchOptions(hostfile=Path("remote"), **more)


def test_a_launch_ends_with_the_first_problem_and_names_all(runnable: RunConfig) -> None:
    assert require_startable(runnable, local()) == ""
    runnable.model.init_from = "nope"
    with pytest.raises(CheckpointError) as one:
        require_startable(runnable, local())
    where = Path("nope").absolute()
    assert str(one.value).startswith(f"model.init_from: {where} does not exist (relative paths follow the working dir")
    runnable.data.sources["text"].shards = "else.tar"
    with pytest.raises(CheckpointError, match="2 problems, nothing was started") as two:
        require_startable(runnable, local())
    first, second = str(two.value).split("\nPROBLEM: ")[1:]
    assert first == str(one.value) and second.startswith("source text: shards 'else.tar': ")


@pytest.mark.parametrize("dry_run", [False, True])
def test_what_only_the_hosts_of_the_ranks_have_is_a_warning_here_and_what_is_wrong_here_a_problem(
    runnable: RunConfig, capsys: pytest.CaptureFixture[str], dry_run: bool
) -> None:
    runnable.data.root = "/not/mounted"
    assert require_startable(runnable, remote(dry_run=dry_run)) == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "launch: warning: not on this host, so left to preflight on the ranks' hosts: /not/mounted/text.tar"
    with pytest.raises(DataError, match="/not/mounted/text.tar does not exist"):
        require_startable(runnable, local(dry_run=dry_run))
    Path("tokenizer/tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="neither tokenizer.json nor"):
        require_startable(runnable, remote(dry_run=dry_run))


def test_a_run_folder_that_this_host_cannot_write_stops_no_launch_on_others(runnable: RunConfig) -> None:
    Path("file").touch()
    runnable.run_dir = "file/run"
    assert require_startable(runnable, remote()) == ""
    with pytest.raises(ConfigError, match="run_dir file/run cannot be written"):
        require_startable(runnable, local())
