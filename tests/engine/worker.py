"""What one rank of an engine test does (see tests/distributed.py). Not a test module.

A scenario is a function `(**arguments) -> JSON-able result`. Several `train` runs share one process and one process
group.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

import deepspeed  # noqa: E402, F401 - imported once, before the ranks are forked
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import jp_train.engine.checkpoint.store as checkpoints  # noqa: E402
import jp_train.train.session as session  # noqa: E402
import jp_train.train.trainer as training  # noqa: E402
from jp_train.config import RunConfig  # noqa: E402
from jp_train.config.schema import SourceConfig, SourceKind  # noqa: E402
from jp_train.data.loader import StepLoader, rows_hash  # noqa: E402
from jp_train.engine.export import whole_tensors  # noqa: E402
from jp_train.engine.init import build_engine  # noqa: E402
from jp_train.errors import DataError, JpTrainError  # noqa: E402
from tests.distributed import run_scenarios, serve  # noqa: E402
from tests.engine.tiny_run import tiny_run  # noqa: E402


def rank() -> int:
    return int(os.environ["RANK"])


def world() -> int:
    return int(os.environ["WORLD_SIZE"])


def make(data: str, run_dir: str, **changes: Any) -> RunConfig:
    """A tiny run; `changes` are tiny_run's own arguments and dotted keys of the configuration."""
    own = {key: changes.pop(key) for key in ("stage", "steps", "rows") if key in changes}
    init_from = changes.pop("init_from", None)
    held_out, broken = changes.pop("held_out", False), changes.pop("broken", False)
    several = changes.pop("several", False)
    cfg = tiny_run(Path(data), Path(run_dir), init_from=None if init_from is None else Path(init_from), **own)
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node: Any = cfg
        for parent in parents:
            node = getattr(node, parent)
        before = getattr(node, leaf)
        setattr(node, leaf, type(before)(value) if isinstance(before, Enum) else value)
    if several:
        cfg.data.sources["und"].shards = "several.tar"
    if broken:
        cfg.data.sources["gen"].shards = "gen-broken.tar"
    if held_out:
        cfg.validation.sources = {
            "held_gen": SourceConfig(kind=SourceKind.generation, shards="held-gen.tar"),
            "held_und": SourceConfig(kind=SourceKind.understanding, shards="held-und.tar"),
        }
    return cfg


