"""From a configuration to a training engine: the process group, the partitioned model with its weights, the DeepSpeed
engine.

The order matters under ZeRO-3 and is spelt out in `build_engine`: construct partitioned, load weights group by group
from rank 0, set what is trainable, only then initialise the engine (docs/zero3.md, rule 3).
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from jp_train.config import BatchPlan, RunConfig
from jp_train.config.deepspeed import deepspeed_config
from jp_train.engine.config import check_values
from jp_train.engine.cpu_operator import skip_shared_memory_operator
from jp_train.engine.device import be_deterministic, rank_device
from jp_train.engine.optim import ParameterGroups, parameter_groups
from jp_train.engine.watch.guard import SequenceGuard
from jp_train.errors import LaunchError
from jp_train.model import freeze, pretrained
from jp_train.model.janus_pro import JanusPro
from jp_train.model.vq import VQTokenizer

LEAVE_S = 60.0
"""Seconds that closing the process group may take."""


@dataclass(frozen=True)
class Ranks:
    """This process among the data-parallel ranks, as plain numbers, and its device."""

    dp_rank: int
    dp_world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that writes the run folder."""
        return self.dp_rank == 0


def init_process_group(cfg: RunConfig) -> Ranks:
    """Join the process group that the environment describes (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT:
    the deepspeed launcher sets them); without them this is one rank of one. A collective that waits longer than
    `engine.collective_timeout_s` fails.

    Raises ConfigError when there are more local ranks than devices, LaunchError for GPUs that torch cannot use, and
    when the other ranks do not come.
    """
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if cfg.engine.deterministic:
        be_deterministic()
    device = rank_device(local_rank)
    import deepspeed

    quiet_deepspeed()
    skip_shared_memory_operator()
    timeout, began = timedelta(seconds=cfg.engine.collective_timeout_s), time.monotonic()
    try:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except torch.distributed.DistError as error:
        raise LaunchError(not_met(str(error), time.monotonic() - began)) from error
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), local_rank, device)


def not_met(error: str, seconds: float) -> str:
    """Why this rank's process group was not made, after `seconds`; `error` is torch's."""
    rank, address, port = (os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in error:
        return (
            f"port {port} of {socket.gethostname()} is in use by another process, perhaps since a moment ago: the "
            "ranks cannot meet there. Start again, or give another port with --master-port"
        )
    return (
        f"rank {rank} did not meet the other ranks at {address}:{port} in {seconds:.0f} s "
        f"(engine.collective_timeout_s is their limit): {error}. A rank did not start or ended first: its own output "
        "is the cause"
    )


def leave_process_group(exit_code: int = 0, *, within_s: float = LEAVE_S) -> None:
    """Close the process group, so that interpreter shutdown has no open connections to trip over.

    Everything is saved by then, and no watchdog looks any more: where the network or the driver does not let go within
    `within_s` seconds, that is printed and the process ends with `exit_code`.
    """
    if not torch.distributed.is_initialized():
        return

    def end() -> None:
        print(
            f"rank {os.environ.get('RANK', '0')}: the process group does not close within {within_s:g} s; ending "
            "without it (everything is saved)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(exit_code)

    timer = threading.Timer(within_s, end)
    timer.daemon = True
    timer.start()
    torch.distributed.destroy_process_group()
    timer.cancel()


def quiet_deepspeed() -> None:
    """DeepSpeed logs its whole configuration at INFO, and torch warns about names that DeepSpeed 0.19 still calls;
    other warnings stay."""
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", category=FutureWarning, message=r".*(all_gather_into_tensor|reduce_scatter_tensor).*"
    )


def gather_objects(ranks: Ranks, value: Any) -> list[Any]:
    """Every rank's value, by rank. Collective, and pickles: only for rare events."""
    values: list[Any] = [value] * ranks.dp_world_size
    if ranks.dp_world_size > 1:
        torch.distributed.all_gather_object(values, value)
    return values


@dataclass(frozen=True)
class Engine:
    """What the loop trains with. `deepspeed` is the DeepSpeedEngine around `model`; `vq` encodes images and is
    never trained."""

    deepspeed: Any
    model: JanusPro
    vq: VQTokenizer
    groups: ParameterGroups
    guard: SequenceGuard
    freeze_report: freeze.FreezeReport
    weights: str
    """One line: where the weights came from."""


def build_engine(cfg: RunConfig, plan: BatchPlan, ranks: Ranks, *, n_sources: int, image_token_id: int) -> Engine:
    """The engine at step 0: partitioned model with the stage's input weights, frozen as `stage.trainable` says.
    Collective.

    No rank ever holds the whole model: modules are partitioned as they are constructed, and rank 0 fills them a group
    of tensors at a time. Raises ConfigError (weights that do not fit, unknown module names, values that DeepSpeed
    rejects).
    """
    import deepspeed

    ds_config = deepspeed_config(cfg, plan)
    if cfg.engine.deepspeed:
        check_values(ds_config)
    # the VQ tokenizer stays outside zero.Init: it is replicated (72M parameters), and ZeRO would have to gather it for
    # every image
    vq = VQTokenizer(cfg.model.vq, cfg.model.vision.image_size)
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = JanusPro(cfg.model, cfg.loss, n_sources, cfg.engine.recomputed, image_token_id)
    weights = pretrained.prepare_weights(
        model,
        vq,
        cfg.model,
        trainable=cfg.stage.trainable,
        seed=cfg.seed,
        gather=gather_for_writing,
        is_writer=ranks.is_main,
    )
    vq.to(ranks.device)
    # before initialize: frozen parameters get no master copy and no moments
    report = freeze.set_trainable(model, cfg.stage.trainable)
    if ranks.device.type == "cuda" and ds_config["optimizer"]["params"].get("torch_adam"):
        ds_config["optimizer"]["params"]["fused"] = True  # one kernel and no copy of the slices
    groups = parameter_groups(model.named_parameters(), cfg.optimizer, freeze.module_of)
    # before DeepSpeed's own hooks, so that it knows the module whose gather is waited for
    guard = SequenceGuard(model, ranks.dp_rank)
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=groups.groups, config=ds_config, dist_init_required=False
    )
    return Engine(
        deepspeed=engine, model=model, vq=vq, groups=groups, guard=guard, freeze_report=report, weights=weights
    )


def gather_for_writing(parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """The whole of these parameters on every rank inside the block; what rank 0 wrote is on all ranks afterwards.
    Collective."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def gather_for_reading(parameters: Sequence[torch.nn.Parameter]) -> AbstractContextManager[None]:
    """The whole of these parameters on every rank inside the block, not to be changed. Collective."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
