from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from jp_train.model import attention
from jp_train.model.attention import packed_attention

BOUNDS = [0, 1, 6, 13]


def tensors(kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    heads = (4, kv_heads, kv_heads)
    q, k, v = (torch.randn(1, h, BOUNDS[-1], 8, generator=g) for h in heads)
    return q, k, v, torch.tensor(BOUNDS, dtype=torch.int32)


def masked_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Dense softmax attention under a block-diagonal causal mask, written out."""
    document = torch.tensor([i for i in range(len(BOUNDS) - 1) for _ in range(BOUNDS[i + 1] - BOUNDS[i])])
    index = torch.arange(BOUNDS[-1])
    allowed = (document[:, None] == document[None]) & (index[:, None] >= index[None])
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_packed_attention_is_block_diagonal_causal_attention(kv_heads: int) -> None:
    q, k, v, cu = tensors(kv_heads)
    out, weights = packed_attention(nn.Module(), q, k, v, None, scaling=0.3, cu_seqlens=cu, max_seqlen=7)
    assert weights is None
    torch.testing.assert_close(out, masked_reference(q, k, v, 0.3), rtol=1e-5, atol=1e-6)


def test_calls_that_would_mix_documents_are_refused() -> None:
    q, k, v, cu = tensors()
    with pytest.raises(ValueError, match="without cu_seqlens"):
        packed_attention(nn.Module(), q, k, v, None)
    with pytest.raises(ValueError, match="mask set"):
        packed_attention(nn.Module(), q, k, v, torch.ones(1), cu_seqlens=cu, max_seqlen=7)
    with pytest.raises(ValueError, match="batch size 2"):
        packed_attention(nn.Module(), *(x.repeat(2, 1, 1, 1) for x in (q, k, v)), None, cu_seqlens=cu, max_seqlen=7)


def test_the_cuda_path_hands_the_kernel_causal_packed_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: the kernel is replaced by a reference that checks what the real one documents about its
    arguments."""
    q, k, v, cu = tensors()

    def kernel(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert query.shape == (BOUNDS[-1], 4, 8)
        assert query.is_contiguous() and key.is_contiguous() and value.is_contiguous()
        assert cu_q is cu_k and cu_q.dtype is torch.int32
        assert (max_q, max_k, window_size, enable_gqa) == (7, 7, (-1, 0), False)
        parts = []
        for start, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
            part = (x[None, start:end].transpose(1, 2) for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(*part, is_causal=True, scale=scale)[0].transpose(0, 1))
        return torch.cat(parts)

    expected, _ = packed_attention(nn.Module(), q, k, v, None, scaling=0.3, cu_seqlens=cu, max_seqlen=7)
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "uses_varlen_kernel", lambda _: True)
    out, _ = packed_attention(nn.Module(), q, k, v, None, scaling=0.3, cu_seqlens=cu, max_seqlen=7)
    torch.testing.assert_close(out, expected)


def test_the_real_kernel_accepts_the_arguments_on_fake_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own shape function of varlen_attn runs, though no kernel does."""
    monkeypatch.setattr(attention, "uses_varlen_kernel", lambda _: True)
    with FakeTensorMode():
        q = torch.empty(1, 4, 13, 8, dtype=torch.bfloat16)
        out, _ = packed_attention(
            nn.Module(), q, q, q, None, scaling=0.3, cu_seqlens=torch.zeros(4, dtype=torch.int32), max_seqlen=7
        )
        assert out.shape == (1, 13, 4, 8)
        assert out.dtype is torch.bfloat16


def test_the_switch_takes_the_kernel_only_for_half_precision_on_cuda() -> None:
    assert not attention.uses_varlen_kernel(torch.empty(1, dtype=torch.bfloat16))
    with FakeTensorMode():
        assert attention.uses_varlen_kernel(torch.empty(1, device="cuda", dtype=torch.bfloat16))
        assert not attention.uses_varlen_kernel(torch.empty(1, device="cuda", dtype=torch.float32))
