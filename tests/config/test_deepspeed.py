"""The DeepSpeed JSON, generated and given: one owner per value, and no raw key without effect.

tests/engine/test_config.py compares the tables with the installed DeepSpeed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jp_train.config import RunConfig, batch_plan, dump_config, load_config
from jp_train.config.deepspeed import EFFECTIVE, OWNED, UNUSED, check_raw_keys, deepspeed_config, with_file
from jp_train.config.schema import BatchUnit, Precision, Schedule
from jp_train.errors import ConfigError

HF = json.loads((Path(__file__).parent / "transformers_zero3.json").read_text())
"""As people have it for transformers' Trainer with ZeRO-3 (without its offloading)."""


def run(**deepspeed) -> RunConfig:
    cfg = RunConfig()
    cfg.stage.batch_unit, cfg.stage.batch_size, cfg.engine.micro_batch_rows = BatchUnit.packed, 512, 2
    cfg.engine.deepspeed = deepspeed
    return cfg


def test_batch_clip_dtype_and_optimizer_come_from_the_run_config():
    cfg = run()
    cfg.optimizer.clip, cfg.optimizer.lr, cfg.engine.hpz_partition_size = 0.5, 4e-5, 8
    found = deepspeed_config(cfg, batch_plan(cfg, 32))
    sizes = [
        found[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    assert sizes == [512, 2, 8] and sizes[0] == sizes[1] * sizes[2] * 32
    assert found["gradient_clipping"] == 0.5 and found["bf16"] == {"enabled": True}
    params = found["optimizer"]["params"]
    assert (
        found["optimizer"]["type"] == "AdamW"
        and params["torch_adam"]
        and params["betas"] == [0.9, 0.95]
        and params["lr"] == 4e-5
    )
    zero = found["zero_optimization"]
    assert (
        zero["stage"] == 3
        and zero["stage3_param_persistence_threshold"] == 100_000
        and zero["zero_hpz_partition_size"] == 8
    )


def test_gradients_travel_and_accumulate_in_fp32():
    cfg = run()
    found = deepspeed_config(cfg, batch_plan(cfg, 1))
    assert found["communication_data_type"] == "fp32" and found["data_types"] == {"grad_accum_dtype": "fp32"}


def test_fp32_precision_switches_bf16_off():
    cfg = run()
    cfg.precision = Precision.fp32
    assert deepspeed_config(cfg, batch_plan(cfg, 1))["bf16"] == {"enabled": False}


def test_raw_keys_are_merged_last_and_inside_sections():
    cfg = run(zero_optimization={"reduce_bucket_size": 7, "overlap_comm": False}, comms_logger={"enabled": True})
    found = deepspeed_config(cfg, batch_plan(cfg, 1))
    assert found["zero_optimization"]["reduce_bucket_size"] == 7 and found["zero_optimization"]["overlap_comm"] is False
    assert found["zero_optimization"]["stage"] == 3 and found["comms_logger"] == {"enabled": True}


def test_raw_keys_do_not_share_their_sections_with_the_configuration():
    cfg = run(comms_logger={"prof_ops": ["all_reduce"]})
    deepspeed_config(cfg, batch_plan(cfg, 1))["comms_logger"]["prof_ops"].append("broadcast")
    assert cfg.engine.deepspeed == {"comms_logger": {"prof_ops": ["all_reduce"]}}


def test_an_optimizer_on_the_cpu_runs_fused_and_one_on_the_gpu_as_before():
    offload = {"offload_optimizer": {"device": "cpu"}}
    for raw, fused in (({}, False), (offload, True), ({"offload_optimizer": {"device": "none"}}, False)):
        cfg = run(zero_optimization=raw)
        found = deepspeed_config(cfg, batch_plan(cfg, 1))
        assert found["optimizer"]["params"].get("fused", False) is fused


# -- raw keys --------------------------------------------------------------------------------------


def nested(path: str, value: object = 1) -> dict:
    for part in reversed(path.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def fault(**raw) -> str:
    with pytest.raises(ConfigError) as error:
        check_raw_keys(raw)
    return str(error.value)


@pytest.mark.parametrize("key", OWNED)
def test_a_key_that_jp_train_owns_is_refused_with_what_to_change(key):
    found = fault(**nested(key))
    assert found == f"engine.deepspeed.{key} is set by jp_train, leave it out: {OWNED[key]}"


@pytest.mark.parametrize("key", UNUSED)
def test_a_key_without_effect_is_refused_with_what_to_use_instead(key):
    assert fault(**nested(key)) == f"engine.deepspeed.{key} is not used here: {UNUSED[key]}"
    assert fault(**nested(key + ".anything")) == f"engine.deepspeed.{key} is not used here: {UNUSED[key]}"


@pytest.mark.parametrize("key", EFFECTIVE)
def test_a_key_that_deepspeed_reads_is_passed_on(key):
    check_raw_keys(nested(key))
    if ".stage3_" in key:
        check_raw_keys(nested(key.replace(".stage3_", ".")))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"foo_bar": 1}, "engine.deepspeed.foo_bar is unknown to DeepSpeed 0.19.8"),
        (
            {"zero_optimization": {"offload_optimiser": {"device": "cpu"}}},
            "engine.deepspeed.zero_optimization.offload_optimiser is unknown to DeepSpeed 0.19.8; did you mean "
            "'zero_optimization.offload_optimizer'?",
        ),
        (
            {"zero_optimisation": {"reduce_bucket_size": 7}},
            "engine.deepspeed.zero_optimisation is unknown to DeepSpeed 0.19.8; did you mean 'zero_optimization'?",
        ),
        (
            {"zero_optimization": {"offload_param": {"device": "nvme"}}},
            "engine.deepspeed.zero_optimization.offload_param.device: checkpoints cannot read slices on NVMe; "
            "offload to cpu",
        ),
        (
            {"zero_optimization": {"offload_optimizer": "cpu"}},
            'engine.deepspeed.zero_optimization.offload_optimizer must be a section of keys, found "cpu"',
        ),
        ({"zero_optimization": False}, "engine.deepspeed.zero_optimization must be a section of keys, found false"),
        (
            {"zero_optimization.reduce_bucket_size": 7},
            'engine.deepspeed."zero_optimization.reduce_bucket_size" is unknown to DeepSpeed 0.19.8; did you mean '
            "'zero_optimization.reduce_bucket_size'?",
        ),
        (
            {"zero_optimization": {"param_persistence_threshold": 7}},
            "engine.deepspeed.zero_optimization.stage3_param_persistence_threshold is set by jp_train, leave it out: "
            "change engine.persistence_threshold",
        ),
        (
            {"optimizer": {"params": {"lr": 1.0, "eps": 1.0}}, "wandb": {"enabled": False}},
            "engine.deepspeed.optimizer is set by jp_train, leave it out: change the section optimizer (AdamW); "
            "engine.deepspeed.wandb is not used here: set logging.wandb",
        ),
    ],
)
def test_a_wrong_raw_key_is_named_with_the_right_one(raw, message):
    assert fault(**raw) == message


