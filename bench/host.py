"""What the host does for a micro-batch while a GPU computes: Python, DeepSpeed's hooks, and its loops over ranks.

    python bench/host.py [--models 1b,7b] [--stages 1,2,3] [--rounds 3] [--json] [--save FILE]

The true depth and module tree with tiny widths, 24 tokens, bf16, one rank, one thread: what is left of the CPU time is
host work, and what plain PyTorch takes for the same is the floor. `plain`: the model alone; `every module`: ZeRO-3
gathers module by module, as DeepSpeed does by default; `layers`: as shipped (config/deepspeed.py, LEAF_MODULES). Each
in a process of its own, in turn; the best micro-batch of all rounds counts, the spread is of the rounds' best.

On many ranks DeepSpeed loops over the ranks for every parameter: its own code, on slices of a few elements, without
the collectives themselves, in microseconds a parameter. The forecast adds both up (tools/forecast/host.py). A CUDA
launch costs more than one of these tiny CPU kernels, so all of it is a lower bound; nothing here ran on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from _figures import add_options, delivered

if TYPE_CHECKING:
    from jp_train.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

VARIANTS = ("plain", "every module", "layers")
MODELS = {"1b": "janus_pro_1b", "7b": "janus_pro_7b"}
RANKS = (8, 128, 256)
TOKENS = 24
GRADIENTS = 20
"""Parameters of one simulated collective: about what a bucket of a large model holds."""


def narrow(model: str, stage: int) -> RunConfig:
    """The preset with its depth and stage, and widths that make arithmetic negligible."""
    from jp_train.config import load_config

    cfg = load_config(ROOT / "launch" / f"{MODELS[model]}_stage{stage}.yaml")
    vision, language, vq = cfg.model.vision, cfg.model.language, cfg.model.vq
    vision.hidden_size, vision.heads, vision.image_size, vision.patch_size = 16, 2, 32, 16
    language.hidden_size, language.intermediate_size, language.heads, language.vocab_size = 16, 32, 2, 256
    vq.codebook_size, vq.base_channels, vq.latent_channels = 64, 32, 32
    return cfg


def batch_of(cfg: RunConfig) -> Any:
    """One understanding, one text and one generation document, as a packed micro-batch."""
    from forecast import synthetic_batch

    cfg.data.seq_len = TOKENS
    return synthetic_batch(cfg, 1)


def as_worker(model: str, stage: int, variant: str, repeats: int) -> dict[str, float]:
    """Best milliseconds of a forward and a backward pass."""
    import torch

    from jp_train.config import batch_plan
    from jp_train.config.deepspeed import deepspeed_config
    from jp_train.engine.init import init_process_group, quiet_deepspeed

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = narrow(model, stage)
    batch = batch_of(cfg)
    cfg.stage.batch_size, cfg.engine.micro_batch_rows, cfg.engine.hpz_partition_size = repeats + 3, 1, 1
    init_process_group(cfg)
    quiet_deepspeed()
    import deepspeed

    from jp_train.engine.optim import parameter_groups
    from jp_train.engine.watch.guard import SequenceGuard
    from jp_train.model import freeze
    from jp_train.model.janus_pro import JanusPro

    settings = deepspeed_config(cfg, batch_plan(cfg, 1))
    if variant == "every module":
        settings["zero_optimization"]["leaf_module"] = {"classes": []}
    arguments = (cfg.model, cfg.loss, len(cfg.data.sources), cfg.engine.recomputed, 5)
    if variant == "plain":
        network = JanusPro(*arguments).to(torch.bfloat16)
    else:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            network = JanusPro(*arguments)
    freeze.set_trainable(network, cfg.stage.trainable)
    SequenceGuard(network, 0)
    if variant == "plain":
        network.train()
        call: Any = network
        backward: Callable[[torch.Tensor], Any] = torch.Tensor.backward
        end: Callable[[], Any] = lambda: None
    else:
        groups = parameter_groups(network.named_parameters(), cfg.optimizer, freeze.module_of).groups
        engine, *_ = deepspeed.initialize(
            model=network, model_parameters=groups, config=settings, dist_init_required=False
        )
        call, end = engine, engine.step
        backward = partial(engine.backward, scale_wrt_gas=False)

    times = []
    for _ in range(repeats + 2):
        begun = time.process_time()
        terms = call(batch)
        loss = terms.text_sum + terms.image_sum
        between = time.process_time()
        backward(loss)
        ended = time.process_time()
        end()
        times.append((between - begun, ended - between))
    kept = times[2:]  # DeepSpeed records its trace first
    return {"forward": 1e3 * min(t[0] for t in kept), "backward": 1e3 * min(t[1] for t in kept)}


def worker(model: str, stage: int, variant: str, repeats: int) -> dict[str, float]:
    """`as_worker` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps([model, stage, variant, repeats])],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(model: str, stage: int, rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds by variant, of alternating rounds."""
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    for _ in range(rounds):
        for variant in VARIANTS:
            runs[variant].append(worker(model, stage, variant, repeats))
    figures = {}
    for variant, found in runs.items():
        both = [run["forward"] + run["backward"] for run in found]
        best = min(found, key=lambda run: run["forward"] + run["backward"])
        figures[variant] = {**best, "both": min(both), "spread": max(both) - min(both)}
    return figures


def gather_us(world: int) -> float:
    """Microseconds of DeepSpeed's AllGatherCoalescedHandle.wait a parameter."""
    import torch
    from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

    def once() -> float:
        sliced = SimpleNamespace(ds_numel=4, dtype=torch.bfloat16)
        parameters = [
            SimpleNamespace(
                ds_status=ZeroParamStatus.INFLIGHT, ds_tensor=sliced, ds_numel=4 * world, ds_shape=(4 * world,)
            )
            for _ in range(GRADIENTS)
        ]
        slices = [torch.zeros(4 * GRADIENTS, dtype=torch.bfloat16) for _ in range(world)]
        handle = AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), parameters, slices, world)
        begun = time.process_time()
        handle.wait()
        return time.process_time() - begun

    return 1e6 * min(once() for _ in range(20)) / GRADIENTS


