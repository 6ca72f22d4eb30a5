"""Causal self-attention over packed documents, registered with transformers as ``jp_train_packed``.

Llama reaches it through ``config._attn_implementation``; ``cu_seqlens`` and ``max_seqlen`` arrive as keyword arguments
of ``LlamaModel.forward``. No mask tensor is ever built: the boundaries alone isolate the documents. (With transformers'
own implementations, restarting ``position_ids`` do not isolate documents as soon as a mask or a cache is present.)

Shapes: T tokens of the micro-batch, H query heads, K key/value heads, C channels a head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

PACKED_ATTENTION = "jp_train_packed"
"""Name under which the function is registered with transformers."""

VARLEN_DTYPES = (torch.bfloat16, torch.float16)
"""What the CUDA kernel of ``torch.nn.attention.varlen`` accepts; fp32 on CUDA takes the exact loop."""


def uses_varlen_kernel(query: torch.Tensor) -> bool:
    """The one switch between the CUDA kernel and the exact per-document loop.  The kernel path has not been run on a
    GPU here."""
    return query.is_cuda and query.dtype in VARLEN_DTYPES


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each document to itself, in transformers' attention-function signature.

    Args:
        query: ``[1, H, T, C]``; key and value ``[1, K, T, C]`` with K dividing H.
        cu_seqlens: int32 ``[segments + 1]``, from 0 to T; a segment is a document (or a row with ``packing: causal``).
        max_seqlen: longest segment in tokens, a plain int.

    Returns:
        ``[1, T, H, C]`` and None (no attention weights).

    Raises:
        ValueError: without ``cu_seqlens`` (documents would see each other), with a mask, with dropout, or with more
        than one row.
    """
    if cu_seqlens is None or max_seqlen is None:
        raise ValueError(
            f"{PACKED_ATTENTION} was called without cu_seqlens and max_seqlen: documents would see each other. Pass "
            "both to the language model's forward, or set its attention implementation to 'sdpa' for inference"
        )
    if attention_mask is not None or dropout != 0.0 or query.shape[0] != 1:
        raise ValueError(
            f"{PACKED_ATTENTION} takes one packed sequence, no mask and no dropout; got batch size {query.shape[0]}, "
            f"mask {'set' if attention_mask is not None else 'none'}, dropout {dropout}"
        )
    attend = _varlen_attention if uses_varlen_kernel(query) else _document_loop
    out = attend(query[0], key[0], value[0], cu_seqlens, max_seqlen, scaling)
    return out.unsqueeze(0), None


def _document_loop(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float | None,
) -> torch.Tensor:
    """Exact: one causal SDPA a document.  ``[H|K, T, C]`` in, ``[T, H, C]`` out."""
    bounds = cu_seqlens.tolist()
    grouped = query.shape[0] != key.shape[0]
    parts = []
    for start, end in pairwise(bounds):
        q, k, v = (x[None, :, start:end] for x in (query, key, value))
        part = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=grouped)
        parts.append(part[0].transpose(0, 1))
    return torch.cat(parts)


def _varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    scaling: float | None,
) -> torch.Tensor:
    """The fused kernel over all documents at once.  ``[H|K, T, C]`` in, ``[T, H, C]`` out; window (-1, 0) is causal."""
    q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scaling, window_size=(-1, 0), enable_gqa=grouped
    )
    assert isinstance(out, torch.Tensor)  # a pair only where return_aux asks for it
    return out


# no mask function with it: transformers then makes no mask, without reading position_ids back from the GPU
AttentionInterface.register(PACKED_ATTENTION, packed_attention)
