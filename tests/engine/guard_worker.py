"""What one rank of a guard test does (see tests/distributed.py): runs with planted stalls, leaks and bad steps. Not
a test module."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import run_scenarios, serve
from tests.engine.worker import make, rank, train, world  # it also makes the next import possible

# isort: split
import jp_train.train.preparation as preparation
import jp_train.train.session as session
import jp_train.train.trainer as training
from jp_train.config import batch_plan
from jp_train.engine.checkpoint.saver import Saver
from jp_train.engine.forensics import block_norms, block_of
from jp_train.engine.init import build_engine, gather_for_reading, init_process_group
from jp_train.engine.outliers import UpdateDecision
from jp_train.engine.update_gate import UpdateGate
from jp_train.errors import DataError, LaunchError
from jp_train.types import KINDS, Kind
from tests.model.janus_tiny import N_SOURCES, PLACEHOLDER, pack, random_docs, tiny_config

ROUND = 4
"""Batches of `lopsided`, given in turn."""


def planted(*, what: str, at: int = 3, **changes: Any) -> dict:
    """A run in which rank 1 misbehaves at step `at`; returns what `train` does, if the process lives that long.

    extra: it makes a collective that the other does not. stop: it is stopped. die: it is killed. skip: it leaves out a
    layer. worker: its loader workers are stopped (SIGSTOP), or killed (kill-worker).
    """
    plain = training.Trainer.train_step

    def step(self, *args, **timing):
        if self.state.step + 1 == at:
            group = dist.new_group() if what == "extra" else None
            if rank() == 1:
                if what == "extra":
                    dist.all_reduce(torch.zeros(1), group=group)
                elif what in ("stop", "die"):
                    os.kill(os.getpid(), signal.SIGSTOP if what == "stop" else signal.SIGKILL)
                elif what in ("worker", "kill-worker"):
                    for process in self.parts.loader._iterator._workers:
                        os.kill(process.pid, signal.SIGSTOP if what == "worker" else signal.SIGKILL)
                else:
                    leave_out_a_layer(self.engine.model)
        return plain(self, *args, **timing)

    training.Trainer.train_step = step
    try:
        return train(**changes)
    finally:
        training.Trainer.train_step = plain


def signalled(*, phase: str, linger: float = 1.0, **changes: Any) -> dict:
    """A run that leaves the file RUN_DIR/at-PHASE and lingers there, in the phase's first call but the one before
    training; the test sends the signal."""
    import jp_train.engine.heldout as heldout

    where = {
        "indexing": (preparation, "index_sources"),
        "validation": (heldout.HeldOut, "measure"),
        "save": (Saver, "save"),
        "export": (training, "export"),
    }
    holder, name = where[phase]
    plain = getattr(holder, name)
    calls = []

    def wait(*args, **options):
        calls.append(name)
        if phase != "validation" or len(calls) == 2:
            Path(changes["run_dir"], f"at-{phase}.{rank()}").touch()
            until = time.monotonic() + linger
            while time.monotonic() < until:
                time.sleep(0.05)
        return plain(*args, **options)

    setattr(holder, name, wait)
    try:
        return train(**changes)
    finally:
        setattr(holder, name, plain)


def spiked(*, loud: dict[str, float], **changes: Any) -> dict:
    """A run whose loss is multiplied at some steps: {step: factor}."""
    plain_step, plain_loss = training.Trainer.train_step, training.micro_batch_loss
    here = {"factor": 1.0}

    def step(self, *args, **timing):
        here["factor"] = loud.get(str(self.state.step + 1), 1.0)
        return plain_step(self, *args, **timing)

    training.Trainer.train_step = step
    training.micro_batch_loss = lambda *args: plain_loss(*args) * here["factor"]
    try:
        return train(**changes)
    finally:
        training.Trainer.train_step, training.micro_batch_loss = plain_step, plain_loss


def leave_out_a_layer(model: torch.nn.Module) -> None:
    """From here on this rank skips the second decoder layer: the next gathers have the same sizes, so gloo mixes
    them up in silence."""
    del next(module for name, module in model.named_modules() if name.endswith("language_model.layers"))._modules["1"]


def tiny_engine(stage: int, data: str, run_dir: str) -> Any:
    """An engine around janus_tiny's model."""
    cfg = make(data, run_dir, stage=stage, rows=world(), **{"engine.collective_timeout_s": 120.0})
    cfg.model = replace(tiny_config(), init=cfg.model.init)
    cfg.model.vision.layers = cfg.model.language.layers = 1
    cfg.engine.activation_checkpointing = False
    ranks = init_process_group(cfg)
    return build_engine(cfg, batch_plan(cfg, world()), ranks, n_sources=N_SOURCES, image_token_id=PLACEHOLDER)


