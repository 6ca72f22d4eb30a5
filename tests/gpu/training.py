"""Checks of training that a number decides: equal bits, equal losses, skipped steps, saved ones."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from jp_train.config import RunConfig, save_config
from jp_train.config.choices import Precision
from jp_train.engine.checkpoint.partitions import local_slices
from jp_train.engine.checkpoint.saver import Saver
from jp_train.engine.checkpoint.store import CheckpointStore
from jp_train.engine.objective import count_supervised, micro_batch_loss
from jp_train.model import freeze
from jp_train.model.janus_pro import JanusPro
from jp_train.model.pretrained import prepare_weights
from jp_train.model.vq import VQTokenizer
from jp_train.train.trainer import Trainer
from tests.distributed import wait_for
from tests.engine.tiny_run import tiny_run, write_data
from tests.gpu.findings import Findings
from tests.gpu.scene import IMAGE_TOKEN, ROOT, Scene, deterministic, rows_of, step, without_rank

CLOSE = {"fp32": (1e-5, 1e-4), "bf16": (1e-2, 5e-2)}
"""Loss and gradient norm of a device against float32 in plain PyTorch, as shares."""
START_S, STOP_S = 45.0, 15.0


def digest(trainer: Trainer) -> str:
    """Of every weight, master weight and moment."""
    whole = hashlib.sha256()
    for name, values in local_slices(trainer.engine.deepspeed, with_frozen=True):
        whole.update(name.encode())
        whole.update(values.detach().to("cpu", torch.float32, copy=True).numpy().tobytes())
    return whole.hexdigest()[:16]


def losses_and_digest(scene: Scene, cfg: RunConfig, steps: int) -> tuple[list[float], str]:
    """Losses and gradient norms of a few steps from fresh weights, and what the weights have become."""
    trainer, batches = scene.trainer(cfg), rows_of(cfg)
    numbers = []
    for _ in range(steps):
        values = step(trainer, batches).values
        numbers += [values["loss/total"], values["optim/grad_norm"]]
    return numbers, digest(trainer)


def determinism(scene: Scene, findings: Findings) -> None:
    """Two runs with `engine.deterministic` have the same bits; another seed has others."""
    with deterministic():
        first = losses_and_digest(scene, scene.small(3), 3)
        second = losses_and_digest(scene, scene.small(3), 3)
        other = scene.small(3)
        other.seed += 1
        third = losses_and_digest(scene, other, 3)
    findings.equal("losses and norms of a second run", second[0], first[0])
    findings.equal("weights of a second run", second[1], first[1])
    findings.equal("another seed gives the same", third == first, False)


def plain_step(cfg: RunConfig) -> tuple[float, float]:
    """Loss and gradient norm of the first step in float32 on the CPU: no DeepSpeed, no engine."""
    model = JanusPro(cfg.model, cfg.loss, 1, 0, IMAGE_TOKEN)
    vq = VQTokenizer(cfg.model.vq, cfg.model.vision.image_size)
    prepare_weights(model, vq, cfg.model, trainable=cfg.stage.trainable, seed=cfg.seed)
    freeze.set_trainable(model, cfg.stage.trainable)
    model.train()
    batches = rows_of(cfg)
    totals, loss = count_supervised(batches), 0.0
    for batch in batches:
        part = micro_batch_loss(model(batch), totals, cfg.loss)
        part.backward()
        loss += float(part.detach())
    squares = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    return loss, squares**0.5


def cpu_and_device(scene: Scene, findings: Findings) -> None:
    """The engine's first step in both precisions against plain float32 on the CPU, in all stages."""
    for stage in (1, 2, 3):
        loss, norm = plain_step(scene.small(stage, "fp32"))
        for precision, (loss_error, norm_error) in CLOSE.items():
            cfg = scene.small(stage, precision)
            exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
            with exact if scene.on_gpu and precision == "fp32" else nullcontext():
                values = step(scene.trainer(cfg), rows_of(cfg)).values
            findings.near(f"stage {stage} {precision} loss", values["loss/total"], loss, loss_error)
            findings.near(f"stage {stage} {precision} gradient norm", values["optim/grad_norm"], norm, norm_error)


