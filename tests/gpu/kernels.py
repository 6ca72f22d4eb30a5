"""Checks without an engine: versions and device, packed attention, VQ encoding."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from importlib.metadata import version
from inspect import signature
from itertools import accumulate, pairwise

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from jp_train.engine.device import uses_gpu
from jp_train.files import has_gpu_files
from jp_train.model.attention import packed_attention
from jp_train.model.pretrained import load_vq
from jp_train.tools.forecast.activations import vq_encoding
from jp_train.tools.forecast.hardware import GIB
from jp_train.tools.forecast.shapes import MicroBatch, shapes_of
from tests.gpu.findings import Findings
from tests.gpu.scene import ROOT, Scene, deterministic, forget_peaks

LENGTHS = {"tiny": (1, 7, 128, 83), "1b": (1, 7, 128, 576 + 43, 4096)}
"""Documents in tokens; 576 + k is an image and its words."""
HEADS = {"tiny": ((2, 16), (4, 16)), "1b": ((16, 128), (32, 128))}
"""Heads and channels a head: of the 1B and of the 7B model."""
ERRORS = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
"""Of a document's largest value. torch's own attention in bfloat16, document by document, is at 1.1e-2 on a CPU."""
CHANGED = 2
"""The document that `isolation` changes."""


def environment(scene: Scene, findings: Findings) -> None:
    """The pinned packages, a driver that serves this torch, and the arguments that the attention kernel must take."""
    pins = re.findall(r"^ {4}(torch|deepspeed|transformers)==(\S+)$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    for name, pinned in pins:
        findings.equal(name, version(name).partition("+")[0], pinned)
    findings.equal("GPU files present, GPU used", [has_gpu_files(), uses_gpu()], [scene.on_gpu] * 2)
    missing = {"scale", "window_size", "enable_gqa"} - set(signature(varlen_attn).parameters)
    findings.equal("arguments that varlen_attn lacks", sorted(missing), [])
    findings.equal("1 + 1 on the device", float(torch.ones(2, device=scene.device).sum()), 2.0)
    findings.beside("device", torch.cuda.get_device_name() if scene.on_gpu else "CPU", scene.hardware.gpu)
    findings.beside("CUDA of torch", torch.version.cuda)


Tensors = tuple[torch.Tensor, ...]


def attention_inputs(scene: Scene, heads: int, channels: int) -> Tensors:
    """Query, key, value ``[1, H, T, C]`` and the gradient of the output ``[1, T, H, C]``."""
    tokens = sum(LENGTHS[scene.size])
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, channels)] * 3 + [(1, tokens, heads, channels)]
    return tuple(torch.randn(shape, generator=generator).to(scene.device, scene.dtype) for shape in shapes)


def packed(inputs: Tensors, lengths: Sequence[int], *, checkpointed: bool = False) -> Tensors:
    """Output of the model's attention and the gradients of query, key and value, each ``[T, H, C]``."""
    *given, grad = inputs
    q, k, v = (x.clone().requires_grad_() for x in given)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=q.device)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return packed_attention(nn.Module(), *qkv, None, cu_seqlens=bounds, max_seqlen=max(lengths))[0]

    out = checkpoint(attend, q, k, v, use_reentrant=False) if checkpointed else attend(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), grad)
    return (out.detach()[0], *(x[0].transpose(0, 1) for x in grads))


def written_out(inputs: Tensors, lengths: Sequence[int]) -> Tensors:
    """The same in float64 by the definition, document by document."""
    *given, grad = (x.double() for x in inputs)
    q, k, v = (x[0].clone().requires_grad_() for x in given)
    parts = []
    for start, end in pairwise([0, *accumulate(lengths)]):
        scores = q[:, start:end] @ k[:, start:end].mT / q.shape[-1] ** 0.5
        later = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu(1)
        parts.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v[:, start:end])
    out = torch.cat(parts, 1).transpose(0, 1)
    grads = torch.autograd.grad(out, (q, k, v), grad[0])
    return (out.detach(), *(x.transpose(0, 1) for x in grads))


def largest_error(found: Tensors, oracle: Tensors, lengths: Sequence[int]) -> dict[str, float]:
    """Of each tensor over its documents, as a share of a document's largest value."""
    errors = {}
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), found, oracle, strict=True):
        floor = 0.01 * float(theirs.abs().max())  # the gradients of a document of one token are zero
        errors[name] = max(
            float((a.double() - b).abs().max()) / max(float(b.abs().max()), floor)
            for a, b in zip(mine.split(list(lengths)), theirs.split(list(lengths)), strict=True)
        )
    return errors


def attention(scene: Scene, findings: Findings) -> None:
    """Packed attention and its gradients against their definition in float64, with and without checkpointing."""
    lengths = LENGTHS[scene.size]
    for heads, channels in HEADS[scene.size]:
        inputs = attention_inputs(scene, heads, channels)
        oracle = written_out(inputs, lengths)
        for checkpointed in (False, True):
            errors = largest_error(packed(inputs, lengths, checkpointed=checkpointed), oracle, lengths)
            for name, error in errors.items():
                how = f"{heads} heads, {'checkpointed, ' if checkpointed else ''}error of {name}"
                findings.at_most(how, error, ERRORS[scene.dtype])


def isolation(scene: Scene, findings: Findings) -> None:
    """Another document changes no bit of a document: neither of its output nor of its gradients."""
    lengths = LENGTHS[scene.size]
    for heads, channels in HEADS[scene.size]:
        inputs = attention_inputs(scene, heads, channels)
        start = sum(lengths[:CHANGED])
        there = slice(start, start + lengths[CHANGED])
        with deterministic():  # else the kernel adds dQ in any order
            before = packed(inputs, lengths)
            for x in inputs[:3]:
                x[:, :, there] += 1.0 + x[:, :, there].sin()
            inputs[3][:, there] *= 2
            after = packed(inputs, lengths)
        for name, old, new in zip(("out", "dq", "dk", "dv"), before, after, strict=True):
            same = (old == new).flatten(1).all(1)
            changed = int((~same).sum()) - int((~same[there]).sum())
            findings.equal(f"{heads} heads, tokens of other documents that change in {name}", changed, 0)
            findings.at_least(f"{heads} heads, tokens of the document that change in {name}", int((~same).sum()), 100)


def vq(scene: Scene, findings: Findings) -> None:
    """Eight images together on the device against two of them one by one on the CPU; time and memory."""
    cfg = scene.large(2)
    tokenizer = load_vq(cfg.model, seed=0)
    side = cfg.model.vision.image_size
    images = torch.randint(0, 256, (8, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = tokenizer.encode(images[:2], at_once=1)
    tf32 = torch.backends.cudnn.allow_tf32
    tokenizer.to(scene.device)
    shown = images.to(scene.device)
    tokenizer.encode(shown)
    forget_peaks()
    before = torch.cuda.memory_allocated() if scene.on_gpu else 0
    began = time.perf_counter()
    ids = tokenizer.encode(shown).cpu()
    findings.beside("seconds of 8 images", time.perf_counter() - began)
    findings.at_least("share of equal ids", float((ids[:2] == expected).double().mean()), 0.99)
    findings.at_least("different ids", len(ids.unique()), 2)
    findings.equal("TF32 of other convolutions afterwards", torch.backends.cudnn.allow_tf32, tf32)
    batch = MicroBatch(tokens=0, und_images=0, gen_images=8, text_positions=0, image_positions=0, encoded_images=8)
    peak = (torch.cuda.max_memory_allocated() - before) / GIB if scene.on_gpu else None
    findings.beside("peak GiB", peak, vq_encoding(shapes_of(cfg), batch) / GIB)
