"""Our Triton kernels, run by its interpreter, against torch's own operations.

pytest tests/test_fused_qkv.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="torch without CUDA comes without Triton")


@pytest.mark.parametrize("kernels, cases", [("fused_qkv", 5), ("upsample_concat", 3)])
def test_the_kernels_give_the_outputs_and_gradients_of_the_plain_operations(kernels, cases):
    program = Path(__file__).parent / f"interpreted_{kernels}.py"
    done = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == cases