def store_of(cfg: RunConfig) -> CheckpointStore:
    return CheckpointStore(Path(cfg.run_dir), cfg.checkpoint, dp_rank=0, dp_world_size=1)


def saver_of(trainer: Trainer) -> Saver:
    return Saver(trainer.cfg, store_of(trainer.cfg), trainer.engine, trainer.parts.log, saved_step=None)


def saved_then_trained(scene: Scene, cfg: RunConfig, findings: Findings) -> tuple[str, float, str]:
    """Two steps, a checkpoint, a third step: weights at the save, loss and weights of the third."""
    trainer, batches = scene.trainer(cfg), rows_of(cfg)
    for _ in range(2):
        step(trainer, batches)
    at_save = digest(trainer)
    began = time.perf_counter()
    saver_of(trainer).save(2, {"training": trainer.state.saved()}, {}, final=True)
    findings.beside("seconds of the save", time.perf_counter() - began)
    loss = step(trainer, batches).values["loss/total"]
    return at_save, loss, digest(trainer)


def save_restore(scene: Scene, findings: Findings) -> None:
    """An engine of other weights takes the checkpoint and makes the same third step, bit for bit."""
    cfg, again = scene.small(3), scene.small(3)
    again.seed += 1
    with deterministic():
        at_save, loss, after = saved_then_trained(scene, cfg, findings)
        trainer = scene.trainer(again)
        findings.equal("other weights before", digest(trainer) == at_save, False)
        found = store_of(cfg).newest(on_damage=findings.faults.append)
        assert found is not None, f"no checkpoint in {cfg.run_dir}"
        saver_of(trainer).restore(found)
        trainer.state.step = found.step
        findings.equal("weights and moments restored", digest(trainer), at_save)
        findings.equal("loss of the next step", step(trainer, rows_of(again)).values["loss/total"], loss)
        findings.equal("weights after it", digest(trainer), after)


def nan_step(scene: Scene, findings: Findings) -> None:
    """A loss that is NaN: named, skipped without a trace, and the next step is made."""
    cfg = scene.small(2)
    trainer, batches = scene.trainer(cfg), rows_of(cfg)
    step(trainer, batches)
    before, weight = digest(trainer), cfg.loss.text_weight
    cfg.loss.text_weight = float("nan")
    decision = step(trainer, batches).decision
    cfg.loss.text_weight = weight
    findings.equal("what is said", decision.what, "loss and grad norm not finite")
    findings.equal("update made", decision.applies, False)
    findings.equal("weights and moments afterwards", digest(trainer), before)
    following = step(trainer, batches)
    findings.equal("next update made", [following.decision.applies, following.decision.what], [True, ""])
    findings.equal("next update changes the weights", digest(trainer) != before, True)


def sigterm(scene: Scene, findings: Findings) -> None:
    """`jp-train train` on real shards gets SIGTERM: the step is finished and saved, exit status 143."""
    run_dir = scene.folder / "sigterm"
    cfg = tiny_run(write_data(scene.folder / "data"), run_dir, steps=1_000_000)
    cfg.precision = Precision.bf16 if scene.on_gpu else Precision.fp32
    save_config(cfg, scene.folder / "sigterm.yaml")
    command = [sys.executable, "-m", "jp_train", "train", str(scene.folder / "sigterm.yaml")]
    metrics = run_dir / "metrics.jsonl"
    with (scene.folder / "sigterm.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=without_rank(), stdout=log, stderr=log)
        try:
            began = time.monotonic()
            wait_for(lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 0), START_S)
            findings.beside("seconds to the first step", time.monotonic() - began)
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            findings.equal("exit status", process.wait(STOP_S), 143)
            findings.beside("seconds to the end", time.monotonic() - began)
        finally:
            process.kill()
            process.wait()
            print((scene.folder / "sigterm.log").read_text()[-3000:], file=sys.stderr)
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    findings.equal("newest checkpoint", (run_dir / "checkpoints" / "latest").read_text().strip(), f"step_{last:07d}")
    findings.beside("state", json.loads((run_dir / "status.json").read_text())["state"])