def reduce_us(world: int) -> float:
    """Microseconds of DeepSpeed's reduce_scatter_coalesced a gradient, without the collective."""
    import torch
    from deepspeed.runtime.comm import coalesced_collectives

    real = coalesced_collectives.dist, coalesced_collectives._torch_reduce_scatter_fn
    coalesced_collectives.dist = SimpleNamespace(get_rank=lambda group: 0, get_world_size=lambda group: world)
    coalesced_collectives._torch_reduce_scatter_fn = lambda *_, **__: None
    gradients = [torch.zeros(4 * world) for _ in range(GRADIENTS)]
    try:
        times = []
        for _ in range(20):
            begun = time.process_time()
            coalesced_collectives.reduce_scatter_coalesced(gradients)
            times.append(time.process_time() - begun)
    finally:
        coalesced_collectives.dist, coalesced_collectives._torch_reduce_scatter_fn = real
    return 1e6 * min(times) / GRADIENTS


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1b,7b")
    parser.add_argument("--stages", default="1,2,3")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=8, help="micro-batches a round, after two that are not timed")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(as_worker(*json.loads(arguments.worker))))
        return 0
    micro_batches = {
        f"{model} stage {stage}": measured(model, int(stage), arguments.rounds, arguments.repeats)
        for model in arguments.models.split(",")
        for stage in arguments.stages.split(",")
    }
    per_rank = {str(world): {"gather_us": gather_us(world), "reduce_us": reduce_us(world)} for world in RANKS}
    figures = {"micro_batch_ms": micro_batches, "per_parameter_us": per_rank}
    if delivered(arguments, figures):
        return 0
    print(f"{'ms a micro-batch':<18}" + "".join(f"{variant:>26}" for variant in VARIANTS) + f"{'layers : modules':>18}")
    for name, row in micro_batches.items():
        cells = [
            f"{row[v]['forward']:.0f} + {row[v]['backward']:.0f} = {row[v]['both']:.0f} ±{row[v]['spread']:.0f}"
            for v in VARIANTS
        ]
        ratio = row["layers"]["both"] / row["every module"]["both"]
        print(f"{name:<18}" + "".join(f"{cell:>26}" for cell in cells) + f"{ratio:>18.2f}")
    print(f"\n{'us a parameter':<18}" + "".join(f"{world + ' ranks':>14}" for world in per_rank))
    for key, label in (("gather_us", "coalesced gather"), ("reduce_us", "reduce-scatter")):
        print(f"{label:<18}" + "".join(f"{row[key]:>14.0f}" for row in per_rank.values()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
