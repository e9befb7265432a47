"""One kernel in Triton: rows times matrices as they lie in a store, of bfloat16, int8 codes, or int4 codes in groups.

A result is one float32 sum, input after input in steps of a fixed size, made by one program: nothing is split over
programs and nothing is added atomically. Tiles decide who computes a sum, never how: see TILES. Codes are exact in
bfloat16; int8 multiplies the finished sum by the row's scale, int4 adds each group's sum times its scale.

Imports Triton, which need not be installed: `experts.triton_products` alone imports this, where a device asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tile:
    """What one program computes: so many rows of so many outputs."""

    rows: int
    outputs: int
    warps: int
    stages: int
    """Of loads that are under way."""


TILES = (Tile(16, 64, 4, 4), Tile(32, 128, 4, 3))
"""For experts of few rows and of more. From compute capability 8.0 on Triton multiplies tiles of fewer than 64 rows by
one instruction, `mma.sync` of 16 inputs, whose results do not know of each other; for 64 rows Hopper and Blackwell have
others, whose sums need not have the same bits. tests/experts/test_triton_compiled.py reads this in the compiled code,
and `experts.device_proof` compares the bits on the device itself."""
STEP = 64
"""Inputs of a step; of int4 a step is a group."""
OPTIONS = {"enable_fp_fusion": False}
"""Whether a product and a sum become one rounding would be for the compiler to say, tile by tile."""


@triton.jit(do_not_specialize=["num_rows", "matrix_at", "scales_at"])
def multiply_tile(
    x_at,
    y_at,
    num_rows,
    matrix_at,
    scales_at,
    tiles_at,
    rows_at,
    matrices_at,
    FORM: tl.constexpr,
    IS_GATED: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """y = x @ matrix.T of one tile's rows and outputs; gated, silu(gate) * up where the matrix has gate, then up.

    x: (any, INPUTS) bfloat16. y: (R, OUTPUTS), gated (R, OUTPUTS / 2). With tiles, int64 (expert, first row, end) each,
    matrices has the addresses of every expert's matrix and scales, and rows, where there are any, tell for each row of
    y which of x it is of. Without, it is rows 0 to num_rows by one matrix. ALIGNMENT: of the matrices' rows, in bytes.
    """
    if tiles_at is None:
        first_row = tl.program_id(0).to(tl.int64) * TILE_ROWS
        end_row = num_rows
        matrix = matrix_at.to(tl.int64)
        scale = scales_at.to(tl.int64)  # 0 where there are none
    else:
        of_tile = tiles_at + 3 * tl.program_id(0)
        of_expert = matrices_at + 2 * tl.load(of_tile)
        first_row = tl.load(of_tile + 1)
        end_row = tl.load(of_tile + 2)
        matrix = tl.load(of_expert)
        scale = tl.load(of_expert + 1)
    rows = first_row + tl.arange(0, TILE_ROWS)
    is_row = rows < end_row
    columns = tl.program_id(1) * TILE_OUTPUTS + tl.arange(0, TILE_OUTPUTS)
    outputs = columns
    if IS_GATED:  # gate and up of an output side by side, where one thread has both
        outputs = columns // 2 + (columns % 2) * (OUTPUTS // 2)
    outputs = tl.where(columns < OUTPUTS, outputs, 0).to(tl.int64)
    source = tl.where(is_row, rows, 0)
    if rows_at is not None:
        source = tl.load(rows_at + rows, mask=is_row, other=0)
    x_rows = x_at + source[:, None] * INPUTS
    scales = scale.to(tl.pointer_type(tl.bfloat16))
    sums = tl.zeros((TILE_ROWS, TILE_OUTPUTS), dtype=tl.float32)
    if FORM == "int4":
        codes_at = tl.multiple_of(matrix.to(tl.pointer_type(tl.uint8)), ALIGNMENT)
        code_rows = codes_at + outputs[None, :] * ((INPUTS + 1) // 2)
        scale_rows = scales + outputs * tl.cdiv(INPUTS, STEP)
        for group in range(tl.cdiv(INPUTS, STEP)):
            inputs = group * STEP + tl.arange(0, STEP)
            pairs = group * (STEP // 2) + tl.arange(0, STEP // 2)
            if INPUTS % STEP == 0:
                x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None], other=0.0)
                codes = tl.load(code_rows + pairs[:, None])
            else:
                x = tl.load(
                    x_rows + inputs[None, :], mask=is_row[:, None] & (inputs < INPUTS)[None, :], other=0.0
                )
                codes = tl.load(code_rows + pairs[:, None], mask=(2 * pairs < INPUTS)[:, None], other=0)
            first, second = tl.split(tl.reshape(x, (TILE_ROWS, STEP // 2, 2)))
            low = ((codes & 15).to(tl.int8) - 8).to(tl.bfloat16)
            high = ((codes >> 4).to(tl.int8) - 8).to(tl.bfloat16)
            part = tl.dot(second, high, tl.dot(first, low))
            sums += part * tl.load(scale_rows + group).to(tl.float32)[None, :]
    else:
        if FORM == "int8":
            values_at = tl.multiple_of(matrix.to(tl.pointer_type(tl.int8)), ALIGNMENT)
        else:
            values_at = tl.multiple_of(matrix.to(tl.pointer_type(tl.bfloat16)), ALIGNMENT)
        value_rows = values_at + outputs[None, :] * INPUTS
        for start in range(0, INPUTS, STEP):
            inputs = start + tl.arange(0, STEP)
            if INPUTS % STEP == 0:
                x = tl.load(x_rows + inputs[None, :], mask=is_row[:, None], other=0.0)
                values = tl.load(value_rows + inputs[:, None])
            else:
                x = tl.load(
                    x_rows + inputs[None, :], mask=is_row[:, None] & (inputs < INPUTS)[None, :], other=0.0
                )
                values = tl.load(value_rows + inputs[:, None], mask=(inputs < INPUTS)[:, None], other=0)
            sums = tl.dot(x, values.to(tl.bfloat16), sums)
        if FORM == "int8":
            sums = sums * tl.load(scales + outputs).to(tl.float32)[None, :]
    width: tl.constexpr = OUTPUTS // 2 if IS_GATED else OUTPUTS
    if IS_GATED:
        gate, up = tl.split(tl.reshape(sums, (TILE_ROWS, TILE_OUTPUTS // 2, 2)))
        sums = gate / (1.0 + tl.exp(-gate)) * up
        columns = tl.program_id(1) * (TILE_OUTPUTS // 2) + tl.arange(0, TILE_OUTPUTS // 2)
    is_result = is_row[:, None] & (columns < width)[None, :]
    tl.store(y_at + rows[:, None] * width + columns[None, :], sums.to(tl.bfloat16), mask=is_result)