def test_wrong_raw_keys_are_refused_when_the_configuration_is_read(tmp_path):
    (tmp_path / "run.yaml").write_text("preset: tiny/stage1\nengine: {deepspeed: {elasticity: {enabled: true}}}\n")
    with pytest.raises(ConfigError, match=r"engine\.deepspeed\.elasticity is not used here: DeepSpeed 0.19 removed it"):
        load_config(tmp_path / "run.yaml")


# -- a DeepSpeed user's file -----------------------------------------------------------------------


def written(tmp_path: Path, content: object) -> Path:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_a_file_for_transformers_trainer_is_taken_as_it_is(tmp_path):
    found = with_file(run(), written(tmp_path, HF))
    assert found == {
        "steps_per_print": 2000,
        "wall_clock_breakdown": False,
        "zero_optimization": {
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
        },
    }
    check_raw_keys(found)


def test_owned_keys_of_a_file_may_say_what_the_run_does(tmp_path):
    cfg = run()
    ours = deepspeed_config(cfg, batch_plan(cfg, 4))
    del ours["gradient_accumulation_steps"]  # it depends on the number of ranks
    ours["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = cfg.checkpoint.export_at_end
    ours |= {"fp16": {"enabled": False, "loss_scale": 0}, "amp": {"enabled": False}, "prescale_gradients": False}
    assert set(with_file(cfg, written(tmp_path, ours))) == {
        "zero_optimization",
        "steps_per_print",
        "timers",
        "wall_clock_breakdown",
    }


def test_unused_keys_of_a_file_may_be_switched_off(tmp_path):
    off = {
        "flops_profiler": {"enabled": False, "profile_step": 1},
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
        "zero_allow_untested_optimizer": False,
    }
    assert with_file(run(), written(tmp_path, off)) == {}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"train_batch_size": 64}, "train_batch_size: 64 in the file, 512 in this run: change stage.batch_size"),
        (
            {"gradient_accumulation_steps": 8},
            "gradient_accumulation_steps: 8 in the file, nothing in this run: it follows from stage.batch_size, "
            "engine.micro_batch_rows and the number of ranks",
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": 0}},
            "there: fp16.enabled: true in the file, false in this run: change precision (bf16 or fp32)",
        ),
        (
            {"zero_optimization": {"param_persistence_threshold": 5}},
            "param_persistence_threshold: 5 in the file, 100000 in this run: change engine.persistence_threshold",
        ),
        ({"bf16": {"enabled": False}}, "bf16.enabled: false in the file, true in this run: change precision"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.999]}}},
            "optimizer.params.lr: 0.0001 in the file, 0.001 in this run: change the section optimizer (AdamW); "
            "optimizer.params.betas: [0.9, 0.999] in the file, [0.9, 0.95] in this run: change the section optimizer",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}}},
            "scheduler.params.warmup_num_steps: 100 in the file, nothing in this run: change optimizer.schedule",
        ),
        (
            {"zero_optimization": {"stage": 2}},
            "zero_optimization.stage: 2 in the file, 3 in this run: jp_train is built",
        ),
        ({"tensorboard": {"enabled": True}}, "tensorboard is not used here: set logging.tensorboard"),
        ({"zero_optimization": {"offload_parm": {}}}, "did you mean 'zero_optimization.offload_param'?"),
        ({"aio": {"block_size": 1}, "foo_bar": 1}, "foo_bar is unknown to DeepSpeed"),
        ('{"train_batch_size": 1, "train_batch_size": 2}', "train_batch_size is there twice"),
        ('{"zero_optimization": {"stage": 3},}', "is not a readable JSON file"),
        ("[]", "expected a JSON object, found []"),
    ],
)
def test_what_a_file_says_otherwise_is_listed_with_both_values(theirs, message, tmp_path):
    file = written(tmp_path, theirs)
    with pytest.raises(ConfigError) as error:
        with_file(run(), file)
    assert str(file) in str(error.value) and "engine.deepspeed_config" in str(error.value)
    assert message in str(error.value)


