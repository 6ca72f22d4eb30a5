"""The errors that a user meets: their exit statuses, and the hint at the nearest name."""

from __future__ import annotations

import pytest

from jp_train import errors
from jp_train.errors import did_you_mean, one_of


def test_every_kind_of_error_has_the_documented_exit_status() -> None:
    codes = {name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}
    assert codes == {
        "JpTrainError": 1, "ConfigError": 2, "DataError": 3, "CheckpointError": 4, "LaunchError": 5, "SkipSample": 1,
    }  # fmt: skip


def test_a_sample_that_is_skipped_carries_the_class_of_its_fault() -> None:
    assert str(errors.SkipSample("too dark", "dark")) == "too dark"
    assert (errors.SkipSample("x", "dark").fault, errors.SkipSample("x").fault) == ("dark", "bad_sample")


@pytest.mark.parametrize(
    ("name", "hint"), [("chek", "; did you mean 'check'?"), ("indx", "; did you mean 'index'?"), ("xyz", ""), ("", "")]
)
def test_a_misspelt_name_is_answered_with_the_nearest_one_or_nothing(name: str, hint: str) -> None:
    assert did_you_mean(name, ["check", "index", "verify"]) == hint


def test_the_cutoff_says_how_alike_two_names_must_be() -> None:
    assert did_you_mean("gen_heat", ["gen_head", "aligner"], cutoff=0.9) == ""
    assert did_you_mean("gen_heat", ["gen_head", "aligner"], cutoff=0.8) == "; did you mean 'gen_head'?"


def test_a_name_that_is_none_of_a_list_is_answered_with_the_nearest_and_the_list() -> None:
    assert one_of("gen_heat", ["aligner", "gen_head"]) == "; did you mean 'gen_head'? It is one of aligner, gen_head"
    assert one_of("x", ["aligner", "gen_head"]) == "; it is one of aligner, gen_head"
