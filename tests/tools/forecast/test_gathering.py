"""The replay of DeepSpeed's gathers: small traces worked out by hand."""

import pytest

from jp_train.tools.forecast.gathering import GatherRules, replay
from jp_train.tools.forecast.shapes import Parameter
from jp_train.tools.forecast.walk import BACKWARD, FORWARD, Visit

LAYERS = ("a", "b", "c")


def parameters(numel: int = 100, trained: bool = True) -> list[Parameter]:
    return [Parameter(f"{path}.weight", path, "language_model", numel, trained) for path in LAYERS]


def there_and_back(*, back: bool = True) -> list[Visit]:
    forward = [Visit(path, FORWARD, 0) for path in LAYERS]
    return forward + [Visit(path, BACKWARD, 0) for path in reversed(LAYERS)] * back


def rules(**given) -> GatherRules:
    return GatherRules(**{"world": 4, "prefetch": 0, "max_live": 10**9, "max_reuse": 0, "persistent": 0, **given})


def test_without_reuse_and_prefetch_one_layer_is_there_at_a_time_and_each_is_gathered_twice():
    found = replay(parameters(), there_and_back(), rules())
    assert found.levels == [100] * 6
    assert (found.forward.elements, found.forward.calls) == (300, 3)
    assert (found.backward.elements, found.backward.calls) == (300, 3)
    assert (found.forward.fresh, found.backward.fresh) == (300, 0)


def test_a_small_model_stays_whole_from_forward_to_backward():
    found = replay(parameters(), there_and_back(), rules(max_reuse=10**9))
    assert found.levels == [100, 200, 300, 300, 200, 100]
    assert found.backward.elements == 0


def test_a_layer_stays_only_when_it_is_needed_again_within_the_reuse_distance():
    # behind the forward pass of c its next use is 0 elements of the trace away, of b 200, of a 400
    found = replay(parameters(), there_and_back(), rules(max_reuse=201))
    assert found.levels == [100, 100, 200, 200, 100, 100]
    assert found.backward.elements == 100


def test_prefetch_runs_ahead_up_to_the_limit_of_live_parameters():
    found = replay(parameters(), there_and_back(back=False), rules(prefetch=100, max_live=200))
    assert found.levels == [200, 200, 100]
    assert replay(parameters(), there_and_back(back=False), rules(prefetch=100, max_live=100)).levels == [100, 100, 100]


def test_parameters_gathered_together_take_their_buffer_besides_until_the_last_is_used():
    # a's visit prefetches b and c in one buffer of 200; b's use copies both out, c's use frees the buffer
    found = replay(parameters(), there_and_back(back=False), rules(prefetch=150))
    assert found.levels == [300, 400, 100]
    assert found.forward.calls == 2


def test_small_parameters_are_never_gathered_and_one_rank_gathers_nothing():
    for found in (
        replay(parameters(), there_and_back(), rules(persistent=100)),
        replay(parameters(), there_and_back(), rules(world=1)),
    ):
        assert found.levels == [0] * 6
        assert found.forward.elements == found.backward.elements == 0


@pytest.mark.parametrize("trained", [True, False])
def test_only_trained_parameters_are_fresh(trained):
    assert replay(parameters(trained=trained), there_and_back(), rules()).forward.fresh == 300 * trained
