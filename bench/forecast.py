"""Is the forecast of memory right? Predicted against measured peaks of real ZeRO-3 runs, and of the true 1B and 7B
shapes on fake tensors.

    python bench/forecast.py [--sizes 10M 40M 100M] [--worlds 2 4] [--precision fp32] [--json] [--save FILE]

Real runs: our engine (`engine.init.build_engine`) on this machine's CPU, three steps of one micro-batch each; the
prediction comes from the same formulas as a GPU's with `cuda=False` (the CPU's attention, gloo's copies, no context and
no communicator's buffers). Measured is the process's resident set: its peak during the last two steps (VmHWM, reset by
writing 5 to /proc/self/clear_refs) minus what it held after the same with a tiny model that was made and dropped. glibc
is told to take every tensor from the kernel and to give it back at once (MALLOC_MMAP_THRESHOLD_), so that the resident
set follows the tensors. It sees all that the process touches: torch's tensors, gloo's buffers, Python's objects. It
does not see memory that is allocated and never written (a bucket that no gradient fills), and it includes what no
tensor accounts for, which the prediction leaves out: in bf16 oneDNN's scratch is 40 MiB, a fifth of the smallest model.
So `states` is measured beside it as the bytes of all live tensors between two steps.

Fake tensors: one forward and backward pass of the whole model with the true sizes on torch's FakeTensorMode (nothing is
computed), every storage that an operation makes followed until it is freed. Exact to the byte for tensors; it knows no
ZeRO, no allocator, and no kernel's workspace.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jp_train.config import RunConfig
    from jp_train.tools.forecast.memory import Forecast
    from jp_train.tools.forecast.shapes import MicroBatch
    from jp_train.types import PackedBatch

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
SIZES = {
    "tiny": {"width": 64, "hidden": 128, "layers": 1, "heads": 2, "vocabulary": 500, "vision": 32, "vision_layers": 1},
    "10M": {
        "width": 256,
        "hidden": 704,
        "layers": 6,
        "heads": 4,
        "vocabulary": 8_000,
        "vision": 128,
        "vision_layers": 4,
    },
    "40M": {
        "width": 512,
        "hidden": 1408,
        "layers": 8,
        "heads": 8,
        "vocabulary": 12_000,
        "vision": 192,
        "vision_layers": 4,
    },
    "100M": {
        "width": 768,
        "hidden": 2048,
        "layers": 10,
        "heads": 12,
        "vocabulary": 16_000,
        "vision": 256,
        "vision_layers": 6,
    },
}
STAGES = {
    1: ["aligner", "gen_embed", "gen_aligner", "gen_head"],
    2: ["aligner", "language_model", "gen_embed", "gen_aligner", "gen_head"],
    3: ["vision_model", "aligner", "language_model", "gen_embed", "gen_aligner", "gen_head"],
}


def configuration(
    size: str,
    *,
    stage: int = 3,
    rows: int = 2,
    checkpointing: bool = True,
    precision: str = "fp32",
    hpz: int = 1,
    world: int = 2,
) -> RunConfig:
    """A Janus-Pro of about `size` parameters; 36 tokens an image, rows of 512 tokens."""
    from jp_train.config import RunConfig
    from jp_train.config.choices import BatchUnit, Init, Precision
    from jp_train.config.schema import LanguageConfig, MixtureConfig, VisionConfig, VQConfig

    s = SIZES[size]
    cfg = RunConfig(precision=Precision(precision))
    cfg.model.init = Init.random
    cfg.model.vision = VisionConfig(
        hidden_size=s["vision"], layers=s["vision_layers"], heads=4, image_size=96, patch_size=16
    )
    cfg.model.vq = VQConfig(
        codebook_size=2048,
        embed_dim=8,
        base_channels=32,
        channel_multiplier=[1, 1, 1, 1, 2],
        res_blocks=1,
        latent_channels=32,
    )
    cfg.model.language = LanguageConfig(
        hidden_size=s["width"],
        intermediate_size=s["hidden"],
        layers=s["layers"],
        heads=s["heads"],
        vocab_size=s["vocabulary"],
        max_position_embeddings=1024,
    )
    cfg.stage.trainable = list(STAGES[stage])
    cfg.stage.mixture = MixtureConfig(understanding=2, text=3 if stage > 1 else 0, generation=5)
    cfg.stage.batch_unit, cfg.stage.batch_size = BatchUnit.packed, rows * world
    cfg.data.seq_len = 512
    cfg.engine.micro_batch_rows = rows
    cfg.engine.activation_checkpointing = checkpointing
    cfg.engine.hpz_partition_size = hpz
    cfg.engine.collective_timeout_s = 300.0
    cfg.loss.chunk_tokens = 256
    cfg.engine.deepspeed = {
        "zero_optimization": {"reduce_bucket_size": 4_000_000, "stage3_prefetch_bucket_size": 1_000_000}
    }
    return cfg


def synthetic_batch(cfg: Any, rows: int, *, device: str = "cpu", documents: str = "ugt") -> PackedBatch:
    """`rows` full rows that repeat the kinds of `documents` (u, g: an image and 40 tokens; t: what is left of a
    third of the row)."""
    import torch

    from jp_train.types import IGNORE_INDEX, PackedBatch

    side, patch = cfg.model.vision.image_size, cfg.model.vision.patch_size
    slots, seq_len = (side // patch) ** 2, cfg.data.seq_len
    lengths: list[int] = []
    kinds, starts = [], []
    for _ in range(rows):
        left = seq_len
        while left:
            for kind in documents:
                length = min(left, slots + 40 if kind in "ug" else max(64, seq_len // 4))
                if kind in "ug" and length < slots + 4:
                    kind = "t"
                if length:
                    starts.append(sum(lengths))
                    lengths.append(length)
                    kinds.append(kind)
                left -= length
    total = sum(lengths)
    ids = torch.arange(total) % (cfg.model.language.vocab_size - 1)
    labels, gen_labels = torch.full((total,), IGNORE_INDEX), torch.full((total,), IGNORE_INDEX)
    und_slots, gen_slots = [], []
    for start, length, kind in zip(starts, lengths, kinds, strict=True):
        if kind == "g":
            gen_slots.append(torch.arange(start + 20, start + 20 + slots))
            gen_labels[start + 19 : start + 19 + slots] = torch.arange(slots) % cfg.model.vq.codebook_size
        else:
            text = start + (1 + slots if kind == "u" else 0)
            labels[text : start + length - 1] = ids[text + 1 : start + length]
            if kind == "u":
                und_slots.append(torch.arange(start + 1, start + 1 + slots))
    empty = torch.zeros(0, dtype=torch.int64)
    documents_of = torch.tensor(lengths)
    batch = PackedBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        labels=labels,
        gen_labels=gen_labels,
        cu_seqlens=torch.cat((torch.zeros(1), documents_of.cumsum(0))).to(torch.int32),
        max_seqlen=max(lengths),
        und_images=torch.zeros(len(und_slots), 3, side, side, dtype=torch.uint8),
        und_slots=torch.cat(und_slots) if und_slots else empty,
        gen_images=torch.zeros(0, 3, side, side, dtype=torch.uint8),
        gen_pending=empty,
        gen_ids=torch.zeros(len(gen_slots), slots, dtype=torch.int64),
        gen_slots=torch.cat(gen_slots) if gen_slots else empty,
        document_lengths=documents_of,
        document_kinds=torch.tensor([{"u": 0, "t": 1, "g": 2}[kind] for kind in kinds]),
        document_sources=torch.zeros(len(lengths), dtype=torch.int64),
        rows=rows,
        seq_len=seq_len,
        step=0,
    )
    return batch.to(device)


def contents(batch: PackedBatch) -> MicroBatch:
    """The batch as the forecast sees it."""
    from jp_train.tools.forecast.shapes import MicroBatch

    return MicroBatch(
        tokens=len(batch.input_ids),
        und_images=len(batch.und_images),
        gen_images=len(batch.gen_ids),
        text_positions=batch.supervised_text_tokens,
        image_positions=batch.supervised_image_tokens,
    )


def resident(key: str = "VmRSS") -> int:
    """Bytes of this process's resident set, or with VmHWM of its peak since the last reset."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key + ":"))


