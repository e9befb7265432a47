"""Our kernel of a device, without one: interpreted_triton.py in a process whose kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experts import triton_products
from experts.devices import CPU
from experts.triton_products import coded_matrix, failures, float_matrix, triton_version, why_not_there

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


def test_triton_is_imported_by_no_process_that_does_not_need_it() -> None:
    told = "import sys, experts.worker, router.loading; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", told], check=True, timeout=TIMEOUT_S)


def test_kernel_is_not_tried_where_it_cannot_run() -> None:
    assert why_not_there(CPU, torch.bfloat16) == "not on cpu"
    assert why_not_there(torch.device("privateuseone", 0), torch.bfloat16) is not None


@pytest.mark.parametrize(
    ("capability", "dtype", "version", "reason"),
    [
        ((8, 0), torch.bfloat16, "3.7.1", None),
        ((9, 0), torch.float32, "3.7.1", "not for torch.float32"),
        ((7, 5), torch.bfloat16, "3.7.1", "compute capability is below 8.0"),
        ((9, 0), torch.bfloat16, "", "Triton is not installed"),
    ],
)
def test_kernel_is_tried_on_cards_that_have_its_instruction(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    dtype: torch.dtype,
    version: str,
    reason: str | None,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(triton_products, "triton_version", lambda: version)
    assert why_not_there(torch.device("cuda", 0), dtype) == reason


@pytest.mark.parametrize("error", [ImportError, AttributeError, RuntimeError])
def test_triton_that_cannot_be_imported_is_as_none(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "triton.py").write_text(f"raise {error.__name__}('not for this machine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    triton_version.cache_clear()
    try:
        assert triton_version() == ""
    finally:
        triton_version.cache_clear()


def test_a_machine_without_the_driver_s_library_fails_in_a_known_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that other products stand in where Triton looks for it in vain."""
    from triton.backends.nvidia import driver

    driver.libcuda_dirs.cache_clear()
    monkeypatch.setattr(driver.subprocess, "check_output", lambda *_: b"")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    monkeypatch.delenv("TRITON_LIBCUDA_PATH", raising=False)
    try:
        with pytest.raises(failures(), match="libcuda"):
            driver.libcuda_dirs()
    finally:
        driver.libcuda_dirs.cache_clear()


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
