"""The command line: exit statuses, one-line errors, and every command that needs no training run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from jp_train.cli.data_command import TOOLS
from jp_train.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
STAGE1 = str(ROOT / "examples" / "smoke" / "stage1.yaml")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 150


def test_the_top_level_help_shows_the_way_through_and_the_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "jp-train launch" in text and "exit status" in text
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["chek"], "jp-train: error: there is no command 'chek'; did you mean 'check'?"),
        (["trane"], "jp-train: error: there is no command 'trane'; did you mean 'train'?"),
        (["data", "indx"], "jp-train data: error: there is no tool 'indx'; did you mean 'index'?"),
        (["data", "import", "cocoa"], "jp-train data import: error: there is no format 'cocoa'; did you mean 'coco'?"),
        (["data", "xyz"], "jp-train data: error: there is no tool 'xyz'; it is one of " + ", ".join(TOOLS)),
    ],
)
def test_a_misspelt_command_exits_2_and_names_the_nearest_one(words, error, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1]) == ("", error)


def test_a_mistyped_key_exits_2_with_one_line_and_no_traceback():
    done = subprocess.run(
        [sys.executable, "-m", "jp_train", "check", STAGE1, "optimizer.warmup_step=3"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "did you mean 'optimizer.warmup_steps'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_overrides_may_stand_before_and_behind_options():
    from jp_train.cli.main import parse

    arguments = parse(
        ["launch", STAGE1, "seed=1", "--hostfile", "hostfiles/local", "optimizer.lr=2", "--dry-run", "seed=3"]
    )
    assert sorted(arguments.overrides) == ["optimizer.lr=2", "seed=1", "seed=3"] and arguments.overrides[-1] == "seed=3"
    with pytest.raises(SystemExit) as stop:
        parse(["check", STAGE1, "--hostfle", "x"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit):
        parse(["status", "run", "stray"])


def test_check_of_a_paper_config_prints_the_papers_numbers_without_data(capsys):
    code = main(["check", "launch/janus_pro_7b_stage2.yaml", "--config-only", "--hostfile", "hostfiles/a100_32x8"])
    text = capsys.readouterr().out
    assert code == 0
    for expected in ("360,000, stopped early at 270,000", "7,407,773,323", "7,032,201,216", "2 : 3 : 5", "256 ranks"):
        assert expected in text


def test_check_of_a_world_size_that_does_not_divide_the_rows_lists_the_problem_and_exits_2(tmp_path, capsys):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=5\n")
    code = main(["check", "launch/janus_pro_1b_stage2.yaml", "--config-only", "--hostfile", str(hostfile), "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert code == 2
    assert "512 rows" in plan["problems"][0] and "5 ranks" in plan["problems"][0]


def test_check_reads_tokenizer_weights_and_shards_and_counts_epochs(small_world, capsys):
    code = main(["check", "examples/smoke/stage1.yaml", *small_world.overrides, "stage.batch_size=64", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert code == 0, plan["problems"]
    assert plan["weights"]["tensors"] > 200
    rows = {row["name"]: row for row in plan["sources"]}
    assert set(rows) == {"digits-und", "scenes-und", "digits-gen", "scenes-gen"}
    steps, batch = plan["steps"]["stops_at"], 64
    generated = sum(rows[name]["epochs"] * rows[name]["samples"] for name in ("digits-gen", "scenes-gen"))
    assert generated == pytest.approx(steps * batch * 3 / 4, rel=1e-6)


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ("model.language.heads=8", 4, "num_attention_heads is 4, ours 8 (model.language.heads=4)"),
        ("model.init_from=null", 2, "language_model, vision_model, gen_vision_model: frozen and without weights"),
    ],
)
def test_starting_weights_that_do_not_fit_stop_check_and_training_alike(
    small_world, tmp_path, command, change, code, message
):
    words = [command, "examples/smoke/stage1.yaml", *small_world.overrides, f"run_dir={tmp_path / 'run'}", change]
    done = subprocess.run([sys.executable, "-m", "jp_train", *words], capture_output=True, text=True, check=False)
    assert message in (done.stdout if command == "check" else done.stderr)
    assert done.returncode == code and "Traceback" not in done.stderr


def test_data_index_counts_every_sample_once(small_world, capsys):
    assert (
        main(["data", "index", "examples/smoke/stage1.yaml", *small_world.overrides, "--processes", "1", "--json"]) == 0
    )
    summary = json.loads(capsys.readouterr().out)
    assert "digits-gen" in json.dumps(summary)


def test_weights_survive_the_way_to_the_released_layout_and_back(small_world, tmp_path, capsys):
    from jp_train.model.weight_files import open_weights

    assert (
        main(
            [
                "export",
                str(small_world.root / "init"),
                str(tmp_path / "released"),
                "--layout",
                "deepseek",
                "--dtype",
                "fp32",
            ]
        )
        == 0
    )
    assert main(["import", str(tmp_path / "released"), str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    before, after = open_weights(small_world.root / "init"), open_weights(tmp_path / "back")
    assert sorted(before.keys()) == sorted(after.keys())
    for name in before.keys():  # noqa: SIM118 - no dict
        assert before.get(name).equal(after.get(name)), name
    error = capsys.readouterr().err
    assert f"written: {len(after.keys())} tensors, " in error and "multi_modality" not in error
    assert main(["export", str(tmp_path / "back"), str(tmp_path / "released")]) == 4  # the folder exists
    assert "not empty" in capsys.readouterr().err


def test_generate_writes_images_and_ask_reads_one(small_world, tmp_path, capsys):
    model = str(small_world.root / "init")
    out = tmp_path / "picture.png"
    prompts = ["--prompt", "the digit seven", "--prompt", "a red circle"]
    assert main(["generate", "--model", model, *prompts, "--out", str(out), "--cfg-scale", "1"]) == 0
    output = capsys.readouterr()
    files = output.out.split()
    assert [Path(file).name for file in files] == ["picture-1.png", "picture-2.png"]
    assert output.err.startswith("2 x 32 x 32 pixels, cfg scale 1, temperature 1, float32 on cpu, ")
    assert Image.open(files[0]).size == (32, 32)
    assert (
        main(["ask", "--model", model, "--image", files[0], "--question", "What is it?", "--max-new-tokens", "4"]) == 0
    )
    capsys.readouterr()
    silent = ["--question", "?", "--max-new-tokens", "0"]
    assert main(["ask", "--model", model, "--image", files[0], *silent]) == 0
    output = capsys.readouterr()
    assert (output.out, output.err) == ("\n", "(the model answered nothing)\n")
    absent = str(tmp_path / "absent.png")
    assert main(["ask", "--model", model, "--image", absent, "--question", "?"]) == 3
    assert main(["ask", "--model", model, "--image", str(tmp_path), "--question", "?"]) == 3
    assert f"--image {tmp_path}: is a folder" in capsys.readouterr().err
    assert main(["ask", "--model", model, "--image", absent, "--image", files[0], *silent]) == 3
    assert main(["ask", "--model", model, "--image", files[0], __file__, *silent]) == 3
    assert f"image {__file__}: " in capsys.readouterr().err
    both = ["ask", "--model", model, "--image", *files, "--max-new-tokens", "0", "--question"]
    assert main([*both, "Is <image> larger than <image>?"]) == main([*both, "Which is larger?"]) == 0
    capsys.readouterr()
    assert main([*both, "Is <image> larger?"]) == 2
    assert (
        "'Is <image> larger?': 1 <image> for 2 images (1 in question 1); give one for each" in capsys.readouterr().err
    )
    assert main(["generate", "--model", str(tmp_path), "--prompt", "x", "--out", str(out)]) == 4
    assert main(["generate", "--model", model, "--prompt", "x", "--out", "picture.bmp"]) == 2
    assert main(["generate", "--model", model, "--prompt", "x", "--out", "/proc/absent/picture.png"]) == 2
