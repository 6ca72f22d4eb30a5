"""The smoke runner itself, at its smallest: real shards, real parts, a real stage under the deepspeed launcher with
two ranks."""

import json
import socket

import pytest

from examples.smoke.run import STAGES, Options, main, run_steps, stage_overrides
from jp_train.model.weight_files import open_weights


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_stage_alone_makes_what_it_needs_and_a_second_call_keeps_it(tmp_path, capsys):
    out = tmp_path / "smoke"
    arguments = [
        "--tiny",
        "--out",
        str(out),
        "--only-stage",
        "1",
        "--master-port",
        str(free_port()),
        "logging.wandb.mode=disabled",
    ]
    assert main(arguments) == 0
    status = json.loads((out / "stage1" / "status.json").read_text())
    assert status["step"] == 3 and status["dp_world_size"] == 2
    before, after = open_weights(out / "init"), open_weights(out / "stage1")
    moved = {name for name in before.keys() if not before.get(name).float().equal(after.get(name).float())}  # noqa: SIM118
    assert moved, "nothing learned"
    frozen_prefixes = ("model.vqmodel.", "model.vision_model.", "model.language_model.", "lm_head.")
    assert not [name for name in moved if name.startswith(frozen_prefixes)]
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 2
    assert "--fresh" in capsys.readouterr().err
    again: list[str] = []

    def never() -> int:
        raise AssertionError("made before, and made again")

    steps = [("data", never), ("tokenizer", never), ("parts", never), ("stage1", lambda: again.append("stage1") or 0)]
    assert (
        run_steps(
            Options(out=out, tiny=True, overrides=("logging.wandb.mode=disabled",)),
            steps,
            dict.fromkeys(dict(steps), 1.0),
            only_stage=1,
        )
        == 0
    )
    assert again == ["stage1"] and not (out / "stage1").exists(), "the stage that was asked for is trained anew"
    assert capsys.readouterr().err.count("kept") == 3


def test_starting_afresh_never_removes_a_folder_that_the_smoke_run_did_not_make(tmp_path, capsys):
    precious = tmp_path / "thesis.tex"
    precious.write_text("years of work")
    assert main(["--tiny", "--fresh", "--out", str(tmp_path)]) == 2
    assert precious.exists() and "was not made by this command" in capsys.readouterr().err


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_starts_from_the_stage_before(tmp_path, stage):
    from examples.smoke.run import ROOT
    from jp_train.config import load_config

    config = load_config(
        ROOT / "examples" / "smoke" / f"stage{stage}.yaml", stage_overrides(Options(out=tmp_path), stage)
    )
    assert config.model.init_from == str(tmp_path / ("init" if stage == 1 else f"stage{stage - 1}"))
    assert config.run_dir == str(tmp_path / f"stage{stage}")
    if stage == 2:
        assert config.stage.early_stop.at_step < config.stage.training_steps
