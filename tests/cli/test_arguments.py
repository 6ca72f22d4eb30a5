"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from jp_train.cli.arguments import Parser, add_command, add_config, add_json, add_model, launch_options, whole_number
from jp_train.cli.main import parse
from jp_train.cli.replay_arguments import add_replay, config_and_overrides
from jp_train.cluster.options import LaunchOptions
from jp_train.errors import ConfigError


def test_a_whole_number_has_a_lowest_value_and_no_fraction() -> None:
    parse = whole_number(1)
    assert [parse("1"), parse("07")] == [1, 7]
    for text in ("0", "-1", "1.5", "", "x", "1e3"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            parse(text)
    assert whole_number(0)("0") == 0


def test_a_launch_has_the_options_that_its_command_was_given_and_the_defaults_of_the_others() -> None:
    arguments = parse(["launch", "a.yaml", "--hostfile", "h", "--exclude", "n2", "--grace", "7", "--patience", "5"])
    expected = LaunchOptions(hostfile=Path("h"), exclude="n2", grace_s=7, patience_s=5, choose_port=True)
    assert launch_options(arguments) == expected
    arguments = parse(["data", "encode-images", "a.yaml", "--hostfile", "h", "--dry-run"])
    assert launch_options(arguments) == LaunchOptions(hostfile=Path("h"), dry_run=True, choose_port=True)
    arguments = parse(["launch", "a.yaml", "--hostfile", "h", "--master-port", "29500"])
    assert launch_options(arguments) == LaunchOptions(hostfile=Path("h")), "a port that was given is meant"


def test_a_command_has_its_own_help_and_its_shared_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser(prog="p")
    command = add_command(parser.add_subparsers(metavar="COMMAND"), "go", "what it does", "an example")
    for add in (add_config, add_json, add_model):
        add(command)
    arguments = parser.parse_args(["go", "a.yaml", "x=1", "--model", "m", "--template", "stage2", "--json"])
    assert (arguments.config, arguments.overrides, arguments.json) == (Path("a.yaml"), ["x=1"], True)
    assert (arguments.model, arguments.template) == (Path("m"), "stage2")
    with pytest.raises(SystemExit):
        parser.parse_args(["go", "--help"])
    assert "what it does.\n\nan example" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "config", "overrides"),
    [
        ([], None, []),
        (["x=1"], None, ["x=1"]),
        (["a.yaml", "x=1"], Path("a.yaml"), ["x=1"]),
        (["x=1", "a.yaml", "y=2"], Path("a.yaml"), ["x=1", "y=2"]),
    ],
)
def test_a_replay_takes_a_configuration_and_overrides_in_any_order(
    words: list[str], config: Path | None, overrides: list[str]
) -> None:
    parser = argparse.ArgumentParser()
    add_replay(parser, step_required=False)
    arguments = parser.parse_args(words)
    assert config_and_overrides(arguments) == (config, overrides) and arguments.step == 1


def test_two_configurations_for_a_replay_are_an_error_that_names_both() -> None:
    parser = argparse.ArgumentParser()
    add_replay(parser, step_required=True)
    with pytest.raises(ConfigError, match=r"a\.yaml and b\.yaml"):
        config_and_overrides(parser.parse_args(["a.yaml", "b.yaml", "--step", "3"]))