def live_tensors() -> int:
    """Bytes of all tensors that Python knows of, every storage once."""
    import gc

    import torch

    storages = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor) and value.device.type == "cpu" and value.layout is torch.strided:
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def as_rank(spec: dict[str, Any]) -> dict[str, Any]:
    """Three real steps on this rank; its peaks in bytes above what the process held after the same with a tiny
    model, made and dropped."""
    import gc

    import torch

    from jp_train.engine.init import init_process_group

    torch.set_num_threads(1)
    ranks = init_process_group(configuration(**spec))
    # modules imported late, gloo's connections, threads: not the model's
    _steps(configuration(**{**spec, "size": "tiny"}), ranks)
    gc.collect()
    before, tensors = resident(), live_tensors()
    peaks = _steps(configuration(**spec), ranks)
    return {
        "peak": peaks["peak"] - before,
        "pass": peaks["pass"] - before,
        "between_steps": peaks["between_steps"] - before,
        "tensors": peaks["tensors"] - tensors,
        "seconds": peaks["seconds"],
        "order": peaks["order"],
        "before": before,
    }


def _steps(cfg: Any, ranks: Any) -> dict[str, Any]:
    """Resident bytes of a fresh engine during its second and third step, and the order of modules that DeepSpeed
    recorded."""
    import gc

    from jp_train.config import batch_plan
    from jp_train.engine.init import build_engine
    from jp_train.engine.objective import count_supervised, micro_batch_loss

    engine = build_engine(cfg, batch_plan(cfg, ranks.dp_world_size), ranks, n_sources=1, image_token_id=5)
    batch = synthetic_batch(cfg, cfg.engine.micro_batch_rows)
    totals = count_supervised([batch])
    deepspeed = engine.deepspeed
    began = time.perf_counter()
    for step in range(3):
        if step == 1:  # the first one makes the moments, and has no trace to prefetch from
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
        loss = micro_batch_loss(deepspeed(batch), totals, cfg.loss)
        deepspeed.backward(loss * ranks.dp_world_size, scale_wrt_gas=False)
        passed = resident("VmHWM")
        deepspeed.step()
        del loss
    coordinator = deepspeed.optimizer.parameter_offload.get_param_coordinator()
    names = {id(module): name for name, module in engine.model.named_modules()}
    order = [names[id(module)] for module in coordinator._PartitionedParameterCoordinator__submodule_order]
    gc.collect()
    measured = {
        "tensors": live_tensors(),
        "peak": resident("VmHWM"),
        "pass": passed,
        "between_steps": resident(),
        "seconds": time.perf_counter() - began,
        "order": order,
    }
    deepspeed.destroy()
    return measured


