"""Products of a CUDA device by our own kernel (`experts.triton_kernels`): experts of a call at once, or one matrix.

Matrices are named by their addresses, so that they may lie anywhere on the device, in the form in which a store has
them. Nothing is padded and nothing dequantised in memory. Triton is imported where a device asks for it only: it need
not be installed. Whether the kernel keeps a row's bits is proven before it is used (`experts.device_proof`). Called by
`experts.ffn` and `experts.packed_matrix`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor

from experts.devices import upload

logger = logging.getLogger(__name__)

CAPABILITY = 8, 0
"""The first with the instruction that all tiles use."""
ALIGNMENT = 16
"""Bytes that one load takes; matrices that are not aligned so are read by smaller ones, to the same bits."""


@dataclass(frozen=True)
class TiledMatrix:
    """A matrix (outputs, inputs) on the device, by its addresses; whoever has it keeps its memory."""

    outputs: int
    inputs: int
    group_size: int | None
    is_coded: bool
    codes_at: int
    """Of bfloat16 values where there are no codes."""
    scales_at: int

    @property
    def form(self) -> str:
        if not self.is_coded:
            return "bfloat16"
        return "int8" if self.group_size is None else "int4"

    @property
    def alignment(self) -> int:
        """Of every row, in bytes: ALIGNMENT, or that of a single value."""
        row_bytes = {"bfloat16": 2 * self.inputs, "int8": self.inputs, "int4": (self.inputs + 1) // 2}[
            self.form
        ]
        if self.codes_at % ALIGNMENT == row_bytes % ALIGNMENT == 0:
            return ALIGNMENT
        return 1 if self.is_coded else 2


@dataclass(frozen=True)
class TiledExpert:
    gate_up: TiledMatrix
    down: TiledMatrix


def float_matrix(matrix_OI: Tensor) -> TiledMatrix:
    """Raises ValueError where it is not contiguous bfloat16."""
    if matrix_OI.dtype != torch.bfloat16 or not matrix_OI.is_contiguous():
        raise ValueError(f"{matrix_OI.dtype} with strides {matrix_OI.stride()}")
    outputs, inputs = matrix_OI.shape
    return TiledMatrix(outputs, inputs, None, False, matrix_OI.data_ptr(), 0)


def coded_matrix(codes: Tensor, scales: Tensor, inputs: int, group_size: int | None) -> TiledMatrix:
    """Of codes and bfloat16 scales as a store has them. Raises ValueError where they are not contiguous."""
    if not codes.is_contiguous() or not scales.is_contiguous():
        raise ValueError(f"codes with strides {codes.stride()}, scales with {scales.stride()}")
    return TiledMatrix(codes.shape[0], inputs, group_size, True, codes.data_ptr(), scales.data_ptr())


def why_not_there(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot be tried on this device; None where it can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"not on {device.type}"
    if dtype != torch.bfloat16:
        return f"not for {dtype}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"compute capability is below {'.'.join(map(str, CAPABILITY))}"
    return None if triton_version() else "Triton is not installed"


@functools.cache
def triton_version() -> str:
    """Empty where there is none that can be imported; its compiler decides the kernel's bits."""
    try:
        import triton
    except (ImportError, AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        if not isinstance(error, ModuleNotFoundError):
            logger.warning("Triton cannot be imported: %s: %s", type(error).__name__, error)
        return ""
    return str(triton.__version__)


def product_name() -> str:
    """In the name of a numerics class, which adds the version of what it belongs to."""
    return f"triton{triton_version()}"


def failures() -> tuple[type[Exception], ...]:
    """What a product raises that cannot be made or started here: Triton calls an assembler and a C compiler, imports
    what that has made, and asserts that it finds the driver's library."""
    known = (
        *(SubprocessError, OSError, ImportError, AssertionError),
        *(RuntimeError, AttributeError, TypeError, ValueError),
    )
    if not triton_version():
        return known
    from triton.errors import TritonError

    return (TritonError, *known)


def multiply(x_RI: Tensor, matrix: TiledMatrix, out_RO: Tensor | None = None) -> Tensor:
    """x @ matrix.T, of any number of rows. Returns (R, O) bfloat16, `out_RO` where it is given.

    Reads nothing of the host's memory when it runs, so it may be part of a CUDA graph.
    """
    x_RI = x_RI.contiguous()
    num_rows = x_RI.shape[0]
    is_in_place = out_RO is not None and out_RO.is_contiguous()
    y_RO = out_RO if is_in_place and out_RO is not None else x_RI.new_empty(num_rows, matrix.outputs)
    if num_rows:
        tile = choose_tile([num_rows], [matrix])
        whole = (num_rows, matrix.codes_at, matrix.scales_at, None, None, None)
        _launch(x_RI, y_RO, whole, -(-num_rows // tile.rows), matrix, tile)
    return y_RO if out_RO is None or is_in_place else out_RO.copy_(y_RO)


def compute_gated(
    tokens_TD: Tensor, counts: Sequence[int], token_of_R: Sequence[int], experts: Sequence[TiledExpert]
) -> Tensor:
    """down(silu(gate) * up) of so many rows for each of the experts, which are of one shape: (R, D) bfloat16.

    token_of_R: which token a row is of. One upload, two launches; the host waits for nothing.
    """
    tokens_TD = tokens_TD.contiguous()
    matrices = [expert.gate_up for expert in experts], [expert.down for expert in experts]
    gates, downs = map(_least_aligned, matrices)
    tile = choose_tile(counts, (gates, downs))
    tiles = list_tiles(counts, tile.rows)
    parts = [
        [number for row in tiles for number in row],
        list(token_of_R),
        *([at for matrix in some for at in (matrix.codes_at, matrix.scales_at)] for some in matrices),
    ]
    tiles_at, rows_at, gates_at, downs_at = _upload_parts(parts, tokens_TD.device)
    num_rows = len(token_of_R)
    hidden_RF = tokens_TD.new_empty(num_rows, gates.outputs // 2)
    y_RD = tokens_TD.new_empty(num_rows, downs.outputs)
    if tiles:
        _launch(tokens_TD, hidden_RF, (num_rows, 0, 0, tiles_at, rows_at, gates_at), len(tiles), gates, tile)
        _launch(hidden_RF, y_RD, (num_rows, 0, 0, tiles_at, None, downs_at), len(tiles), downs, tile)
    return y_RD


def list_tiles(counts: Sequence[int], tile_rows: int) -> list[tuple[int, int, int]]:
    """(expert, first row, end of its rows) of every tile; an expert's tiles follow each other, so that the second finds
    the weights in the device's cache."""
    tiles, start = [], 0
    for expert, count in enumerate(counts):
        end = start + count
        tiles += [(expert, first, end) for first in range(start, end, tile_rows)]
        start = end
    return tiles


def choose_tile(counts: Sequence[int], matrices: Sequence[TiledMatrix]) -> Any:
    """The smallest tile where every expert's rows fit one: of weights that are read once, more rows would be for
    nothing."""
    tiles = _kernels().TILES
    is_small = max(counts, default=0) <= tiles[0].rows
    return tiles[0] if is_small or not all(map(is_even, matrices)) else tiles[-1]


def is_even(matrix: TiledMatrix) -> bool:
    """Whether rows are read in whole steps and wide loads. For others the compiler would not keep a large tile in
    registers."""
    return matrix.alignment == ALIGNMENT and matrix.inputs % step_of(matrix) == 0


def step_of(matrix: TiledMatrix) -> int:
    """Inputs that are added at a time."""
    return matrix.group_size or int(_kernels().STEP)


def _least_aligned(matrices: Sequence[TiledMatrix]) -> TiledMatrix:
    return min(matrices, key=lambda matrix: matrix.alignment)


def _upload_parts(parts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """In one copy, each at a multiple of 16 bytes: the compiler makes a kernel of its own for others."""
    numbers: list[int] = []
    starts = []
    for part in parts:
        starts.append(len(numbers))
        numbers += [*part, *[0] * (len(part) % 2)]
    sheet = upload(torch.tensor(numbers, dtype=torch.int64), device)
    return [sheet[start : start + len(part)] for start, part in zip(starts, parts, strict=True)]


def constants_of(matrix: TiledMatrix, tile: Any, *, is_gated: bool) -> dict[str, Any]:
    """What the kernel is compiled for. is_gated: of gate and up."""
    return {
        "FORM": matrix.form,
        "IS_GATED": is_gated,
        "OUTPUTS": matrix.outputs,
        "INPUTS": matrix.inputs,
        "ALIGNMENT": matrix.alignment,
        "TILE_ROWS": tile.rows,
        "TILE_OUTPUTS": tile.outputs,
        "STEP": step_of(matrix),
    }


def options_of(tile: Any) -> dict[str, Any]:
    """How the compiler is to do it."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, **_kernels().OPTIONS}


def _launch(
    x: Tensor, y: Tensor, arguments: tuple[Any, ...], num_tiles: int, matrix: TiledMatrix, tile: Any
) -> None:
    """arguments: those of the kernel from `num_rows` to `matrices_at`. Gated where y has half of the outputs."""
    grid = num_tiles, -(-matrix.outputs // tile.outputs)
    constants = constants_of(matrix, tile, is_gated=y.shape[1] < matrix.outputs)
    with _on(x.device):
        _kernels().multiply_tile[grid](x, y, *arguments, **constants, **options_of(tile))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton starts kernels on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _kernels() -> Any:
    from experts import triton_kernels

    return triton_kernels
