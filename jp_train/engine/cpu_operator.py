"""Keep DeepSpeed from compiling its shared-memory CPU operator, which training never calls.

On CPU, `deepspeed.init_distributed` compiles `deepspeed_shm_comm` (40-110 s, needs a C++ compiler and ninja), and a
process killed while torch loads it leaves a lock file on which every later run waits forever without a message. In
DeepSpeed 0.19.8 the operator serves `inference_all_reduce` alone (deepspeed/comm/torch.py); every collective of ZeRO-3
goes through gloo with or without it.
"""

from __future__ import annotations


def skip_shared_memory_operator() -> None:
    """Tell DeepSpeed that no optional CPU operator can be built; call before `deepspeed.init_distributed`. No effect on
    CUDA.

    `deepspeed.ops.__compatible_ops__` is a lazily probed module attribute meant to be edited (its own comment says so);
    setting it also saves the probe, which starts compilers.
    """
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
