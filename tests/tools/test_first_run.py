"""`jp-train init`: what it writes loads, passes `jp-train check` and trains."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from jp_train.cli.main import main
from jp_train.config import load_config
from jp_train.config.choices import Init
from jp_train.data.shards import expand_shards
from jp_train.errors import ConfigError, DataError
from jp_train.tools.first_run import FirstRun, source_of, write_first_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A folder that looks like a model's with its tokenizer: `init` opens neither."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    return str(folder)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    """Shards as `data import text` leaves them."""
    (tmp_path / "a.txt").write_text("a document of a few words")
    assert main(["data", "import", "text", str(tmp_path / "a.txt"), str(tmp_path / "texts"), "--json"]) == 0
    return str(tmp_path / "texts")


def test_what_it_writes_passes_check_and_trains(
    tmp_path: Path, small_world, capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = small_world.root / "data", tmp_path / "mine"
    given = [f"generation={data / 'digits-gen'}", str(data / "scenes-und"), str(data / "text")]
    words = ["--data", *given, "--init-from", str(small_world.root / "init"), "--steps", "3"]
    assert main(["init", str(folder), *words]) == 0
    printed = capsys.readouterr().out.splitlines()
    check, launch = (line.split()[1:] for line in printed[-2:])
    assert (check[0], launch[0]) == ("check", "launch") and main(check) == 0
    assert "no problem found" in capsys.readouterr().out
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "jp_train", *launch, "--master-port", port]
    done = subprocess.run(command, cwd=tmp_path, env=None, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "run" / "status.json").read_text())["step"] == 3


@pytest.mark.parametrize("preset", ["tiny", "janus_pro_1b", "janus_pro_7b"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_preset_becomes_a_short_trial_of_the_kinds_that_there_are(
    preset: str, stage: int, tmp_path: Path, weights: str, texts: str
) -> None:
    drawn = f"generation={texts}"  # a kind that is given is not looked for
    first = FirstRun(folder=tmp_path / "mine", preset=preset, stage=stage, data=[drawn], weights=weights)
    write_first_run(first)
    config, usual = load_config(first.folder / "run.yaml"), load_config(ROOT / "launch" / "janus_pro_1b_stage2.yaml")
    assert config.stage.name == f"stage{stage}" and config.stage.training_steps == 20 != usual.stage.training_steps
    shares = config.stage.mixture
    assert (shares.understanding, shares.text) == (0, 0) and shares.generation > 0
    assert (config.tokenizer.path, config.model.init_from) == (weights, weights)
    assert list(config.data.sources) == ["texts"] and config.data.sources["texts"].shards == texts
    with pytest.raises(ConfigError, match="run.yaml, .* is not overwritten"):
        write_first_run(first)


def test_the_kind_of_a_folder_is_that_of_its_import_or_of_its_first_sample_and_asked_for_where_two_fit(
    texts: str, small_world
) -> None:
    data = small_world.root / "data"
    assert source_of(texts) == (texts, "text")
    (Path(texts) / "manifest.json").unlink()
    assert source_of(texts) == (texts, "text")
    assert source_of(str(data / "digits-und"))[1] == "understanding"
    with pytest.raises(ConfigError, match="may be understanding or generation; say which: --data understanding="):
        source_of(str(data / "digits-gen"))
    with pytest.raises(DataError, match="does not exist"):
        source_of("understanding=/absent")


@pytest.mark.parametrize("named", ["all", "some"])
def test_the_reports_of_an_import_in_place_lead_to_the_shards_where_they_are(
    tmp_path: Path, weights: str, texts: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "texts" if named == "all" else "texts/{000000,000001}.tar"
    shutil.copy("texts/000000.tar", "texts/000001.tar")
    assert main(["data", "import", "webdataset", source, "checked", "--kind", "text", "--json"]) == 0
    assert source_of("checked") == (str(tmp_path / "checked"), "text")
    first = FirstRun(folder=tmp_path / "mine", preset="tiny", stage=2, data=["checked"], weights=weights)
    write_first_run(first)
    sources = load_config(first.folder / "run.yaml").data.sources
    assert [(name, source.shards) for name, source in sources.items()] == [("checked", str(tmp_path / source))]
    with pytest.raises(DataError, match=r"only the reports of an import that left the tars where they are: name '/"):
        expand_shards("checked")
    Path("texts/000000.tar").unlink()
    Path("texts/000001.tar").unlink()
    with pytest.raises(DataError, match=r"holds no \*.tar file|000000.tar does not exist"):
        source_of("checked")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--init-from", "/absent"], "--init-from: /absent does not exist"),
        (["--init-from", "/absent"], "`make smoke-stage1 SMOKE_ARGS=--tiny` (2 minutes) makes weights"),
        (["--init-from", "random"], "--tokenizer is needed: a folder with a Hugging Face tokenizer, or a "),
        (["--tokenizer", "/absent"], "--tokenizer: tokenizer.path: /absent does not exist"),
        (["--stage", "1"], "tiny/stage1 trains on understanding and generation, and no folder has one of these kinds"),
    ],
)
def test_what_cannot_train_leaves_no_file(
    options: list[str], words: str, tmp_path: Path, weights: str, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "mine"), "--data", texts, "--init-from", weights, *options]) in (2, 4)
    assert words in capsys.readouterr().err and not list(tmp_path.glob("mine/*"))


def test_random_weights_pass_check_with_an_embedding_as_large_as_the_tokenizer(
    tmp_path: Path, small_world, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = small_world.root / "tokenizer", tmp_path / "large"
    extended = PreTrainedTokenizerFast.from_pretrained(small)
    extended.add_tokens([f"word{number}" for number in range(100)])
    extended.save_pretrained(large)
    words = ["--data", str(small_world.root / "data" / "text"), "--init-from", "random", "--tokenizer"]
    for name, tokenizer, entries in (("first", small, 1216), ("second", large, 1316)):
        assert main(["init", str(tmp_path / name), *words, str(tokenizer)]) == 0
        config = load_config(tmp_path / name / "run.yaml")
        assert (config.model.init, config.model.init_from) == (Init.random, None)
        assert config.model.language.vocab_size == entries
        assert main(["check", str(tmp_path / name / "run.yaml")]) == 0
        assert "random for the whole run (model.init=random)" in capsys.readouterr().out


def test_without_a_terminal_what_is_missing_is_named(
    tmp_path: Path, texts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "--data is needed: folders of shards" in capsys.readouterr().err
    assert main(["init", str(tmp_path / "mine"), "--data", texts]) == 2
    error = capsys.readouterr().err
    assert "--init-from is needed: folder of the starting weights, or random. In a clone of jp_train `make" in error
    assert main(["init", str(tmp_path / "mine"), "--data", texts, "--preset", "janus_pro_1b"]) == 2
    assert "make smoke" not in capsys.readouterr().err


@pytest.fixture
def terminal() -> Iterator[Callable[[str], tuple[int, str]]]:
    """Runs `jp-train init` at a terminal of its own with these words and answers: (exit status, what was shown)."""

    def at_terminal(words: str, answers: str) -> tuple[int, str]:
        ours, theirs = os.openpty()
        command = [sys.executable, "-m", "jp_train", "init", *words.split()]
        with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
            os.close(theirs)
            os.write(ours, answers.encode())
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while data := os.read(ours, 4096):
                    shown += data
        os.close(ours)
        return process.returncode, shown.decode()

    yield at_terminal


def test_at_a_terminal_preset_stage_data_and_weights_are_asked_for(
    tmp_path: Path, weights: str, texts: str, terminal: Callable[[str, str], tuple[int, str]]
) -> None:
    status, shown = terminal(f"{tmp_path}/mine", f"\n3\n{texts}\n{weights}\n")
    assert status == 0 and f"wrote {tmp_path}/mine/run.yaml (tiny/stage3, 20 steps)" in shown
    options = re.findall(r"\((--[a-z-]+)\): ", shown)
    assert options == ["--preset", "--stage", "--data", "--init-from"]
    status, shown = terminal(f"{tmp_path}/other", "\n\n/absent\n")
    assert status == 3 and "/absent does not exist" in shown and "--init-from" not in shown
