"""Which exceptions are failed collectives, and what they then say."""

from __future__ import annotations

import pytest
import torch

from jp_train.engine.watch.guard import Pace, SequenceGuard, compare_signatures, is_collective_failure
from jp_train.errors import JpTrainError


def test_the_signature_is_the_sequence_of_modules_that_own_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    guard = SequenceGuard(model, rank=3)

    def run(*order: int) -> int:
        guard.begin_step(7)
        for index in order:
            model[index](torch.zeros(2))
        return guard.signature

    assert run(0, 1, 2) == run(0, 2) != run(2, 0) != run(0)
    assert guard.entered == 1 and guard.last == "0"


def test_a_failed_collective_names_rank_step_micro_batch_and_module():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    guard = SequenceGuard(model, rank=3)
    guard.begin_step(7)
    with pytest.raises(JpTrainError) as error, guard.watch("backward", 2):
        model(torch.zeros(2))
        raise RuntimeError("[/x/gloo/pair.cc:537] Read error: Connection reset by peer")
    assert "rank 3 at step 7, backward, micro-batch 2, after 1 module calls (last: 0): Read error" in str(error.value)


def test_other_errors_pass_through():
    guard = SequenceGuard(torch.nn.Linear(1, 1), rank=0)
    with pytest.raises(RuntimeError, match="shape") as error, guard.watch("forward"):
        raise RuntimeError("shape mismatch")
    assert not isinstance(error.value, JpTrainError)
    assert is_collective_failure(RuntimeError("Timed out waiting 1000ms for recv operation to complete"))


def test_differing_signatures_name_the_ranks():
    compare_signatures([5, 5, 5], step=1)
    with pytest.raises(JpTrainError, match=r"step 4: rank\(s\) 1, 3 ran another sequence"):
        compare_signatures([5, 6, 5, 7], step=4)


def test_what_the_other_ranks_say_takes_the_place_of_general_advice():
    guard = SequenceGuard(None, rank=0)
    guard.explain = lambda: "rank 1 is gone"
    with (
        pytest.raises(JpTrainError, match=r"^rank 1 is gone; so .* Connection closed by peer$"),
        guard.watch("forward"),
    ):
        raise RuntimeError(
            "[x.cc:1] Connection closed by peer. This is typically caused by a remote worker crashing. Check the logs"
        )
    with pytest.raises(JpTrainError, match="than rank 0: it was the vision tower"):
        compare_signatures([5, 6], step=4, explain=lambda: "it was the vision tower")


def test_phases_and_modules_are_progress_and_the_first_step_may_be_slow():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    guard = SequenceGuard(model, rank=0)
    assert guard.pace is Pace.SLOW
    paces, seen = [], [guard.progress]
    for step in (5, 6):
        guard.begin_step(step)
        with guard.watch("forward", 0):
            paces.append(guard.pace)
            model(torch.zeros(2))
        assert list(guard.trail) == ["0", "1"] and guard.phase == "after forward"
        seen.append(guard.progress)
    with guard.watch("a save", pace=Pace.SLOW):
        paces.append(guard.pace)
    assert paces == [Pace.SLOW, Pace.NORMAL, Pace.SLOW] and guard.pace is Pace.NORMAL
    assert seen == sorted(set(seen)) and guard.progress > seen[-1]
