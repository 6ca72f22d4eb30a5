"""What a rank computes on; of GPUs as much as a machine without one can show."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from jp_train import files
from jp_train.config.schema import A100_TFLOPS
from jp_train.engine.device import PEAK_TFLOPS, peak_tflops, rank_device, told_out_of_memory, uses_gpu
from jp_train.errors import JpTrainError, LaunchError

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="about hosts where CUDA cannot start")


@pytest.fixture
def gpu_files(tmp_path, monkeypatch):
    """A driver's device file, which this machine may lack."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(files, "GPU_FILES", (tmp_path / "nvidiactl",))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)


@no_cuda
def test_a_host_with_gpus_that_torch_cannot_use_does_not_train_on_its_cpu(gpu_files):
    with pytest.raises(LaunchError) as error:
        rank_device(0)
    assert "Torch not compiled with CUDA enabled" in str(error.value), "torch's own reason"
    assert "nvidia-smi" in str(error.value) and "DS_ACCELERATOR=cpu" in str(error.value)


@no_cuda
def test_a_user_who_wants_the_cpu_gets_it_on_any_host(gpu_files, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert rank_device(7) == torch.device("cpu")


@no_cuda
def test_a_host_without_gpus_trains_on_its_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "GPU_FILES", (tmp_path / "nvidiactl",))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert not uses_gpu()


def test_the_peak_is_the_configured_one_or_that_of_the_gpus_name():
    assert peak_tflops(100.0) == 100.0
    if not torch.cuda.is_initialized():
        assert peak_tflops(None) == A100_TFLOPS
    names = {"NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA H100 PCIe": 756.0, "NVIDIA H100 80GB HBM3": 989.4}
    for name, peak in names.items():
        assert next(value for part, value in PEAK_TFLOPS.items() if part in name) == peak


def test_a_gpu_without_enough_memory_names_rank_and_settings():
    message = r"rank 3 on .* is out of GPU memory: tried 2 GiB\. .*micro_batch_rows"
    with pytest.raises(JpTrainError, match=message), told_out_of_memory(3):
        raise torch.OutOfMemoryError("tried 2 GiB")


def test_deterministic_algorithms_are_on_before_the_first_operation():
    script = (
        "import os, torch; from jp_train.engine.device import be_deterministic; be_deterministic();"
        "print(torch.are_deterministic_algorithms_enabled(), os.environ['CUBLAS_WORKSPACE_CONFIG'],"
        "torch._C._get_deterministic_fill_uninitialized_memory())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", ":4096:8", "False"]
