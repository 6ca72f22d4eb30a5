"""An all-reduce over one process a host, and what every host sends and receives: run by each host's probe, with torch.

The all-reduce says what the whole cluster can do, and nothing of who holds it back: every rank sees the time of the slowest. So each host also sends to
the next one of a ring, and to the one after it; a host is as fast as its better neighbour lets it be, in each direction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

FIRST_BYTES = 64 << 10
LARGEST_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
LONG_ENOUGH_S = 0.05
"""A measurement this long is not made longer."""
REPEATS = 3


def measure(rank: int, world: int, address: str, port: int, *, timeout_s: float, use_gpu: bool) -> dict[str, Any]:
    """Bytes a second of this host: `all_reduce` (bus bandwidth: what each host's link carries) and `receives`
    {sending rank: bytes/s}.

    Collective over `world` processes with ranks 0 to world - 1; rank 0 serves the rendezvous at `address:port`. Raises torch's DistError or
    RuntimeError when the others do not come within `timeout_s` seconds, or the collective fails.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", 0) if use_gpu else torch.device("cpu")
    backend = "nccl" if use_gpu else "gloo"
    torch.set_num_threads(1)
    store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timedelta(seconds=timeout_s))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s))
    try:
        payload = torch.ones(LARGEST_BYTES[device.type] // 4, device=device)
        clock = _Clock(device)
        size, seconds = _lengthened(clock, payload, lambda part: dist.all_reduce(part))
        found: dict[str, Any] = {"backend": backend, "bytes": size, "all_reduce": 2 * (world - 1) / world * size / seconds}
        shifts = range(1, min(3, world))
        found["receives"] = {
            (rank - shift) % world: _ring(clock, payload, (rank + shift) % world, (rank - shift) % world) for shift in shifts
        }
        dist.barrier()
        return found
    finally:
        dist.destroy_process_group()


class _Clock:
    """Seconds of an action, the device's work included."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def time(self, action: Any) -> float:
        import torch

        began = time.perf_counter()
        action()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return max(time.perf_counter() - began, 1e-9)

    def slowest(self, seconds: float) -> float:
        """The largest of all ranks, so that all decide alike."""
        import torch
        import torch.distributed as dist

        told = torch.tensor([seconds], dtype=torch.float64, device=self._device)
        dist.all_reduce(told, op=dist.ReduceOp.MAX)
        return float(told)


def _lengthened(clock: _Clock, payload: Any, action: Any) -> tuple[int, float]:
    """(bytes, seconds) of `action` on as much of `payload` as takes LONG_ENOUGH_S, the best of REPEATS."""
    elements = FIRST_BYTES // payload.element_size()
    action(payload[:elements])  # connections are made
    while True:
        seconds = clock.slowest(clock.time(lambda n=elements: action(payload[:n])))
        if seconds >= LONG_ENOUGH_S or elements == payload.numel():
            break
        elements = min(payload.numel(), elements * 4)
    again = [clock.slowest(clock.time(lambda: action(payload[:elements]))) for _ in range(REPEATS - 1 if seconds < 1 else 0)]
    return elements * payload.element_size(), min([seconds, *again])


def _ring(clock: _Clock, payload: Any, after: int, before: int) -> float:
    """Bytes/s received from rank `before`, while every rank sends to its rank `after`.

    The receiver's clock counts: a sender is done when the kernel has taken its bytes, which says little of the link.
    """
    import torch
    import torch.distributed as dist

    arrived = torch.empty_like(payload)

    def exchange(elements: int) -> float:
        began = time.perf_counter()
        if payload.device.type == "cuda":
            both = [dist.P2POp(dist.isend, payload[:elements], after), dist.P2POp(dist.irecv, arrived[:elements], before)]
            for work in dist.batch_isend_irecv(both):
                work.wait()
            torch.cuda.synchronize(payload.device)
            return time.perf_counter() - began
        sending, receiving = dist.isend(payload[:elements], after), dist.irecv(arrived[:elements], before)
        receiving.wait()
        seconds = time.perf_counter() - began
        sending.wait()
        return seconds

    elements = FIRST_BYTES // payload.element_size()
    exchange(elements)  # connections are made
    while (longest := clock.slowest(own := exchange(elements))) < LONG_ENOUGH_S and elements < payload.numel():
        elements = min(payload.numel(), elements * 4)
    for _ in range(REPEATS - 1 if longest < 1 else 0):
        own = min(own, exchange(elements))
    return elements * payload.element_size() / max(own, 1e-9)


def host_rates(names: Sequence[str], measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{host: {"sends", "receives"}} in bytes/s: the better of two neighbours in each direction, so that one slow host does not make its neighbours look slow.

    `names`: the host of each rank; `measured`: what `measure` returned on each host (through JSON, which makes ranks text).
    """
    links = {(names[int(sender)], name): float(rate) for name in names for sender, rate in measured[name]["receives"].items()}
    return {
        name: {
            "sends": max(rate for (sender, _), rate in links.items() if sender == name),
            "receives": max(rate for (_, receiver), rate in links.items() if receiver == name),
        }
        for name in names
    }
