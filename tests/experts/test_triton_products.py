"""Our kernel of a device, without one: interpreted_triton.py in a process whose kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experts.devices import CPU
from experts.triton_products import coded_matrix, float_matrix, why_not_there

pytest.importorskip("triton", reason="needs Triton: the extra `gpu`")
INTERPRETED = Path(__file__).with_name("interpreted_triton.py")
TIMEOUT_S = 600


def test_interpreted_kernel_passes_its_tests() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", str(INTERPRETED)]
    ended = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_kernel_is_not_tried_where_it_cannot_run() -> None:
    assert why_not_there(CPU, torch.bfloat16) == "not on cpu"
    assert why_not_there(torch.device("privateuseone", 0), torch.bfloat16) is not None


def test_matrices_that_do_not_lie_as_in_a_store_are_refused() -> None:
    values = torch.zeros(8, 16, dtype=torch.bfloat16)
    assert float_matrix(values).alignment == 16 and float_matrix(values[:, :6].contiguous()).alignment == 2
    for wrong in (values.t(), values.float()):
        with pytest.raises(ValueError, match="strides"):
            float_matrix(wrong)
    codes, scales = torch.zeros(8, 16, dtype=torch.uint8), torch.zeros(8, 2, dtype=torch.bfloat16)
    assert coded_matrix(codes, scales, 32, 16).form == "int4"
    with pytest.raises(ValueError, match="codes with strides"):
        coded_matrix(codes[:, ::2], scales, 16, 16)
