"""Every command in this process: its help teaches with examples, the parser accepts each of them, and options have the
documented values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from jp_train.cli import (
    ask_command,
    check_command,
    config_command,
    data_command,
    data_encode_images,
    data_explain,
    data_import,
    data_index,
    data_inspect,
    data_simulate,
    data_verify,
    export_command,
    forecast_command,
    generate_command,
    import_command,
    init_command,
    launch_command,
    main,
    preflight_command,
    report_command,
    status_command,
    train_command,
)

COMMANDS: dict[str, ModuleType] = {
    "ask": ask_command, "check": check_command, "config": config_command, "export": export_command,
    "forecast": forecast_command, "generate": generate_command, "import": import_command, "init": init_command,
    "launch": launch_command,
    "preflight": preflight_command, "report": report_command, "status": status_command, "train": train_command,
    "data encode-images": data_encode_images, "data explain": data_explain, "data import": data_import,
    "data index": data_index, "data inspect": data_inspect, "data simulate": data_simulate, "data verify": data_verify,
}  # fmt: skip


def examples(text: str) -> Iterator[str]:
    """The `jp-train ...` commands of a help text, without the explanation beside them."""
    for line in text.replace("\\\n", " ").splitlines():
        start = line.find("jp-train ")
        if start < 0 or "`" in line or line.startswith("usage:"):
            continue
        *words, last = re.split(r" {2,}", line[start:].strip())
        explanation = words and " " in last and not re.search(r"(^| )--", last)
        yield " ".join(words if explanation else [*words, last])


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main.main([*command.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_command_of_the_parser_is_looked_at_here() -> None:
    tools = {f"data {tool}" for tool in data_command.TOOLS}
    assert set(COMMANDS) == {*main.COMMANDS, *tools} - {"data"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_has_an_example_of_it_and_fits_on_the_screen(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, capsys)
    assert any(example.startswith(f"jp-train {command} ") for example in examples(text))
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_parser_accepts_every_example_of_the_help_for_the_command_that_it_names(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = list(examples(help_of(command, capsys)))
    assert shown
    for example in shown:
        _, *words = shlex.split(example)
        arguments = main.parse(words)
        name = next(name for name in COMMANDS if f"{' '.join(words)} ".startswith(f"{name} "))
        assert arguments.run.__module__ == COMMANDS[name].__name__, example
        # words of an explanation would be taken for overrides
        assert all("=" in override for override in getattr(arguments, "overrides", [])), example


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train a.yaml seed=3", {"config": Path("a.yaml"), "overrides": ["seed=3"]}),
        ("check a.yaml", {"hostfile": None, "config_only": False, "json": False}),
        ("launch a.yaml --hostfile h", {"master_port": None, "launcher": "pdsh", "max_restarts": 0, "grace_s": 600.0}),
        ("launch a.yaml --hostfile h --patience 5", {"patience_s": 5.0, "dry_run": False, "skip_preflight": False}),
        ("preflight --hostfile h", {"config": None, "timeout": 10.0, "skip": ""}),
        ("forecast a.yaml --world 64", {"world": 64, "gpu": "a100-40gb", "hardware": []}),
        ("import in out", {"dtype": "bf16"}),
        ("export run out", {"dtype": "bf16", "layout": "hf"}),
        ("generate --model m --prompt x --out o.png", {"cfg_scale": None, "seed": 0}),
        ("ask --model m --image i --question q", {"max_new_tokens": 256, "template": None}),
        ("report a b", {"run_dirs": [Path("a"), Path("b")], "out": None}),
        ("status a", {"watch": 0, "json": False}),
        ("data index a.yaml --processes 2", {"processes": 2}),
        ("data verify a.yaml --sample 7", {"sample": 7, "fast": False, "exclude": False}),
        ("data explain --run r --step 5", {"run_dir": Path("r"), "row": None, "rank": None}),
        ("data inspect --run r", {"step": 1, "rows": 8, "out": Path("inspect.html")}),
        ("data simulate a.yaml", {"world": None, "synthetic": False, "steps": None}),
        ("data encode-images a.yaml", {"batch": 8, "verify_sample": 0, "max_mismatch": 0.0}),
        ("data import text s o", {"document": "file", "shard_samples": 100_000, "shard_size": 256}),
        ("data import coco s o --images i --kind generation", {"per": "caption", "shard_samples": 10_000}),
    ],
)
def test_options_that_are_not_given_have_the_documented_defaults(words: str, expected: dict[str, Any]) -> None:
    arguments = vars(main.parse(words.split()))
    assert {name: arguments[name] for name in expected} == expected


@pytest.mark.parametrize(
    "words",
    [
        "train", "check a.yaml b", "launch a.yaml", "forecast a.yaml", "forecast a.yaml --world 1 --hostfile h",
        "forecast a.yaml --world 0", "launch a.yaml --hostfile h --launcher ssh", "export run", "status",
        "data verify a.yaml --fast --sample 3", "data index a.yaml --processes 0", "data explain --run r",
        "data simulate a.yaml --world 2 --hostfile h", "data import coco s o --images i", "ask --model m --image i",
        "launch a.yaml --hostfile h --max-restarts -1",
    ],
)  # fmt: skip
def test_a_command_line_that_lacks_or_contradicts_something_is_a_usage_error(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if words == "check a.yaml b":  # an override without "=" is an error of the configuration, with the same status
        assert main.main(["check", "examples/smoke/stage1.yaml", "b"]) == 2
        assert "write key=value" in capsys.readouterr().err
        return
    with pytest.raises(SystemExit) as stop:
        main.parse(words.split())
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err
