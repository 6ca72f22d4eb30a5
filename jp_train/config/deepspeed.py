"""The DeepSpeed JSON, generated: every value in it has one owner, the run's configuration.

Three settings are there for exactness and were measured (docs/zero3.md, rule 4): gradients travel and accumulate in
fp32 (`communication_data_type` and `data_types.grad_accum_dtype` together bring the error of a bf16 accumulation of 16
micro-batches from 3.5e-3 to 2e-11), and the optimizer is torch's own AdamW on fp32 master weights.

Raw keys, from `engine.deepspeed` or from a DeepSpeed user's file (`engine.deepspeed_config`), are taken where DeepSpeed
0.19.8 reads them under this engine: EFFECTIVE. The others that it knows stand in OWNED or UNUSED with what to use
instead, and are refused: DeepSpeed itself ignores most of them without a word. tests/engine/test_config.py compares
the three tables with the installed package.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jp_train.config.batch import BatchPlan, rows_per_step
from jp_train.config.choices import Precision, Schedule
from jp_train.config.schema import RunConfig
from jp_train.errors import ConfigError, did_you_mean

OWNED = {
    "train_batch_size": "change stage.batch_size",
    "train_micro_batch_size_per_gpu": "change engine.micro_batch_rows",
    "gradient_accumulation_steps": "it follows from stage.batch_size, engine.micro_batch_rows and the number of ranks",
    "managed_gradient_accumulation": "jp_train counts the micro-batches of a step",
    "gradient_clipping": "change optimizer.clip",
    "prescale_gradients": "jp_train scales the loss (sum / global tokens x ranks)",
    "gradient_predivide_factor": "jp_train scales the loss (sum / global tokens x ranks)",
    "gradient_allreduce_op": "jp_train scales the loss (sum / global tokens x ranks)",
    "communication_data_type": "gradients travel in fp32: bf16 sums lose 3.5e-3 of a gradient",
    "data_types": "gradients accumulate in fp32, and the rest follows precision",
    "bf16": "change precision",
    "bfloat16": "change precision",
    "fp16": "change precision (bf16 or fp32)",
    "amp": "change precision",
    "torch_autocast": "change precision",
    "optimizer": "change the section optimizer (AdamW)",
    "scheduler": "change optimizer.schedule and optimizer.warmup_steps",
    "zero_optimization.stage": "jp_train is built for ZeRO-3 (docs/zero3.md, section 13)",
    "zero_optimization.stage3_param_persistence_threshold": "change engine.persistence_threshold",
    "zero_optimization.zero_hpz_partition_size": "change engine.hpz_partition_size",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "change checkpoint.export_at_end",
    "zero_optimization.leaf_module": "each layer of the towers is gathered as a whole",
}
"""DeepSpeed keys that jp_train sets, and what to do instead. `engine.deepspeed` may not name them; in a DeepSpeed
user's file they have to agree."""