def digest(engine: Any) -> str:
    """SHA-256 over all that this rank holds of weights, fp32 master weights, moments and the optimizer's step
    counters."""
    found = hashlib.sha256()
    optimizer = engine.deepspeed.optimizer
    held = [parameter.ds_tensor for parameter in engine.model.parameters()] + list(
        optimizer.fp32_partitioned_groups_flat
    )
    for state in optimizer.optimizer.state.values():
        held += [torch.as_tensor(value) for _, value in sorted(state.items())]
    for tensor in held:
        found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def gate(*, steps: list[str], data: str, run_dir: str, stage: int = 3, dummy: bool = True) -> dict:
    """Updates by the names in `steps`: a good batch (its number), or `nan`, `loud` (a finite loss of 10^4 times the
    size), which the gate skips.

    `dummy` False leaves out the pass over empty pictures, so that text alone does not reach the towers: only there do
    old gradients show.
    """
    import jp_train.model.janus_pro as model_code

    engine = tiny_engine(stage, data, run_dir)
    plain_place = model_code._place
    found: dict[str, Any] = {"norms": [], "verdicts": [], "digests": [], "blocks": None, "left": []}
    if not dummy:
        model_code._place = lambda e, slots, features: e if slots is None else plain_place(e, slots, features)

    def judge(loss: float, norm: float) -> UpdateDecision:
        if not norm < float("inf") or not loss < float("inf"):
            return UpdateDecision(loss, norm, "skip", "not finite")
        return UpdateDecision(loss, norm, "skip", "loud") if loss > 1e3 else UpdateDecision(loss, norm)

    def inspect(_verdict: UpdateDecision) -> None:
        found["blocks"] = block_norms(engine.model.named_parameters(), engine.deepspeed.optimizer)

    updates = UpdateGate(engine.deepspeed.optimizer, judge, inspect)
    try:
        for name in steps:
            number = int(name) if name.isdigit() else 77
            kinds = [Kind.TEXT] if name == "0" else list(KINDS)
            batch = pack(random_docs(10 * number + rank(), kinds))
            terms = engine.deepspeed(batch)
            loss = (
                (terms.text_sum + terms.image_sum)
                / 50
                * {"nan": float("nan") if rank() == 0 else 1.0, "loud": 1e4}.get(name, 1.0)
            )
            updates.begin_step(lambda loss=loss: loss.reshape(1))
            engine.deepspeed.backward(loss * world(), scale_wrt_gas=False)
            engine.deepspeed.step()
            decision = updates.end_step()
            found["norms"].append(decision.grad_norm)
            found["verdicts"].append([decision.loss, decision.action, bool(engine.deepspeed.was_step_applied())])
            found["digests"].append(digest(engine))
            found["left"].append(int(engine.deepspeed.optimizer.grad_partitions_flat_buffer.count_nonzero()))
        found["weights"] = {}
        for name, parameter in engine.model.named_parameters():
            with gather_for_reading([parameter]):
                square = float(parameter.detach().double().square().sum())
            found["weights"][block_of(name)] = found["weights"].get(block_of(name), 0.0) + square
        return found
    finally:
        model_code._place = plain_place


def leaked(*, stage: int, what: str, data: str, run_dir: str, **changes: Any) -> dict:
    """A run of `stage` with a planted leak in its first step: `write` (a bit of a frozen weight's slice on the last
    rank, or of the VQ tokenizer where nothing else is frozen), `optimizer` (a frozen parameter given to the
    optimizer)."""
    import jp_train.engine.init as init

    plain_step, plain_groups = training.Trainer.train_step, init.parameter_groups

    def step(self, *args, **kwargs):
        frozen = [p for p in self.engine.model.parameters() if not p.requires_grad]
        calls: list[int] = []

        def write(*_: Any) -> None:
            calls.append(1)
            if len(calls) > 1:
                return
            if not frozen and rank() == world() - 1:
                next(self.engine.vq.parameters()).data.view(torch.int32).view(-1)[:1] ^= 1
            elif rank() == world() - 1:
                max(frozen, key=lambda p: p.ds_numel).ds_tensor.data.view(torch.int32).view(-1)[:1] ^= 1

        handle = self.engine.model.register_forward_hook(write)
        try:
            return plain_step(self, *args, **kwargs)
        finally:
            handle.remove()

    def groups(named, cfg, module_of):
        named = list(named)
        next(p for _, p in named if not p.requires_grad).requires_grad_(True)
        return plain_groups(iter(named), cfg, module_of)

    if what == "write":
        training.Trainer.train_step = step
    else:
        init.parameter_groups = groups
    try:
        return train(data=data, run_dir=run_dir, stage=stage, **changes)
    finally:
        training.Trainer.train_step, init.parameter_groups = plain_step, plain_groups