def launch(spec: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """`as_rank` on `spec['world']` processes of this machine; their results by rank."""
    world = spec["world"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "MALLOC_ARENA_MAX": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", json.dumps(spec), "--out", str(folder / f"rank_{rank}.json")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=sys.stderr,
        )
        for rank in range(world)
    ]
    codes = [process.wait() for process in started]
    if any(codes):
        raise SystemExit(f"a rank failed: exit codes {codes}")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(world)]


def predict(spec: dict[str, Any]) -> Forecast:
    """The forecast of the same run with the CPU's constants."""
    from jp_train.config import batch_plan
    from jp_train.tools.forecast.candidates import setting_of
    from jp_train.tools.forecast.memory import forecast_memory
    from jp_train.tools.forecast.shapes import shapes_of

    cfg = configuration(**spec)
    plan = batch_plan(cfg, spec["world"])
    setting = setting_of(cfg, plan, cuda=False)
    return forecast_memory(shapes_of(cfg), contents(synthetic_batch(cfg, cfg.engine.micro_batch_rows)), setting)


def compare(spec: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: predicted and measured peak of a run in bytes."""
    with tempfile.TemporaryDirectory(prefix="bench_forecast_") as folder:
        ranks = launch(spec, Path(folder))
    forecast = predict(spec)
    measured = max(rank["peak"] for rank in ranks)
    return {
        **spec,
        "measured": measured,
        "predicted": forecast.memory.total,
        "error": forecast.memory.total / measured - 1,
        "phase": forecast.memory.phase,
        "states_predicted": forecast.memory.states,
        "between_steps": max(rank["between_steps"] for rank in ranks),
        "states_measured": max(rank["tensors"] for rank in ranks),
        "pass_measured": max(rank["pass"] for rank in ranks),
        "parts": forecast.memory.gib(),
        "seconds": ranks[0]["seconds"],
    }


def fake_passes(cfg: Any, batch: Any, *, checkpointing: int) -> dict[str, int]:
    """Bytes of tensors at the peak of one forward and backward pass of the true model in bf16 on a GPU that is not
    there; parameters not counted.

    A weight's gradient is dropped as soon as it is whole, as ZeRO-3 does. `saved`: what is left between the passes.
    """
    import weakref
    from dataclasses import replace

    import torch
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    from jp_train.config.schema import LossConfig
    from jp_train.model import attention, janus_pro
    from jp_train.model.freeze import set_trainable

    class Follow(TorchDispatchMode):
        """Adds every storage when an operation makes it, and takes it off when it is freed."""

        def __init__(self) -> None:
            super().__init__()
            self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                    size = storage.nbytes()
                    self.known[storage] = size
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, size)
            return made

        def free(self, size: int) -> None:
            self.now -= size

    class FusedNorm(torch.autograd.Function):
        """What CUDA's kernel takes and keeps: its input, and 4 bytes a row."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float) -> torch.Tensor:
            ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
            return torch.empty_like(x)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            x, weight, _ = ctx.saved_tensors
            return torch.empty_like(x), None, torch.empty_like(weight) if ctx.needs_input_grad[2] else None, None

    stand_ins = (
        (torch.nn.functional, "linear", zero3_linear_wrap),
        (torch.nn.functional, "rms_norm", FusedNorm.apply),
        (janus_pro, "document_of_token", lambda given: torch.zeros_like(given.input_ids)),
        (attention, "uses_varlen_kernel", lambda _: True),
    )
    plain = [getattr(owner, name) for owner, name, _ in stand_ins]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        with torch.device("meta"):
            model = janus_pro.JanusPro(
                cfg.model, LossConfig(chunk_tokens=cfg.loss.chunk_tokens), 1, checkpointing, 0
            ).to(torch.bfloat16)
        with FakeTensorMode():
            for module in model.modules():
                for name, parameter in list(module.named_parameters(recurse=False)):
                    setattr(
                        module,
                        name,
                        torch.nn.Parameter(torch.empty(parameter.shape, dtype=torch.bfloat16, device="cpu")),
                    )
                for name, buffer in list(module.named_buffers(recurse=False)):
                    module.register_buffer(
                        name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"), persistent=False
                    )
            set_trainable(model, cfg.stage.trainable)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            tensors = {
                name: value for name in batch.__slots__ if isinstance(value := getattr(batch, name), torch.Tensor)
            }
            batch = replace(
                batch, **{name: torch.empty(x.shape, dtype=x.dtype, device="cpu") for name, x in tensors.items()}
            )
            follow = Follow()
            for there in (*model.parameters(), *model.buffers(), *(getattr(batch, name) for name in tensors)):
                follow.known[there.untyped_storage()] = 0
            with follow:
                terms = model(batch)
                loss = terms.text_sum + terms.image_sum
                del terms
                forward, saved, follow.peak = follow.peak, follow.now, follow.now
                loss.backward()
            return {"forward": forward, "saved": saved, "backward": follow.peak}
    finally:
        for (owner, name, _), value in zip(stand_ins, plain, strict=True):
            setattr(owner, name, value)


def predicted_passes(cfg: Any, batch: Any, *, checkpointing: int) -> dict[str, int]:
    """The forecast of the same: activations, and one whole weight gradient at a time."""
    from jp_train.tools.forecast.activations import Numerics
    from jp_train.tools.forecast.shapes import shapes_of
    from jp_train.tools.forecast.walk import FORWARD, walk

    shapes = shapes_of(cfg)
    visits = walk(
        shapes, contents(batch), Numerics(size=2, fused=True, chunk=cfg.loss.chunk_tokens), checkpointing=checkpointing
    )
    gradient: dict[str, int] = {}
    for p in shapes.parameters:
        if p.trained:
            gradient[p.path] = max(gradient.get(p.path, 0), 2 * p.numel)
    forward = max(v.activation for v in visits if v.phase == FORWARD)
    backward = max(
        v.activation + (gradient.get(v.path, 0) if v.phase in ("backward", "continued") else 0)
        for v in visits
        if v.phase != FORWARD
    )
    return {"forward": forward, "backward": backward}


def true_shape(model: str, stage: int) -> RunConfig:
    """The configuration of the paper's model and stage, and a full row of 4096 tokens of all three kinds."""
    from jp_train.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(f"preset: janus_pro_{model}/stage{stage}\n")
        return load_config(path)


def compare_shapes(model: str, stage: int, checkpointing: int) -> dict[str, Any]:
    """One line of the table of the true shapes: bytes at the peak of a backward pass, predicted and followed."""
    cfg = true_shape(model, stage)
    batch = synthetic_batch(cfg, 1)
    followed = fake_passes(cfg, batch, checkpointing=checkpointing)["backward"]
    predicted = predicted_passes(cfg, batch, checkpointing=checkpointing)["backward"]
    return {
        "model": model,
        "stage": stage,
        "checkpointing": checkpointing,
        "measured": followed,
        "predicted": predicted,
        "error": predicted / followed - 1,
    }


def main() -> None:
    from _figures import add_options, delivered

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", nargs="+", choices=[name for name in SIZES if name != "tiny"], default=["10M", "40M", "100M"]
    )
    parser.add_argument("--worlds", nargs="+", type=int, default=[2, 4], help="numbers of ranks (default 2 4)")
    parser.add_argument("--rows", type=int, default=1, help="rows of 512 tokens a micro-batch (default 1)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-shapes", action="store_true", help="leave out the true 1B and 7B shapes")
    add_options(parser)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        arguments.out.write_text(json.dumps(as_rank(json.loads(arguments.rank))))
        return
    sys.path.insert(0, str(ROOT))
    runs = []
    for size in arguments.sizes:
        for world in arguments.worlds:
            spec = {"size": size, "world": world, "rows": arguments.rows, "precision": arguments.precision}
            print(f"real run: {size} on {world} ranks", file=sys.stderr, flush=True)
            runs.append(compare(spec))
    shapes = []
    for model in () if arguments.no_shapes else ("1b", "7b"):
        for stage in (1, 2, 3):
            for checkpointing in (True, False):
                print(
                    f"fake tensors: {model} stage {stage}, checkpointing {checkpointing}", file=sys.stderr, flush=True
                )
                shapes.append(compare_shapes(model, stage, checkpointing))
    figures = {"runs": runs, "shapes": shapes}
    if delivered(arguments, figures):
        return
    print(
        f"{'parameters':<12}{'ranks':>6}{'measured MiB':>14}{'predicted':>11}{'error':>8}"
        f"{'states MiB':>12}{'predicted':>11}  peak in"
    )
    for row in runs:
        print(
            f"{row['size']:<12}{row['world']:>6}{row['measured'] / MIB:>14.1f}{row['predicted'] / MIB:>11.1f}"
            f"{row['error']:>+8.1%}"
            f"{row['states_measured'] / MIB:>12.1f}{row['states_predicted'] / MIB:>11.1f}  {row['phase']}"
        )
    print(f"\n{'true shape':<24}{'followed MiB':>14}{'predicted':>11}{'error':>8}")
    for row in shapes:
        name = f"{row['model']} stage {row['stage']}{', checkpointing' if row['checkpointing'] else ''}"
        print(f"{name:<24}{row['measured'] / MIB:>14.0f}{row['predicted'] / MIB:>11.0f}{row['error']:>+8.1%}")


if __name__ == "__main__":
    main()