_REMOVED = "DeepSpeed 0.19 removed it"
_NVME = "it serves NVMe offload, whose slices checkpoints cannot read; offload to cpu (offload_optimizer.device)"
_STAGE2 = "ZeRO-3 does not read it"
_CHECKPOINTS = "jp_train writes and reads its own checkpoints (section checkpoint)"
_LOADER = "jp_train has its own data loader (section data)"
_PARALLEL = "jp_train is data-parallel (ZeRO-3)"
LEAF_MODULES = (
    "transformers.models.janus.modeling_janus.JanusVisionEncoderLayer",
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer",
)
"""Modules that ZeRO-3 gathers as a whole: one fetch a layer instead of one for each of its 12 to 16 modules, which
halves the Python of a micro-batch (bench/host.py) and changes no number beyond the order of sums (docs/zero3.md)."""
UNUSED = {
    "activation_checkpointing": "set engine.activation_checkpointing",
    "aio": _NVME,
    "autotuning": "`jp-train forecast` compares the settings",
    "checkpoint": _CHECKPOINTS,
    "comet": "metrics go to metrics.jsonl and to the sinks of the section logging",
    "compile": "the engine is not compiled",
    "compression_training": _REMOVED,
    "csv_monitor": "metrics.jsonl in the run folder has every step",
    "curriculum_learning": f"{_REMOVED}; data.sources.NAME.from_step and to_step order sources",
    "data_efficiency": _LOADER,
    "dataloader_drop_last": _LOADER,
    "datastates_ckpt": _CHECKPOINTS,
    "disable_allgather": "DeepSpeed does not read it",
    "eigenvalue": _REMOVED,
    "elasticity": f"{_REMOVED}; a run goes on with any number of ranks that divides its rows",
    "expert_parallel": _PARALLEL,
    "flops_profiler": "it counts a partitioned parameter as 0; see perf/mfu in metrics.jsonl, and `jp-train forecast`",
    "graph_harvesting": _REMOVED,
    "hybrid_engine": "it serves generation in RLHF",
    "nebula": f"{_REMOVED}; {_CHECKPOINTS}",
    "pipeline": _PARALLEL,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "seq_parallel_communication_data_type": _PARALLEL,
    "sparse_attention": f"{_REMOVED}; data.packing sets who attends to whom",
    "sparse_gradients": _REMOVED,
    "tensor_parallel": _PARALLEL,
    "tensorboard": "set logging.tensorboard",
    "use_data_before_expert_parallelism": _PARALLEL,
    "vocabulary_size": "set model.language.vocab_size",
    "wandb": "set logging.wandb",
    "weight_quantization": "it serves inference",
    "zero_allow_untested_optimizer": "the optimizer is AdamW, which DeepSpeed has tested",
    "zero_force_ds_cpu_optimizer": "offload_optimizer runs torch's fused AdamW: as fast, and nothing to compile",
    "zero_optimization.allgather_bucket_size": _STAGE2,
    "zero_optimization.allgather_partitions": _STAGE2,
    "zero_optimization.compute_grad_norm": _STAGE2,
    "zero_optimization.cpu_offload": "write offload_optimizer: {device: cpu}",
    "zero_optimization.cpu_offload_param": "write offload_param: {device: cpu}",
    "zero_optimization.cpu_offload_use_pin_memory": "write offload_optimizer: {device: cpu, pin_memory: ...}",
    "zero_optimization.elastic_checkpoint": _CHECKPOINTS,
    "zero_optimization.ignore_unused_parameters": _STAGE2,
    "zero_optimization.legacy_stage1": _STAGE2,
    "zero_optimization.load_from_fp32_weights": _CHECKPOINTS,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.mics_shard_size": f"{_REMOVED}; engine.hpz_partition_size keeps gathers inside a node",
    "zero_optimization.offload_optimizer.buffer_count": _NVME,
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": "it belongs to super_offload",
    "zero_optimization.offload_optimizer.fast_init": _NVME,
    "zero_optimization.offload_optimizer.nvme_path": _NVME,
    "zero_optimization.offload_optimizer.pipeline_read": _NVME,
    "zero_optimization.offload_optimizer.pipeline_write": _NVME,
    "zero_optimization.offload_optimizer.ratio": "the optimizer is offloaded as a whole",
    "zero_optimization.offload_optimizer.super_offload": "checkpoints cannot read it",
    "zero_optimization.offload_param.buffer_count": _NVME,
    "zero_optimization.offload_param.buffer_size": _NVME,
    "zero_optimization.offload_param.max_in_cpu": _NVME,
    "zero_optimization.offload_param.nvme_path": _NVME,
    "zero_optimization.parameter_alignment": _STAGE2,
    "zero_optimization.pipeline_loading_checkpoint": _CHECKPOINTS,
    "zero_optimization.round_robin_gradients": _STAGE2,
    "zero_optimization.save_muon_momentum_buffer_in_memory": "the optimizer is AdamW",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "set checkpoint.export_at_end",
    "zero_optimization.stage3_module_granularity_threshold": "each layer of the towers is gathered as a whole",
    "zero_optimization.use_multi_rank_bucket_allreduce": _STAGE2,
    "zero_optimization.zenflow": "checkpoints cannot read it; write offload_optimizer: {device: cpu}",
    "zero_optimization.zeropp_loco_param": _REMOVED,
}
"""DeepSpeed keys without effect here, and why, or what to use instead."""

