"""DeepSpeed without its shared-memory operator."""

from __future__ import annotations

import os
import subprocess
import sys

from jp_train.engine.cpu_operator import skip_shared_memory_operator

PROGRAM = f"""
from {skip_shared_memory_operator.__module__} import skip_shared_memory_operator
skip_shared_memory_operator()
import deepspeed
assert deepspeed.ops.__compatible_ops__ == {{}}
from deepspeed.comm.torch import build_shm_op
assert build_shm_op() is None
"""


def test_deepspeed_builds_no_operator_on_the_cpu() -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
