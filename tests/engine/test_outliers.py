"""Which steps are bad, and that a resumed run judges like the whole one."""

from __future__ import annotations

import json
import math
import random

import pytest

from jp_train.config.schema import GuardConfig, NonfiniteAction, OutlierAction
from jp_train.engine.outliers import RollingStatistics


def usual(**changes) -> RollingStatistics:
    return RollingStatistics(GuardConfig(**{"outlier_window": 32, **changes}))


def noise(n: int, seed: int = 0) -> list[tuple[float, float]]:
    draw = random.Random(seed)
    return [(3.0 + draw.gauss(0, 0.1), math.exp(draw.gauss(0, 0.3))) for _ in range(n)]


def test_noise_is_no_outlier_and_a_spike_of_either_value_is():
    judge = usual()
    assert not any(judge.judge(*values).bad for values in noise(2000))
    assert judge.judge(3.0, 40.0).what.startswith("grad norm 40 is ")
    result = judge.judge(9.0, 1.0)
    assert result.what.startswith("loss 9 is ") and result.action == "record" and result.applies
    assert "of the last 32 steps" in result.what
    early = usual()
    for values in noise(31):
        early.judge(*values)
    assert "of the last 31 steps" in early.judge(9.0, 1.0).what
    assert "loss" in (both := judge.judge(9.0, 40.0).what) and "grad norm" in both


def test_the_limit_is_the_median_and_the_median_distance_by_hand():
    judge = usual(outlier_factor=10.0)
    for number in range(16):
        judge.judge(1.0 + number, 1.0)
    result = judge.summary()["loss"]
    assert (
        result["median"] == 8.5
        and result["spread"] == pytest.approx(1.4826 * 4.0)
        and result["limit"] == pytest.approx(8.5 + 10 * 1.4826 * 4.0)
    )
    assert judge.summary()["grad_norm"]["spread"] == pytest.approx(0.02), (
        "a value that does not move has a spread of 2%"
    )


def test_falling_values_and_the_first_steps_are_never_outliers():
    judge = usual()
    assert not judge.judge(5.0, 1.0).bad and not judge.judge(500.0, 1.0).bad, "nothing is usual yet"
    judge = usual()
    assert not any(judge.judge(1000.0 / (1 + step), 100.0 / (1 + step)).bad for step in range(500))


def test_a_lasting_shift_is_learnt_within_half_the_window():
    judge = usual()
    for values in noise(64):
        judge.judge(*values)
    bad = [judge.judge(loss + 5.0, norm).bad for loss, norm in noise(64, seed=1)]
    assert bad[0] and not any(bad[17:])


@pytest.mark.parametrize("values", [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_values_that_are_not_finite_are_bad_from_the_first_step_and_leave_no_trace(values):
    judge = usual()
    result = judge.judge(*values)
    assert result.action == "skip" and not result.applies and result.what.endswith("not finite")
    assert judge.state() == usual().state()
    assert usual(nonfinite_action=NonfiniteAction.stop).judge(*values).action == "stop"


@pytest.mark.parametrize(("action", "applies"), [("skip", False), ("stop", False), ("record", True), ("off", True)])
def test_the_action_on_an_outlier_is_the_configured_one(action, applies):
    judge = usual(outlier_action=OutlierAction(action))
    for values in noise(40):
        judge.judge(*values)
    result = judge.judge(3.0, 900.0)
    assert result.applies is applies and result.bad is (action != "off")
    assert not judge.judge(-math.inf, 1.0).applies, "off looks for no outliers, and yet not finite is not finite"


def test_a_resumed_run_gives_the_same_verdicts():
    whole, first = usual(), usual()
    values = [*noise(50), (3.0, 50.0), *noise(20, seed=2), (20.0, 1.0)]
    expected = [whole.judge(*pair) for pair in values]
    for pair in values[:45]:
        first.judge(*pair)
    again = usual()
    again.restore(json.loads(json.dumps(first.state())))
    assert [again.judge(*pair) for pair in values[45:]] == expected[45:]