EFFECTIVE = (
    "comms_logger.debug",
    "comms_logger.enabled",
    "comms_logger.prof_all",
    "comms_logger.prof_ops",
    "comms_logger.verbose",
    "disable_python_gc",
    "dump_state",
    "log_level",
    "memory_breakdown",
    "steps_per_print",
    "timers.throughput.enabled",
    "timers.throughput.synchronized",
    "wall_clock_breakdown",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.enable_sanity_checks",
    "zero_optimization.log_trace_cache_warnings",
    "zero_optimization.memory_efficient_linear",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.overlap_comm",
    "zero_optimization.override_module_apply",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.stage3_allgather_sequential",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_use_all_reduce_for_fetch_params",
    "zero_optimization.sub_group_size",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_weights",
)
"""DeepSpeed keys that may be given raw. What `log_level: info` lets DeepSpeed print goes to each rank's output."""


def deepspeed_config(cfg: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """The dictionary given to `deepspeed.initialize` and `zero.Init` on every rank: `cfg.engine.deepspeed`, whose names
    `validate` has checked, merged last, key by key."""
    merged = _merged(_generated(cfg, plan.micro_batch_rows), cfg.engine.deepspeed)
    merged["gradient_accumulation_steps"] = plan.gradient_accumulation_steps
    if merged["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu":
        # 0.47 ns an element on one core, DeepSpeed's CPU Adam 0.43, torch's loop over operators 4.9 (docs/zero3.md)
        merged["optimizer"]["params"]["fused"] = True
    return merged


def check_raw_keys(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError naming every key of `engine.deepspeed` that is unknown, owned or without effect."""
    faults = []
    for path, value in _leaves(raw):
        known = _known(path)
        if known in OWNED:
            faults.append(f"engine.deepspeed.{known} is set by jp_train, leave it out: {OWNED[known]}")
        elif fault := _fault(path, value):
            faults.append(f"engine.deepspeed.{fault}")
    if faults:
        raise ConfigError("; ".join(dict.fromkeys(faults)))


def with_file(cfg: RunConfig, file: Path) -> dict[str, Any]:
    """`cfg.engine.deepspeed` merged over a DeepSpeed user's JSON file, as it was written for DeepSpeed or for
    transformers' Trainer.

    A key that is "auto" is left to jp_train or to DeepSpeed's default. One that jp_train owns must have the value of
    this run; one without effect here must be off. Raises ConfigError that lists each that differs.
    """
    theirs, ours = _read_json(file), dict(_leaves(_compared(cfg)))
    kept: dict[str, Any] = {}
    faults = []
    for path, value in _leaves(theirs):
        known = _known(path)
        if known in OWNED:
            if value != "auto" and not _agrees(path, value, theirs, ours):
                mine = _shown(ours.get(_canonical(path)))
                faults.append(f"{path}: {_shown(value)} in the file, {mine} in this run: {OWNED[known]}")
        elif known in UNUSED and _is_off(theirs, known):
            continue
        elif fault := _fault(path, value):
            faults.append(fault)
        elif value != "auto":
            kept = _merged(kept, _nested(path, value))
    if faults:
        raise ConfigError(
            f'{file} (engine.deepspeed_config) does not fit this run; change the run, or write "auto" or leave the key '
            f"out there: {'; '.join(dict.fromkeys(faults))}"
        )
    return _merged(kept, cfg.engine.deepspeed)


def _generated(cfg: RunConfig, micro_batch_rows: int) -> dict[str, Any]:
    """What jp_train sets, but for the accumulation, which depends on the number of ranks."""
    return {
        "train_batch_size": rows_per_step(cfg),
        "train_micro_batch_size_per_gpu": micro_batch_rows,
        "gradient_clipping": cfg.optimizer.clip,
        "bf16": {"enabled": cfg.precision is Precision.bf16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": cfg.optimizer.lr,
                "betas": [cfg.optimizer.beta1, cfg.optimizer.beta2],
                "eps": cfg.optimizer.eps,
                "weight_decay": cfg.optimizer.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_optimization": {
            "stage": 3,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            "overlap_comm": True,
            "stage3_param_persistence_threshold": cfg.engine.persistence_threshold,
            "stage3_gather_16bit_weights_on_model_save": False,
            "zero_hpz_partition_size": cfg.engine.hpz_partition_size,
            "leaf_module": {"classes": list(LEAF_MODULES)},
        },
        "steps_per_print": 2**31,  # jp_train prints; DeepSpeed's own progress line is off
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a micro-batch
    }


def _compared(cfg: RunConfig) -> dict[str, Any]:
    """What an owned key of a DeepSpeed user's file has to say: what is generated, and what jp_train does itself."""
    constant = cfg.optimizer.schedule is Schedule.constant
    own = {
        **{section: {"enabled": False} for section in _OFF},
        "bfloat16": {"enabled": cfg.precision is Precision.bf16},
        "managed_gradient_accumulation": True,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "scheduler": {"type": "WarmupLR" if constant else "WarmupCosineLR"},
        "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": cfg.checkpoint.export_at_end},
    }
    return _merged(_generated(cfg, cfg.engine.micro_batch_rows), own)


_OFF = ("fp16", "amp", "torch_autocast")
"""Sections for another precision than jp_train has."""


def _agrees(path: str, value: Any, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    section = path.partition(".")[0]
    if section in _OFF and isinstance(theirs[section], Mapping):
        # the section's other keys say nothing about a run in which it is off
        return not path.endswith(".enabled") or value is not True
    path = _canonical(path)
    return bool(path in ours and value == ours[path])


def _fault(path: str, value: Any) -> str | None:
    """What is wrong with a raw key that jp_train does not own, None where DeepSpeed reads it."""
    known = _known(path)
    if known in UNUSED:
        return f"{known} is not used here: {UNUSED[known]}"
    if known not in EFFECTIVE:
        if known == path:
            return None if value == {} else f"{path} must be a section of keys, found {_shown(value)}"
        unknown = path
        if '"' not in path:  # the section that is unknown, rather than what is in it
            unknown = ".".join(path.split(".")[: len(known.split(".")) + 1 if known else 1])
        return f"{unknown} is unknown to DeepSpeed 0.19.8{did_you_mean(unknown, sorted(_KNOWN))}"
    if path.endswith(".device") and value == "nvme":
        return f"{path}: checkpoints cannot read slices on NVMe; offload to cpu"
    return None


def _known(path: str) -> str:
    """The longest beginning of `path` that is a key or a section of the tables, by its `stage3_` name; empty for
    none."""
    parts = _canonical(path).split(".")
    for end in range(len(parts), 0, -1):
        if (beginning := ".".join(parts[:end])) in _KNOWN:
            return beginning
    return ""


def _canonical(path: str) -> str:
    """DeepSpeed takes some keys of ZeRO-3 with and without `stage3_`."""
    section, _, name = path.partition(".")
    prefixed = f"{section}.stage3_{name}"
    return prefixed if prefixed in OWNED or prefixed in EFFECTIVE else path


_KNOWN = frozenset(
    ".".join(parts[:end])
    for parts in (key.split(".") for key in (*OWNED, *UNUSED, *EFFECTIVE))
    for end in range(1, len(parts) + 1)
)


def _is_off(tree: Mapping[str, Any], path: str) -> bool:
    """Whether the key is false, null or "auto", or a section that is not enabled, or of which everything is off."""
    value: Any = tree
    for part in path.split("."):
        value = value.get(part)
    if isinstance(value, Mapping):
        return value.get("enabled") is False or all(_is_off(value, key) for key in value)
    return value is None or value is False or value == "auto"


def _read_json(file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))} is there twice")
        return dict(pairs)

    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} (engine.deepspeed_config) is not a readable JSON file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} (engine.deepspeed_config): expected a JSON object, found {_shown(content)}")
    return content


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of everything in the tree that is no section, or an empty one."""
    for key, value in tree.items():
        key = f'"{key}"' if "." in str(key) else key  # one key, not a path
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(path: str, value: Any) -> dict[str, Any]:
    key, _, rest = path.partition(".")
    return {key: _nested(rest, value) if rest else value}


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` on top, section by section. Shares nothing with either."""
    merged = copy.deepcopy(dict(base))
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = _merged(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)
