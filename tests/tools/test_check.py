"""The plan that `jp-train check` prints, against the configuration and files it was made from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jp_train.config import RunConfig, load_config
from jp_train.config.schema import LossConfig
from jp_train.model.export import write_export
from jp_train.model.janus_pro import JanusPro
from jp_train.model.pretrained import init_fresh_vq
from jp_train.model.vq import VQTokenizer
from jp_train.tools.check import check, format_check
from tests.model.janus_tiny import SIDE, tiny_config, tiny_model

ROOT = Path(__file__).resolve().parents[2]
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
    cfg.model.vision.patch_size = 24
    problems = check(cfg)["problems"]
    for part in ("16 and 24 tokens a side", "data.sources is empty", "/absent/tokenizer", "/absent/weights"):
        assert sum(part in problem for problem in problems) == 1, (part, problems)
    lines = format_check(check(cfg)).splitlines()
    assert lines[: len(problems)] == [f"PROBLEM: {problem}" for problem in problems]


@pytest.mark.parametrize("layout", ["hf", "deepseek"])
def test_starting_weights_are_compared_by_name_and_shape(tmp_path: Path, layout: str) -> None:
    cfg = RunConfig(model=tiny_config())
    model, vq = tiny_model(), VQTokenizer(cfg.model.vq, SIDE)
    init_fresh_vq(vq, 0)
    named = [*model.state_dict().items(), *((f"model.{name}", value) for name, value in vq.state_dict().items())]
    write_export(tmp_path / "export", model.janus_config, named, None, layout=layout)
    cfg.model.init_from = str(tmp_path / "export")
    assert check(cfg)["weights"] == {"init_from": cfg.model.init_from, "tensors": len(named)}
    cfg.model.language.intermediate_size += 1
    problems = check(cfg)["problems"]
    assert any("6 of another shape" in problem and "gate_proj" in problem for problem in problems), problems
