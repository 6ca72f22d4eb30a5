"""Which device a rank computes on: the GPU of its number, or the CPU where the host has none or DS_ACCELERATOR=cpu says
so. The only place that decides it.

A driver that is older than torch's CUDA build makes `torch.cuda.is_available()` False on a host full of GPUs; training
would go on, on the CPU, without a word. So the driver's device files are asked too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from jp_train.config.schema import A100_TFLOPS
from jp_train.errors import ConfigError, JpTrainError, LaunchError
from jp_train.files import has_gpu_files

PEAK_TFLOPS = {"B200": 2250.0, "H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": A100_TFLOPS, "L40S": 362.0}
"""Dense bf16 arithmetic of a GPU by a part of its name, the more special one first (NVIDIA's data sheets)."""


def uses_gpu() -> bool:
    """Raises LaunchError on a host with GPUs that torch cannot use."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    if has_gpu_files():
        raise LaunchError(
            f"{socket.gethostname()} has GPUs, but torch {torch.__version__} (built for CUDA "
            f"{torch.version.cuda or 'none'}) cannot use them: {_why_not()}. Install a torch build that fits the "
            "driver (`nvidia-smi` names the newest CUDA it serves), or the driver that this build needs; "
            "DS_ACCELERATOR=cpu trains on the CPU"
        )
    return False


def rank_device(local_rank: int) -> torch.device:
    """The device of a rank, selected, and told to DeepSpeed, which must not have been imported yet.

    Raises LaunchError as `uses_gpu`, ConfigError when there are more local ranks than GPUs.
    """
    if not uses_gpu():
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible on {socket.gethostname()}; "
            "give the host as many slots in the hostfile as it has GPUs"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def peak_tflops(configured: float | None) -> float:
    """`logging.peak_tflops`, or what this rank's GPU can do by its name."""
    if configured is not None:
        return configured
    name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), A100_TFLOPS)


@contextmanager
def told_out_of_memory(rank: int) -> Iterator[None]:
    """A GPU that has too little memory becomes a JpTrainError that names the settings."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise JpTrainError(
            f"rank {rank} on {socket.gethostname()} is out of GPU memory: {str(error).strip()}. Less is needed with "
            "engine.activation_checkpointing=true, a smaller engine.micro_batch_rows, or "
            "engine.hpz_partition_size=1; `jp-train forecast` says what fits"
        ) from error


def be_deterministic() -> None:
    """Equal bits in every run on the same device and number of ranks (`engine.deterministic`). Before the first use of
    a GPU."""
    # cuBLAS: one of two workspaces with which its sums have a fixed order
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch._C._set_deterministic_fill_uninitialized_memory(False)  # costs time; nothing reads such memory


def _why_not() -> str:
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error).strip().partition("\n")[0].rstrip(".")
    return "the CUDA runtime finds no device (CUDA_VISIBLE_DEVICES?)"
