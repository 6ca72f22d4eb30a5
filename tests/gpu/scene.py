"""What the checks share: a size, a device and its process group, configurations, and the trainer of one engine.

Tiny models stand for the large ones on a CPU. `large` is the true 1B of a launch file with fresh weights and `small` a
model of 10M parameters, both on synthetic packed rows (bench/forecast.py): nothing is read, nothing downloaded.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from bench.forecast import configuration, contents, synthetic_batch
from jp_train.config import RunConfig, batch_plan, load_config
from jp_train.config.choices import BatchUnit, Init, SourceKind
from jp_train.config.schema import SourceConfig
from jp_train.engine.device import be_deterministic, uses_gpu
from jp_train.engine.init import Ranks, build_engine, init_process_group
from jp_train.engine.objective import count_supervised
from jp_train.engine.state import TrainState
from jp_train.engine.watch.stop import SignalFlag
from jp_train.model import pretrained
from jp_train.model.flops import BatchStatistics
from jp_train.run.log import RunLog
from jp_train.tools.forecast.candidates import Candidate, Cluster, evaluate_rows
from jp_train.tools.forecast.hardware import GIB, Hardware, hardware
from jp_train.tools.forecast.shapes import shapes_of
from jp_train.train.preparation import Parts
from jp_train.train.trainer import StepResult, Trainer
from jp_train.types import PackedBatch

ROOT = Path(__file__).resolve().parents[2]
MICRO_BATCHES = 2
IMAGE_TOKEN = 5
PRESETS = {"H200": "h200", "H100": "h100", "A100": "a100-80gb"}
"""{part of the GPU's name: preset of the forecast}."""


@dataclass
class Scene:
    """`size`: tiny or 1b; `folder`: for run folders, empty."""

    size: str
    folder: Path
    _opened: int = field(default=0, init=False)
    _trainer: Trainer | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", 0) if uses_gpu() else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What the device trains in."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @cached_property
    def ranks(self) -> Ranks:
        """This process as one rank of one."""
        ranks = init_process_group(self.small(2))
        gc.freeze()  # what is imported by now stays; to look through it takes 0.2 s an engine
        return ranks

    def small(self, stage: int, precision: str | None = None) -> RunConfig:
        """Fresh weights by the rule of training, the same on every device."""
        precision = precision or ("bf16" if self.on_gpu else "fp32")
        size = "tiny" if self.size == "tiny" else "10M"
        cfg = configuration(size, stage=stage, rows=1, world=1, precision=precision)
        cfg.data.seq_len = 256 if self.size == "tiny" else cfg.data.seq_len
        return self._prepared(cfg)

    def large(self, stage: int) -> RunConfig:
        """The launch file's micro-batch and checkpointing, on one rank."""
        if self.size == "tiny":
            return self.small(stage)
        cfg = load_config(ROOT / "launch" / f"janus_pro_1b_stage{stage}.yaml")
        cfg.model.init_from, cfg.model.init = None, Init.random
        cfg.engine.hpz_partition_size = 1
        return self._prepared(cfg)

    def _prepared(self, cfg: RunConfig) -> RunConfig:
        self._opened += 1
        cfg.run_dir = str(self.folder / f"run_{self._opened}")
        cfg.data.sources = {"synthetic": SourceConfig(kind=SourceKind.text, shards="none.tar")}
        cfg.validation.sources = {}
        cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, MICRO_BATCHES * cfg.engine.micro_batch_rows
        cfg.optimizer.lr, cfg.optimizer.warmup_steps = 1e-3 if self.size == "tiny" else 1e-4, 0
        return cfg

    @property
    def hardware(self) -> Hardware:
        """The forecast's figures of this GPU; of an A100 where there is none."""
        if not self.on_gpu:
            return hardware("a100-80gb")
        name, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1] / GIB
        preset = next((preset for part, preset in PRESETS.items() if part in name), "a100-80gb")
        return hardware(preset, [f"memory_gib={memory:.2f}"])

    def forecast(self, cfg: RunConfig, batches: Sequence[PackedBatch]) -> Candidate:
        """Of a step of these micro-batches."""
        step = sum((BatchStatistics.of(batch) for batch in batches[1:]), BatchStatistics.of(batches[0]))
        one = Cluster(world=1, nodes=1)
        return evaluate_rows(cfg, one, self.hardware, shapes_of(cfg), largest=contents(batches[0]), step=step)

    def trainer(self, cfg: RunConfig) -> Trainer:
        """A fresh engine in its trainer; the one before is released, as two of the large ones have no room.
        `train_step` reads no tokenizer, loader, saver or held-out rows, and there are none."""
        ranks = self.ranks
        self.release()
        # 2 billion numbers of the CPU's generator take a minute; the large model's values do not matter
        with patch.object(pretrained, "_fresh", self._fresh) if self._is_large(cfg) else nullcontext():
            engine = build_engine(cfg, batch_plan(cfg, 1), ranks, n_sources=1, image_token_id=IMAGE_TOKEN)
        log = RunLog(cfg, active=True, dp_world_size=1)
        none: Any = None
        parts = Parts(
            cfg=cfg, ranks=ranks, log=log, flag=SignalFlag(), tokenizer=none, engine=engine, loader=none,
            held_out=none, saver=none, ledger=none, about={}, state=TrainState.restored(cfg, None), plan_state={},
        )  # fmt: skip
        self._trainer = Trainer(parts, [])
        return self._trainer

    def release(self) -> None:
        """Give the memory of the engine back. DeepSpeed 0.19.8 keeps one alive for ever by its hooks, also one that was
        destroyed, so its tensors lose their storage."""
        if self._trainer is not None:
            engine, optimizer = self._trainer.engine, self._trainer.engine.deepspeed.optimizer
            engine.deepspeed.destroy()
            parameters = list(engine.model.parameters())
            held = [parameters, [(p.ds_tensor, p.grad) for p in parameters], list(engine.vq.parameters())]
            held += [list(vars(optimizer).values()), list(optimizer.optimizer.state.values())]
            for tensor in tree_leaves(held):
                if isinstance(tensor, torch.Tensor):
                    tensor.untyped_storage().resize_(0)
            self._trainer = None
        gc.collect()
        forget_peaks()

    def _is_large(self, cfg: RunConfig) -> bool:
        return self.size != "tiny" and cfg.model.language.hidden_size >= 2048

    def _fresh(self, name: str, shape: Sequence[int], std: float, _seed: int) -> torch.Tensor:
        if len(shape) == 1:
            return torch.full(tuple(shape), 0.0 if name.endswith(".bias") else 1.0, device=self.device)
        return torch.randn(tuple(shape), device=self.device) * std


def rows_of(cfg: RunConfig) -> list[PackedBatch]:
    """The micro-batches of a step: full rows of the kinds that the stage trains on."""
    kinds = "ugt" if cfg.stage.mixture.text else "ug"
    return [synthetic_batch(cfg, cfg.engine.micro_batch_rows, documents=kinds) for _ in range(MICRO_BATCHES)]


def step(trainer: Trainer, batches: Sequence[PackedBatch]) -> StepResult:
    """One real `train_step`."""
    totals = count_supervised(batches)
    trainer.engine.guard.begin_step(trainer.state.step + 1)
    result = trainer.train_step(batches, totals, began=time.perf_counter(), data_wait_s=0.0)
    trainer.state.step += 1
    return result


def forget_peaks() -> None:
    """Give what torch only keeps back to the device; peaks of memory are from here on."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def deterministic() -> Iterator[None]:
    """As with `engine.deterministic`, for the block; `check.py` sets what cuBLAS reads when it starts."""
    be_deterministic()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def without_rank() -> dict[str, str]:
    """The environment for a process that is a rank of a group of its own."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUBLAS_WORKSPACE_CONFIG")
    return {name: value for name, value in os.environ.items() if name not in ours}
