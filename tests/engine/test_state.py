"""What a checkpoint's state.json gives back."""

from __future__ import annotations

import json

from jp_train.config import RunConfig
from jp_train.engine.state import TrainState


def test_a_state_survives_the_way_through_json() -> None:
    cfg = RunConfig()
    cfg.stage.early_stop.patience = 2
    state = TrainState.restored(cfg, None)
    state.step, state.tokens, state.dumps = 7, 12_345, 1
    state.patience.observe(2.0), state.patience.observe(2.5)
    state.skips.observe(False, 6, cfg.guard)
    for step in range(20):
        state.statistics.judge(2.0 + step / 100, 1.0)
    again = TrainState.restored(cfg, json.loads(json.dumps(state.saved())))
    assert again.saved() == state.saved()
    assert again.statistics.judge(2.1, 1.0) == state.statistics.judge(2.1, 1.0)
    assert again.patience.observe(2.6) is True, "the second validation without a better loss"


def test_a_new_run_has_seen_nothing_and_an_older_checkpoint_may_lack_later_keys() -> None:
    cfg = RunConfig()
    new = TrainState.restored(cfg, None).saved()
    assert (new["step"], new["tokens"], new["dumps"]) == (0, 0, 0)
    older = {key: new[key] for key in ("step", "tokens", "patience", "skips")} | {"step": 3}
    assert TrainState.restored(cfg, older).saved() == new | {"step": 3}
