"""What the cluster is taken to be: stated constants with their sources. Every field of `Hardware` can be overridden on
the command line.

Figures are rounded as their sources print them. TFLOP/s are dense bf16 (no sparsity); bandwidths are of one direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from jp_train.errors import ConfigError, one_of

GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One kind of cluster. `gpu` names the preset."""

    gpu: str
    memory_gib: float
    """What torch may allocate at most on an otherwise empty GPU."""
    peak_tflops: float
    """Dense bf16."""
    fp32_tflops: float = 19.5
    """Without TF32, in which the VQ tokenizer does not run (an id must not depend on the GPU)."""
    achievable: float = 0.55
    """Share of the peak that the kernels of a dense transformer reach, communication not counted. Megatron-LM on
    A100 (Narayanan et al. 2021, table 1) trains at 0.44 to 0.52 of the peak with its communication. Of four
    published rows of llm-foundry those at 1B come out within 2 %, those at 7B 17 % too slow, with kernels that fuse
    more than ours (tests/tools/forecast/test_timing.py)."""
    hbm_gbs: float = 1555.0
    """GB/s of the GPU's memory: the optimizer's update is bound by it."""
    intra_gbs: float = 300.0
    """GB/s per GPU to the other GPUs of its node."""
    inter_gbs: float = 200.0
    """GB/s per NODE to the other nodes, all adapters together."""
    link_efficiency: float = 0.75
    """Share of line rate that NCCL's large collectives reach: nccl-tests on DGX A100 print a bus bandwidth of 230 to
    240 of 300 GB/s inside a node."""
    host_speed: float = 1.0
    """Of a core that runs Python, in those that bench/host.py measured (host.py)."""
    latency_us: float = 25.0
    """Of one collective inside a node: launch and kernel."""
    hop_us: float = 5.0
    """Added to it by every further node (a ring passes them one after the other)."""
    cuda_context_gib: float = 0.45
    """Driver context and loaded kernels of a process: what nvidia-smi shows for one that has only made a tensor
    (A100, CUDA 12: 400 to 480 MiB)."""
    nccl_gib: float = 1.0
    """NCCL's own buffers, outside torch's allocator: some 0.2 to 0.5 GiB a communicator that spans nodes
    (NCCL_BUFFSIZE of 4 MiB x channels x peers and protocols, NCCL user guide), two with hpZ."""
    workspace_gib: float = 0.15
    """cuBLAS and cuDNN workspaces (torch gives cuBLAS 8 MiB a stream on A100, 32 MiB on H100)."""
    fragmentation: float = 0.08
    """Share of what is allocated that torch's caching allocator holds beyond it (reserved minus allocated); an
    assumption."""

    def overhead_gib(self, allocated_gib: float) -> float:
        """What a process takes of the GPU besides its tensors."""
        return self.cuda_context_gib + self.nccl_gib + self.workspace_gib + self.fragmentation * allocated_gib


PRESETS: dict[str, Hardware] = {
    "a100-40gb": Hardware(gpu="a100-40gb", memory_gib=39.4, peak_tflops=312.0),
    "a100-80gb": Hardware(gpu="a100-80gb", memory_gib=79.2, peak_tflops=312.0, hbm_gbs=2039.0),
    "a100-40gb-pcie": Hardware(
        gpu="a100-40gb-pcie", memory_gib=39.4, peak_tflops=312.0, intra_gbs=16.0, inter_gbs=25.0
    ),
    "h100": Hardware(
        gpu="h100",
        memory_gib=79.1,
        peak_tflops=989.4,
        fp32_tflops=67.0,
        achievable=0.5,
        hbm_gbs=3350.0,
        intra_gbs=450.0,
        inter_gbs=400.0,
    ),
    "h200": Hardware(
        gpu="h200",
        memory_gib=139.8,
        peak_tflops=989.4,
        fp32_tflops=67.0,
        achievable=0.5,
        hbm_gbs=4800.0,
        intra_gbs=450.0,
        inter_gbs=400.0,
    ),
}
"""Data sheets: A100 (312 TFLOP/s, 19.5 in fp32, 1555 and 2039 GB/s, NVLink 3 with 600 GB/s both ways), H100 SXM (989.4,
67, 3350, NVLink 4 with 900), H200 (4800). Links: DGX A100 has 8 x 200 Gb/s, DGX H100 and H200 8 x 400 Gb/s.
`a100-40gb-pcie` is a node of Fire-Flyer 2 (An et al. 2024, the cluster of the lab that trained Janus-Pro): PCIe 4.0
between GPUs, one 200 Gb/s adapter a node. Memory: the `total capacity` that torch prints on these GPUs."""


def hardware(gpu: str, overrides: Sequence[str] = ()) -> Hardware:
    """The preset `gpu` with `field=value` overrides. Raises ConfigError for an unknown preset or field, or a value
    that is no positive number."""
    if gpu not in PRESETS:
        raise ConfigError(
            f"--gpu {gpu!r} is not known; give one of {', '.join(PRESETS)}, and other figures with --hardware "
            "field=value"
        )
    figures = PRESETS[gpu]
    known = [field.name for field in fields(Hardware) if field.name != "gpu"]
    for text in overrides:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(f"--hardware {text!r}: no such figure{one_of(name, known, cutoff=0.4)}")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        zero_allowed = name in (
            "latency_us",
            "hop_us",
            "cuda_context_gib",
            "nccl_gib",
            "workspace_gib",
            "fragmentation",
        )
        if not (0 < number < 1e9 or (zero_allowed and number == 0)):
            raise ConfigError(
                f"--hardware {text!r}: expected a positive number, as in --hardware {name}={getattr(figures, name):g}"
            )
        if name in ("achievable", "link_efficiency") and number > 1:
            raise ConfigError(f"--hardware {text!r}: {name} is a share of the peak, at most 1")
        figures = Hardware(**{**asdict(figures), name: number})
    return figures