def lopsided(*, stage: int, steps: int, data: str, run_dir: str) -> dict:
    """Rank 0 has three pictures in every step, rank 1 none, with real AdamW updates. In every step of two rounds of
    the batches at the start, one in the middle and one at the end the gradients are compared with those of a plain
    PyTorch model that has the same weights and sees both ranks' rows."""
    import jp_train.model.pretrained as pretrained
    from jp_train.model.freeze import set_trainable
    from jp_train.model.janus_pro import JanusPro

    pictures = [Kind.UNDERSTANDING, Kind.GENERATION, Kind.TEXT, Kind.UNDERSTANDING]
    documents = [
        [random_docs(10 * r + n, pictures if r == 0 else [Kind.TEXT, Kind.TEXT]) for n in range(ROUND)]
        for r in range(2)
    ]
    batches = [[pack(one) for one in own] for own in documents]
    both = [pack([*first, *second]) for first, second in zip(*documents, strict=True)]
    assert all(len(one.und_images) + len(one.gen_ids) == 3 for one in batches[0])
    assert not any(len(one.und_images) + len(one.gen_ids) for one in batches[1])
    cfg = make(
        data,
        run_dir,
        stage=stage,
        rows=world(),
        **{"engine.collective_timeout_s": 120.0, "optimizer.eps": 1e-3, "optimizer.weight_decay": 0.0},
    )
    cfg.model = tiny_config()
    cfg.model.vision.layers = cfg.model.language.layers = 1
    cfg.engine.activation_checkpointing = False
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
    plain_prepare = pretrained.prepare_weights

    def copy_oracle(model, vq, model_cfg, *, trainable, seed, gather, is_writer):
        values = dict(oracle.named_parameters())
        for name, parameter in model.named_parameters():
            with gather([parameter]):
                if is_writer:
                    parameter.data.copy_(values[name].detach())
        return "the oracle's"

    pretrained.prepare_weights = copy_oracle
    try:
        ranks = init_process_group(cfg)
        engine = build_engine(cfg, batch_plan(cfg, world()), ranks, n_sources=N_SOURCES, image_token_id=PLACEHOLDER)
    finally:
        pretrained.prepare_weights = plain_prepare
    named = dict(engine.model.named_parameters())
    for group in engine.deepspeed.optimizer.param_groups:
        group["lr"] = 1e-3
    worst = {"grad": 0.0, "norm": 0.0}
    compared = [*range(2 * ROUND), *range(steps // 2, steps // 2 + ROUND), *range(steps - ROUND, steps)]
    for number in range(steps):
        if number in compared:  # at the weights that the engine has by now
            for name, parameter in oracle.named_parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
                with gather_for_reading([named[name]]), torch.no_grad():
                    parameter.copy_(named[name])
            terms = oracle(both[number % ROUND])
            ((terms.text_sum + terms.image_sum) / 50).backward()
        terms = engine.deepspeed(batches[rank()][number % ROUND])
        engine.deepspeed.backward((terms.text_sum + terms.image_sum) / 50 * world(), scale_wrt_gas=False)
        if number in compared:
            norm = float(torch.nn.utils.get_total_norm([p.grad for _, p in trained]))
            for name, parameter in trained:
                mine = engine.deepspeed.optimizer.get_local_fp32_grad_for_param(named[name]).flatten()
                start = named[name].ds_tensor.numel() * rank()
                expected = parameter.grad.flatten()[start : start + mine.numel()]
                scale = max(float(parameter.grad.abs().max()), 1e-3 * norm)
                if len(expected):
                    worst["grad"] = max(worst["grad"], float((mine[: len(expected)] - expected).abs().max()) / scale)
        engine.deepspeed.step()
        if number in compared:
            worst["norm"] = max(worst["norm"], abs(float(engine.deepspeed.get_global_grad_norm()) - norm) / norm)
    return {"steps": steps, "compared": len(compared), **worst}


def turns(*, data: str, run_dir: str) -> dict:
    """What the others get from a turn of rank 0 that outlasts the collective timeout, from one that fails, and
    (last) from one that never comes back."""
    import jp_train.engine.main_first as main_first

    ranks = init_process_group(make(data, run_dir, **{"engine.collective_timeout_s": 2.0}))
    told: dict[str, Any] = {}

    def fail() -> None:
        raise DataError("shard x.tar: cannot be read")

    began = time.monotonic()
    told["long"] = main_first.main_first(ranks, lambda: (time.sleep(5.0), "built")[1] if ranks.is_main else "found")
    told["waited"] = time.monotonic() - began
    try:
        main_first.main_first(ranks, fail if ranks.is_main else dict)
    except DataError as error:
        told["failed"] = str(error)
    main_first.SILENT_S = 1.0
    Path(run_dir).mkdir(exist_ok=True, parents=True)
    Path(run_dir, f"pid.{rank()}").write_text(str(os.getpid()))
    dist.barrier()
    try:
        main_first.main_first(ranks, lambda: os.kill(os.getpid(), signal.SIGSTOP) if ranks.is_main else None)
    except LaunchError as error:
        told["frozen"] = str(error)
        os.kill(int(Path(run_dir, "pid.0").read_text()), signal.SIGKILL)
    return told


SCENARIOS = {
    "turns": turns,
    "train": train,
    "planted": planted,
    "signalled": signalled,
    "spiked": spiked,
    "gate": gate,
    "leaked": leaked,
    "lopsided": lopsided,
}


def run(folder: Path, scenarios: list[dict[str, Any]]) -> int:
    session.leave_process_group = lambda code: None  # the next scenario needs it
    return run_scenarios(SCENARIOS, folder, scenarios)


if __name__ == "__main__":
    serve(run)
