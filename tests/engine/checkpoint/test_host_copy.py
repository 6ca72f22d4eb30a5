"""Tensors copied to host memory, while the originals change."""

from __future__ import annotations

import torch

from jp_train.engine.checkpoint.host_copy import HostCopy


def test_copies_keep_values_shapes_and_dtypes_while_the_originals_change() -> None:
    originals = [
        ("odd", torch.arange(7, dtype=torch.uint8)),
        ("master", torch.randn(3, 5)),
        ("transposed", torch.randn(4, 6).t()),
        ("half", torch.randn(9).bfloat16()),
        ("empty", torch.zeros(0, 3)),
    ]
    expected = [(name, tensor.clone()) for name, tensor in originals]
    copies = HostCopy().take(originals)
    for _, tensor in originals:
        tensor.zero_()
    for (name, copy), (_, value) in zip(copies, expected, strict=True):
        assert copy.dtype == value.dtype and torch.equal(copy, value), name


def test_the_memory_of_a_copy_is_used_again_for_the_next() -> None:
    host = HostCopy()
    ((_, first),) = host.take([("a", torch.full((100,), 1.0))])
    ((_, second),) = host.take([("b", torch.full((50,), 2.0))])
    assert second.data_ptr() == first.data_ptr() and first[:50].tolist() == [2.0] * 50
    ((_, larger),) = host.take([("c", torch.full((5000,), 3.0))])
    assert larger.tolist() == [3.0] * 5000
