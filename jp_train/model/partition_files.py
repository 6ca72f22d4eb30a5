"""The weights of a training checkpoint: one safetensors file per rank, and an index that says how every parameter is
cut.

ZeRO-3 cuts each parameter, flattened, into one slice a rank: slice r of W holds elements [r*n, (r+1)*n) with n =
ceil(numel / W), and what lies past the parameter's end is padding, which is not stored. A rank's file holds its slices
as one-dimensional tensors:

    master/NAME  exp_avg/NAME  exp_avg_sq/NAME     fp32 weights and moments of a trained parameter
    frozen/NAME                                    a frozen one, in the dtype of the run

So any range of any parameter is a few byte ranges of a few files: another number of ranks reads just what it needs, and
one process can read a whole parameter. Nothing here knows DeepSpeed or torch.distributed, and nothing is pickled.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from jp_train.errors import CheckpointError
from jp_train.files import BLOCK
from jp_train.model.weight_places import INDEX_FILE

MASTER, MOMENTS, FROZEN = "master", ("exp_avg", "exp_avg_sq"), "frozen"
MAX_HEADER = 100 << 20
STREAM_HEADER = 1 << 18
"""Room for the header of a file whose tensors come one by one: about 2000 names."""
OPEN_FILES = 256
"""Files of other ranks that a reader keeps open."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

NamedTensors = Sequence[tuple[str, torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of the model: its whole shape, and whether it is trained (and has master weights and moments)."""

    name: str
    shape: tuple[int, ...]
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def span(self, rank: int, world: int) -> tuple[int, int]:
        """First and past-the-last element that `rank` of `world` holds, without padding (may be empty)."""
        size = -(-self.numel // world)
        return min(rank * size, self.numel), min((rank + 1) * size, self.numel)


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def file_rank(name: str) -> int | None:
    """The rank whose file this is, None for a file of the whole run."""
    stem, _, ending = name.rpartition(".")
    return int(stem[5:]) if ending == "safetensors" and stem.startswith("rank_") and stem[5:].isdigit() else None


# -- writing ---------------------------------------------------------------------------------------


def shard_header(tensors: NamedTensors) -> bytes:
    """The head of a safetensors file with these tensors in this order; the file's size is its length plus the
    tensors' bytes."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors:
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def shard_bytes(tensors: NamedTensors) -> int:
    """Size of the file that `write_shard` makes."""
    return len(shard_header(tensors)) + sum(tensor.nbytes for _, tensor in tensors)


def write_shard(path: Path, tensors: NamedTensors) -> dict[str, Any]:
    """Write a safetensors file block by block and make it durable; {"size", "crc32"}, summed up while writing.

    Tensors on the CPU are written from where they are; others are copied one by one. Raises OSError.
    """
    # so that every tensor is aligned to its element's size
    tensors = sorted(tensors, key=lambda item: -item[1].element_size())
    size = crc = 0
    with path.open("xb") as file:
        parts = (_bytes_of(tensor.detach().to("cpu").contiguous()) for _, tensor in tensors)
        for view in itertools.chain((memoryview(shard_header(tensors)),), parts):
            for start in range(0, len(view), BLOCK):
                block = view[start : start + BLOCK]
                file.write(block)
                crc = zlib.crc32(block, crc)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "crc32": f"{crc:08x}"}


class StreamedShard:
    """A safetensors file whose tensors are given one by one, so that no more than one is in memory.

    The header's place is kept free and written last, filled up with spaces, which the format allows.
    """

    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self.size = 0
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = 2 + len(json.dumps(self._header))
        self._file = path.open("xb")
        self._file.seek(8 + STREAM_HEADER)

    def fits(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this tensor can come next: there is room in the header, and it would be aligned."""
        entry = len(json.dumps({name: self._entry(tensor)}))
        return self._header_bytes + entry < STREAM_HEADER and self.size % tensor.element_size() == 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (on the CPU, contiguous). Raises OSError."""
        self._header[name] = self._entry(tensor)
        self._header_bytes += len(json.dumps({name: self._header[name]}))
        self.names.append(name)
        view = _bytes_of(tensor)
        for start in range(0, len(view), BLOCK):
            self._file.write(view[start : start + BLOCK])
        self.size += tensor.nbytes

    def _entry(self, tensor: torch.Tensor) -> dict[str, Any]:
        return {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.size, self.size + tensor.nbytes],
        }

    def close(self) -> None:
        """Write the header. Raises OSError."""
        text = json.dumps(self._header).encode().ljust(STREAM_HEADER)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", STREAM_HEADER) + text)
        self._file.close()


def index_text(parameters: Sequence[Parameter], *, world: int, with_frozen: bool, optimizer_step: int) -> str:
    """The index beside the ranks' files. `optimizer_step`: updates that were made (skipped ones do not count)."""
    entries = [asdict(parameter) | {"shape": list(parameter.shape)} for parameter in parameters]
    text = json.dumps(
        {"world": world, "with_frozen": with_frozen, "optimizer_step": optimizer_step, "parameters": entries}
    )
    return text.replace('{"name"', '\n{"name"') + "\n"


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


# -- reading ---------------------------------------------------------------------------------------


class ShardReader:
    """One safetensors file, read by ranges of elements. Raises CheckpointError for a file whose header does not fit
    it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self._entries, self._start = self._header(path.stat().st_size)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error

    def _header(self, size: int) -> tuple[dict[str, tuple[torch.dtype, tuple[int, ...], int]], int]:
        (length,) = struct.unpack("<Q", self._file.read(8))
        if length > min(size, MAX_HEADER):
            raise ValueError(f"a header of {length} bytes")
        entries = {}
        for name, entry in json.loads(self._file.read(length)).items():
            if name == "__metadata__":
                continue
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            first, last = (int(n) for n in entry["data_offsets"])
            if not 0 <= first <= last <= size - 8 - length or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"tensor {name!r} does not fit the file")
            entries[name] = (dtype, shape, first)
        return entries, 8 + length

    def keys(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name)[1]

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name)[0]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU."""
        dtype, shape, first = self._entry(name)
        stop = math.prod(shape) if stop is None else stop
        if not 0 <= start <= stop <= math.prod(shape):
            raise CheckpointError(
                f"{self.path}: {name} has {math.prod(shape)} elements, {start} to {stop} were asked for"
            )
        out = torch.empty(stop - start, dtype=dtype)
        view = _bytes_of(out)
        try:
            self._file.seek(self._start + first + start * dtype.itemsize)
            done = 0
            while done < len(view) and (got := self._file.readinto(view[done : done + BLOCK])):
                done += got
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name} cannot be read: {error}") from error
        if done != len(view):
            raise CheckpointError(f"{self.path} ends inside {name}: the file is cut short")
        return out

    def _entry(self, name: str) -> tuple[torch.dtype, tuple[int, ...], int]:
        if name not in self._entries:
            raise CheckpointError(f"{self.path} holds no {name}: the index beside it names it")
        return self._entries[name]

    def close(self) -> None:
        self._file.close()