def train(
    *,
    kill_at: int | None = None,
    kill_rank: int = 1,
    kill_in_save: bool = False,
    nan_at: list[int] = (),
    dump_start: str | None = None,
    wait_in_step: int | None = None,
    data_error_at: int | None = None,
    **changes: Any,
) -> dict:
    """`jp_train.train.session.train`; returns the exit code, or the error, and the hash of this rank's rows by step.

    kill_at: SIGKILL `kill_rank` before that step, or, with kill_in_save, in the middle of writing its shard of that
    step's checkpoint.
    nan_at: steps whose loss rank 0 makes NaN. dump_start: a safetensors file for the weights before the first step.
    data_error_at: rank 1's loader fails at that step.
    wait_in_step: linger in this step until a stop signal has arrived at rank 0 (the test sends it there).
    """
    cfg = make(**changes)
    plain_prepare = session.prepare

    def prepare(*args):
        parts = plain_prepare(*args)
        tensors = list(whole_tensors(parts.engine, keep=rank() == 0))
        if rank() == 0:
            save_file({name: tensor.clone() for name, tensor in tensors}, dump_start)
        return parts

    if dump_start:
        session.prepare = prepare
    hashes: dict[int, str] = {}
    plain_step, plain_loss, plain_save = training.Trainer.train_step, training.micro_batch_loss, checkpoints.write_shard
    here: dict[str, Any] = {}

    def step(self, micro_batches, totals, **timing):
        number = self.state.step + 1
        here["step"] = number
        if number == kill_at and not kill_in_save and kill_rank == rank():
            os.kill(os.getpid(), signal.SIGKILL)
        hashes[number] = rows_hash(micro_batches)
        if number == wait_in_step and rank() == 0:
            Path(cfg.run_dir, "waiting").touch()
            while not self.parts.flag.number:
                time.sleep(0.02)
        return plain_step(self, micro_batches, totals, **timing)

    def loss(terms, totals, cfg_loss):
        value = plain_loss(terms, totals, cfg_loss)
        return value * float("nan") if here["step"] in nan_at and rank() == 0 else value

    def save(path, tensors):
        if kill_in_save and path.parent.name == f".saving_step_{kill_at:07d}" and kill_rank == rank():
            plain_save(path, tensors)
            path.write_bytes(path.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_save(path, tensors)

    plain_next = StepLoader.__next__

    def following(self):
        item = plain_next(self)
        if item.step + 1 == data_error_at and rank() == 1:
            raise DataError("shard x.tar: cannot be read")
        return item

    StepLoader.__next__ = following
    training.Trainer.train_step, training.micro_batch_loss, checkpoints.write_shard = step, loss, save
    try:
        return {"code": session.train(cfg), "hashes": hashes}
    except JpTrainError as error:
        return {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code, "hashes": hashes}
    finally:
        training.Trainer.train_step, training.micro_batch_loss, checkpoints.write_shard = (
            plain_step,
            plain_loss,
            plain_save,
        )
        session.prepare = plain_prepare
        StepLoader.__next__ = plain_next


def leak(what: str, **changes: Any) -> dict:
    """A run whose model breaks the freeze in its first step: `write` moves a frozen weight, `skip` leaves trainable
    ones out."""
    import jp_train.model.janus_pro as model

    plain_step, plain_place = training.Trainer.train_step, model._place
    if what == "write":

        def step(self, *args, **kwargs):
            frozen = [p for p in self.engine.model.parameters() if not p.requires_grad]

            def write(*_: Any) -> None:
                frozen[5].ds_tensor.data.view(-1)[:1].add_(2.0**-20)

            handle = self.engine.model.register_forward_hook(write)
            try:
                return plain_step(self, *args, **kwargs)
            finally:
                handle.remove()

        training.Trainer.train_step = step
    else:
        model._place = lambda embeddings, slots, features: (
            embeddings if slots is None else plain_place(embeddings, slots, features)
        )
    try:
        return train(**changes)
    finally:
        training.Trainer.train_step, model._place = plain_step, plain_place


def presence(*, stage: int, negative: bool = False, data: str, run_dir: str) -> dict:
    """Every pair of {subsets of kinds} x {subsets of kinds} on two ranks (stages 1 and 2: in one of its two orders):
    losses and gradients against one plain process. A document to understand has 1 to 5 images."""
    import jp_train.model.janus_pro as model_code
    from jp_train.config import batch_plan
    from jp_train.engine.init import Ranks, gather_for_writing, init_process_group
    from jp_train.engine.objective import SupervisedTotals, count_supervised, micro_batch_loss
    from jp_train.model import pretrained
    from jp_train.model.freeze import set_trainable
    from jp_train.model.janus_pro import JanusPro
    from jp_train.types import KINDS
    from tests.model.janus_tiny import N_SOURCES, PLACEHOLDER, pack, random_docs, tiny_config

    cfg = make(
        data, run_dir, stage=stage, rows=world(), **{"optimizer.weight_decay": 0.0, "engine.collective_timeout_s": 20.0}
    )
    cfg.model = tiny_config()
    cfg.model.vision.layers = cfg.model.language.layers = 1
    cfg.engine.activation_checkpointing = stage == 3
    ranks: Ranks = init_process_group(cfg)
    subsets = [[kind for bit, kind in enumerate(KINDS) if number >> bit & 1] for number in range(8)]
    batches = [
        [pack(random_docs(100 * r + number, kinds, images=(number % 5 + 1,))) for number, kinds in enumerate(subsets)]
        for r in range(world())
    ]

    oracle = JanusPro(cfg.model, cfg.loss, N_SOURCES, False, PLACEHOLDER)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in oracle.named_parameters():
            parameter.copy_(
                float("norm" in name and name.endswith("weight"))
                + 0.2 * torch.randn(parameter.shape, generator=generator)
            )
    set_trainable(oracle, cfg.stage.trainable)
    trained = [(name, p) for name, p in oracle.named_parameters() if p.requires_grad]
    sums: list[list[tuple[float, list[torch.Tensor]]]] = []
    for own in batches:
        sums.append([])
        for batch in own:
            oracle.zero_grad(set_to_none=True)
            terms = oracle(batch)
            loss = terms.text_sum + terms.image_sum
            loss.backward()
            sums[-1].append(
                (float(loss), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for _, p in trained])
            )

    plain_prepare, plain_place = pretrained.prepare_weights, model_code._place

    def copy_oracle(model, vq, model_cfg, *, trainable, seed, gather, is_writer):
        values = dict(oracle.named_parameters())
        for name, parameter in model.named_parameters():
            with gather_for_writing([parameter]):
                if is_writer:
                    parameter.data.copy_(values[name].detach())
        return "the oracle's"

    pretrained.prepare_weights = copy_oracle
    if negative:
        model_code._place = lambda e, slots, features: e if slots is None else plain_place(e, slots, features)
    try:
        engine = build_engine(cfg, batch_plan(cfg, world()), ranks, n_sources=N_SOURCES, image_token_id=PLACEHOLDER)
        for group in engine.deepspeed.optimizer.param_groups:
            group["lr"] = 0.0
        worst_loss = worst_grad = 0.0
        pairs = [(a, b) for a in range(8) for b in range(8) if stage == 3 or a <= b] if not negative else [(1, 2)]
        for pair in pairs:
            counts = [count_supervised([batches[r][number]]) for r, number in enumerate(pair)]
            totals = SupervisedTotals(
                sum(c.text_tokens for c in counts),
                sum(c.image_tokens for c in counts),
                sum(c.documents for c in counts),
            )
            n = max(1, totals.text_tokens + totals.image_tokens)
            loss = micro_batch_loss(engine.deepspeed(batches[rank()][pair[rank()]]), totals, cfg.loss)
            engine.deepspeed.backward(loss * world(), scale_wrt_gas=False)
            expected_loss = sums[rank()][pair[rank()]][0] / n
            worst_loss = max(
                worst_loss,
                abs(float(loss) - expected_loss) / max(1e-6, abs(expected_loss)) if expected_loss else abs(float(loss)),
            )
            named = dict(engine.model.named_parameters())
            whole_gradients = [
                sum(sums[r][number][1][index] for r, number in enumerate(pair)) / n for index in range(len(trained))
            ]
            norm = float(sum(whole.square().sum() for whole in whole_gradients))
            for (name, plain), whole in zip(trained, whole_gradients, strict=True):
                parameter = named[name]
                mine = engine.deepspeed.optimizer.get_local_fp32_grad_for_param(parameter).flatten()
                start = parameter.ds_tensor.numel() * rank()
                expected = torch.zeros_like(mine)
                part = whole.flatten()[start : start + mine.numel()]
                expected[: part.numel()] = part
                # some gradients (key biases) are zero but for rounding: errors count relative to the whole gradient's
                # norm there
                scale = max(float(whole.abs().max()), 1e-3 * norm**0.5) or 1.0
                held = max(0, min(mine.numel(), plain.numel() - start))
                worst_grad = max(worst_grad, float((mine - expected)[:held].abs().max()) / scale if held else 0.0)
            engine.deepspeed.step()
            if norm:
                found = float(engine.deepspeed.get_global_grad_norm())
                worst_grad = max(worst_grad, abs(found - norm**0.5) / norm**0.5)
        return {"pairs": len(pairs), "loss": worst_loss, "grad": worst_grad}
    except (RuntimeError, JpTrainError, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        pretrained.prepare_weights, model_code._place = plain_prepare, plain_place


SCENARIOS = {"train": train, "leak": leak, "presence": presence}


def run(folder: Path, scenarios: list[dict[str, Any]]) -> int:
    session.leave_process_group = lambda code: None  # the next scenario needs it
    return run_scenarios(SCENARIOS, folder, scenarios)


if __name__ == "__main__":
    serve(run)
