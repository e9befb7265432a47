"""Our kernel of a device, compiled for cards that are not there: what the compiler made of it, for every way of use.

That a row has the same bits in tiles of any size rests on what is read here: both tiles are multiplied by one
instruction, from operands that lie alike, and no product is fused with a sum by the compiler's choice.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from experts.triton_products import TiledMatrix, constants_of, is_even, options_of

pytest.importorskip("triton", reason="needs Triton: the extra `gpu`")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from experts.triton_kernels import TILES, Tile, multiply_tile

CAPABILITIES = (80, 90)
SMALLEST_SHARED_BYTES = 99 << 10
"""That one program may have, of any card from capability 8.0 on."""
INSTRUCTION = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
ALIGNED = TiledMatrix(1536, 2048, None, False, 0, 0)
"""Of Qwen3-30B-A3B's experts: gate and up."""
MATRICES = {
    "bfloat16": ALIGNED,
    "int8": replace(ALIGNED, is_coded=True),
    **{f"int4-g{size}": replace(ALIGNED, is_coded=True, group_size=size) for size in (32, 64, 128)},
}
ODD = {"outputs": 150, "inputs": 135, "codes_at": 2}
"""Of a shape and at a place that nothing divides."""
USES = ("gathered, gated", "grouped", "alone")


@cache
def _compiled(capability: int, matrix: TiledMatrix, tile: Tile, use: str) -> Any:
    constants = constants_of(matrix, tile, is_gated=use == "gathered, gated")
    signature = dict.fromkeys(("x_at", "y_at"), "*bf16") | {"num_rows": "i32"}
    signature |= dict.fromkeys(("matrix_at", "scales_at"), "i64" if use == "alone" else "i32")
    absent = {"alone": ("tiles_at", "rows_at", "matrices_at"), "grouped": ("rows_at",)}.get(use, ())
    for name in ("tiles_at", "rows_at", "matrices_at"):
        signature[name] = "constexpr" if name in absent else "*i64"
    values = constants | dict.fromkeys(absent)
    signature |= dict.fromkeys(constants, "constexpr")
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(multiply_tile, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options_of(tile))


def _ways() -> Iterator[tuple[str, TiledMatrix, str]]:
    for name, matrix in MATRICES.items():
        for use in USES:
            yield f"{name}, {use}", matrix, use
            yield f"{name}, odd, {use}", replace(matrix, **ODD), use


WAYS = [pytest.param(matrix, use, id=name) for name, matrix, use in _ways()]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("matrix", "use"), WAYS)
def test_every_use_fits_a_card_and_multiplies_by_one_instruction(
    matrix: TiledMatrix, use: str, capability: int, tmp_path: Path
) -> None:
    for tile in TILES if is_even(matrix) else TILES[:1]:
        kernel = _compiled(capability, matrix, tile, use)
        assert kernel.metadata.shared <= SMALLEST_SHARED_BYTES, tile
        stack, local = _spilled_bytes(kernel, tmp_path)
        assert (stack, local) == (0, 0), f"{tile} keeps {stack} + {local} bytes of registers in memory"
        assembly = kernel.asm["ptx"]
        products = set(re.findall(r"(?:wgmma|tcgen05|mma)[\w.]*\.[\w.:]*bf16[\w.]*", assembly))
        assert products == {INSTRUCTION}, tile
        assert "fma.rn.f32" not in assembly, (
            "whether a product and a sum are one rounding is not the compiler's"
        )
        assert not re.search(r"\b(atom|red)\.global", assembly)


def _spilled_bytes(kernel: Any, folder: Path) -> tuple[int, int]:
    """Of a thread: on its stack, and elsewhere in local memory."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", MATRICES)
def test_inputs_have_one_order_within_an_instruction(name: str, capability: int) -> None:
    """In tiles of any size, and wherever a matrix lies: a call reads all of its experts like the least aligned one."""
    aligned, elsewhere = MATRICES[name], replace(MATRICES[name], codes_at=2)
    kernels = [_compiled(capability, aligned, tile, USES[0]) for tile in TILES]
    kernels.append(_compiled(capability, elsewhere, TILES[0], USES[0]))
    orders = [set(re.findall(r"kWidth = \d+", kernel.asm["ttgir"])) for kernel in kernels]
    assert orders[0] and orders == [orders[0]] * len(kernels)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", MATRICES)
def test_aligned_weights_are_copied_sixteen_bytes_at_a_time(name: str, capability: int) -> None:
    """To shared memory, while the ones before are multiplied."""
    small, large = (_compiled(capability, MATRICES[name], tile, USES[0]).asm["ptx"] for tile in TILES)
    assert "cp.async" in small
    assert re.search(r"cp\.async\.cg\.shared\.global .*0x10,|ld\.global\.v4\.b32", large)


def test_more_rows_in_a_tile_would_be_multiplied_by_another_instruction() -> None:
    """Else the tests above could not fail, and larger tiles would be worth having."""
    kernel = _compiled(90, ALIGNED, replace(TILES[1], rows=64), USES[0])
    assert "wgmma" in kernel.asm["ptx"] and INSTRUCTION not in kernel.asm["ptx"]
