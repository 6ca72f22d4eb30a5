"""Slices of parameters in files, and files that are not what they should be."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from jp_train.errors import CheckpointError
from jp_train.model.partition_files import (
    INDEX_FILE,
    Parameter,
    PartitionReader,
    ShardReader,
    StreamedShard,
    index_text,
    rank_file,
    shard_bytes,
    write_shard,
)


def test_safetensors_reads_what_is_written_at_once_and_tensor_by_tensor(tmp_path):
    tensors = [("a", torch.arange(6).view(2, 3)), ("b", torch.randn(5).bfloat16()), ("c", torch.zeros(0))]
    written = write_shard(tmp_path / "whole.safetensors", tensors)
    assert written["size"] == shard_bytes(tensors) == (tmp_path / "whole.safetensors").stat().st_size
    stream = StreamedShard(tmp_path / "stream.safetensors")
    for name, tensor in tensors:
        stream.add(name, tensor)
    stream.close()
    for file in ("whole.safetensors", "stream.safetensors"):
        read = load_file(tmp_path / file)
        assert {name: (t.dtype, t.tolist()) for name, t in read.items()} == {
            name: (t.dtype, t.tolist()) for name, t in tensors
        }


@pytest.mark.parametrize("shape", ((5, 7), (3,), (1,), (2, 3, 2)))
@pytest.mark.parametrize("world", (1, 2, 3, 5, 8))
def test_any_range_of_a_parameter_is_read_back_from_the_slices_of_any_number_of_ranks(shape, world, tmp_path):
    """Sizes that the ranks do not divide, and more ranks than elements, so that some hold nothing."""
    parameter = Parameter(name="p", shape=shape, trained=True)
    whole = torch.randn(parameter.numel)
    index = index_text([parameter], world=world, with_frozen=False, optimizer_step=1)
    (tmp_path / INDEX_FILE).write_text(index)
    spans = [parameter.span(rank, world) for rank in range(world)]
    assert [start for start, _ in spans] == [0, *[stop for _, stop in spans[:-1]]] and spans[-1][1] == parameter.numel
    for rank, (start, stop) in enumerate(spans):
        write_shard(tmp_path / rank_file(rank), [("master/p", whole[start:stop])] if stop > start else [])
    reader = PartitionReader(tmp_path)
    assert torch.equal(reader.whole("p"), whole.view(shape))
    for start in range(parameter.numel + 1):
        for stop in range(start, parameter.numel + 1):
            assert torch.equal(reader.read("master", "p", start, stop), whole[start:stop]), (start, stop)
    reader.close()


@pytest.mark.parametrize(
    "fault", ("header length", "not JSON", "offsets outside", "unknown dtype", "cut inside a tensor")
)
def test_a_foreign_or_cut_file_is_refused_without_reading_past_it(fault, tmp_path):
    path = tmp_path / "rank_00000.safetensors"
    write_shard(path, [("master/p", torch.arange(8.0))])
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    made = {
        "header length": b"\xff" * 8 + data[8:],
        "not JSON": data[:8] + b"x" + data[9:],
        "offsets outside": data[:8] + header.replace(b"[0,32]", b"[0,64]") + data[8 + length :],
        "unknown dtype": data[:8] + header.replace(b"F32", b"Q32") + data[8 + length :],
        "cut inside a tensor": data[:-4],
    }
    path.write_bytes(made[fault])
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors"):
        ShardReader(path).read("master/p")