def test_a_cosine_schedule_agrees_with_deepspeeds_name_for_it(tmp_path):
    file = written(tmp_path, {"scheduler": {"type": "WarmupCosineLR"}})
    cfg = run()
    cfg.optimizer.schedule = Schedule.cosine
    assert with_file(cfg, file) == {}
    cfg.optimizer.schedule = Schedule.constant
    with pytest.raises(ConfigError, match='scheduler.type: "WarmupCosineLR" in the file, "WarmupLR" in this run'):
        with_file(cfg, file)


def test_the_resolved_configuration_holds_the_file_and_its_own_raw_keys_win(tmp_path, monkeypatch):
    """So a resume compares what the file said, and a run folder's config.yaml needs no other file."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "run.yaml").write_text(
        "preset: tiny/stage1\nengine:\n  deepspeed_config: ds.json\n"
        "  deepspeed: {zero_optimization: {sub_group_size: 5}}\n"
    )
    written(tmp_path / "conf", {"zero_optimization": {"sub_group_size": 7, "reduce_bucket_size": 9}})
    monkeypatch.chdir(tmp_path)
    cfg = load_config("conf/run.yaml")  # the path is looked for beside the YAML too, as a recipe's
    assert cfg.engine.deepspeed == {"zero_optimization": {"sub_group_size": 5, "reduce_bucket_size": 9}}
    assert cfg.engine.deepspeed_config is None
    (tmp_path / "again.yaml").write_text(dump_config(cfg))
    assert load_config("again.yaml", ["preset=null"]).engine == cfg.engine
    with pytest.raises(ConfigError, match=r"engine\.deepspeed_config 'other\.json' is neither a file here"):
        load_config("conf/run.yaml", ["engine.deepspeed_config=other.json"])