class PartitionReader:
    """All ranks' files of one checkpoint folder as whole parameters. Reads what is asked for, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX_FILE
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            self.world = int(index["world"])
            self.with_frozen = bool(index["with_frozen"])
            self.optimizer_step = int(index["optimizer_step"])
            entries = [
                Parameter(name=str(e["name"]), shape=tuple(e["shape"]), trained=bool(e["trained"]))
                for e in index["parameters"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a readable index of a checkpoint: {error}") from error
        self.parameters = {parameter.name: parameter for parameter in entries}
        self._open: OrderedDict[int, ShardReader] = OrderedDict()

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter's `kind` (MASTER, one of MOMENTS, FROZEN), on the CPU,
        from whichever files hold them."""
        parameter = self.parameters[name]
        size = max(1, -(-parameter.numel // self.world))
        pieces = []
        for rank in range(start // size, -(-stop // size)):
            first, last = parameter.span(rank, self.world)
            low, high = max(start, first), min(stop, last)
            if low < high:
                pieces.append(self._file(rank).read(f"{kind}/{name}", low - first, high - first))
        if not pieces:
            return torch.empty(0)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def whole(self, name: str) -> torch.Tensor:
        """A parameter in its own shape: the fp32 master weights of a trained one, the stored weights of a frozen
        one."""
        parameter = self.parameters[name]
        flat = self.read(MASTER if parameter.trained else FROZEN, name, 0, parameter.numel)
        return flat.view(parameter.shape)

    def _file(self, rank: int) -> ShardReader:
        if rank in self._open:
            self._open.move_to_end(rank)
        else:
            if len(self._open) >= OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[rank] = ShardReader(self.folder / rank_file(rank))
        return self._open[rank]

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
