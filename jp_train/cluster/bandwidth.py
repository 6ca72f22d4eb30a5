"""An all-reduce with one process per host, and the rate at which every host sends and receives; run by each host's
probe, with torch.

The all-reduce shows what the whole cluster can do, but not which host limits it: every rank measures the time of the
slowest. So single links are measured too: each host sends to the next one of a ring and to the one after it, while
neither end of the link does anything else. The rate of a host in each direction is the better of its two links.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FIRST_BYTES = 64 << 10
LARGEST_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
LONG_ENOUGH_S = 0.05
"""Transfers grow until they take this long, so that waiting for a core or for the other end no longer counts."""
REPEATS = 3
TOO_LONG_S = 1.0
"""A transfer that takes this long is not repeated: the link is slow, and repeating it would show no more."""


def measure(rank: int, world: int, address: str, port: int, *, timeout_s: float, gpu: int | None) -> dict[str, Any]:
    """Rates of this host in bytes/s: `all_reduce` (bus bandwidth, what each host's link carries, measured with `bytes`
    each) and `sends` {receiving rank: rate}; `backend` that measured them.

    `gpu`: index of the GPU to use, for NCCL; None for gloo. Collective over `world` processes with ranks 0 to
    world - 1; rank 0 serves the rendezvous at `address:port`. Raises torch's DistError or RuntimeError when the others
    do not join within `timeout_s` seconds, or a transfer fails.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    backend = "gloo" if gpu is None else "nccl"
    torch.set_num_threads(1)
    if gpu is not None:
        torch.cuda.set_device(device)
    # torch.distributed has the name at run time only
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address, port, world, is_master=rank == 0, timeout=timedelta(seconds=timeout_s)
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    try:
        payload = torch.ones(LARGEST_BYTES[device.type], dtype=torch.uint8, device=device)
        size, seconds = _timed(partial(_all_reduce_s, payload), _slowest, len(payload))
        sends = {}
        for links in rounds(world):
            for sender, receiver in links:
                if rank == sender:
                    length, spent = _timed(partial(_send_s, payload, receiver), float, len(payload))
                    dist.send(_number(0, device), receiver)
                    sends[receiver] = length / spent
                elif rank == receiver:
                    _receive(payload, sender)
        dist.barrier()
        return {
            "backend": backend,
            "bytes": size,
            "all_reduce": 2 * (world - 1) / world * size / seconds,
            "sends": sends,
        }
    finally:
        dist.destroy_process_group()


def rounds(world: int) -> list[list[tuple[int, int]]]:
    """The links (sender, receiver) of a ring with neighbours at distance 1 and 2, grouped into rounds in which no rank
    takes part in two links."""
    links = [(rank, (rank + shift) % world) for shift in range(1, min(3, world)) for rank in range(world)]
    disjoint: list[list[tuple[int, int]]] = []
    for link in links:
        free = next((group for group in disjoint if not {end for other in group for end in other} & set(link)), None)
        if free is None:
            disjoint.append([link])
        else:
            free.append(link)
    return disjoint


def host_rates(names: Sequence[str], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{host: {"sends", "receives"}} in bytes/s: the better of two neighbours in each direction, so that one slow host
    does not make its neighbours look slow.

    `names`: the host of each rank; `measured`: what `measure` returned on each host (through JSON, which makes ranks
    text).
    """
    links = {
        (name, names[int(receiver)]): float(rate)
        for name in names
        for receiver, rate in measured[name]["sends"].items()
    }
    return {
        name: {
            "sends": max(rate for (sender, _), rate in links.items() if sender == name),
            "receives": max(rate for (_, receiver), rate in links.items() if receiver == name),
        }
        for name in names
    }


def _timed(action: Callable[[int], float], agreed: Callable[[float], float], largest: int) -> tuple[int, float]:
    """(bytes, seconds) of `action(bytes)` at a size that takes LONG_ENOUGH_S, the best of REPEATS. `agreed` turns the
    local time into one on which all processes base the same decision."""
    length = FIRST_BYTES
    action(length)  # connections are made
    while (longest := agreed(best := action(length))) < LONG_ENOUGH_S and length < largest:
        length = min(largest, length * 4)
    for _ in range(REPEATS - 1 if longest < TOO_LONG_S else 0):
        best = min(best, action(length))
    return length, best


def _slowest(seconds: float) -> float:
    import torch
    import torch.distributed as dist

    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    longest = torch.tensor([seconds], dtype=torch.float64, device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def _all_reduce_s(payload: torch.Tensor, length: int) -> float:
    import torch.distributed as dist

    part = payload[:length]
    began = time.perf_counter()
    dist.all_reduce(part)
    _finish(part)
    return max(time.perf_counter() - began, 1e-9)


def _send_s(payload: torch.Tensor, receiver: int, length: int) -> float:
    """Seconds until the receiver has confirmed that it has everything: a sender is done when the kernel has its bytes,
    which says little about the link."""
    import torch.distributed as dist

    part = payload[:length]
    began = time.perf_counter()
    dist.send(_number(len(part), part.device), receiver)
    dist.send(part, receiver)
    dist.recv(_number(0, part.device), receiver)
    _finish(part)
    return max(time.perf_counter() - began, 1e-9)


def _receive(payload: torch.Tensor, sender: int) -> None:
    """The other end of `_send_s`, until a length of 0 comes."""
    import torch.distributed as dist

    while True:
        length = _number(0, payload.device)
        dist.recv(length, sender)
        if not int(length):
            return
        dist.recv(payload[: int(length)], sender)
        _finish(payload)
        dist.send(_number(1, payload.device), sender)


def _number(value: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor([value], dtype=torch.int64, device=device)


def _finish(tensor: torch.Tensor) -> None:
    """Wait for the device."""
    import torch

    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
