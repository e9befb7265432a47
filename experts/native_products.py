"""Matrix products by the C source in `native/`: the same bits for a row whatever stands beside it, by construction.

One library, made at install (`experts.native_build`), with one set of products for each level of the processor. Loaded
by ctypes, it computes in the threads that PyTorch has already. Every pointer that goes in is of a tensor checked here.
Where the library is missing, `library` is None and PyTorch's products are used. Called by `experts.numerics`,
`experts.packed_matrix` and `experts.ffn`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import struct
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.errors import ProductsUnavailable
from experts.native_build import LIBRARY

logger = logging.getLogger(__name__)

VARIABLE = "SAGE_MOE_PRODUCTS"
"""Environment: `torch`, or a level of LEVELS, in place of the best one."""
TORCH = "torch"
LEVELS = ("portable", "avx2", "avx512", "avx512bf16")
"""Each with the bits of its own; a processor has all up to its best one."""
VERSION = 7
"""Of what is computed; part of the numerics class, and checked against the library's own."""
DTYPES = (torch.float32, torch.bfloat16)
KINDS = {torch.float32: 0, torch.bfloat16: 1}
INT8_KIND, INT4_KIND = 2, 3
GROUP_SIZES = (None, 32, 64, 128)
OUT_OF_MEMORY, PAUSED = 1, 2

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_RUN = (_POINTER, ctypes.c_uint)
_ARGUMENTS: tuple[list[Any], ...] = (
    [*[_INT] * 3, _POINTER, _POINTER, _INT64, *[_POINTER] * 3, _INT64, _INT64, _POINTER, _INT64, *_RUN],
    [*[_INT] * 2, *[_POINTER] * 14, *_RUN],
    [*[_INT] * 2, _POINTER, *[_INT64] * 3, _POINTER, _FLOAT, _POINTER, *_RUN],
    [*[_INT] * 2, _POINTER, *[_INT64] * 4, _INT, *[_POINTER] * 2, *_RUN],
    [*[_POINTER] * 2, *[_INT64] * 2, *[_POINTER] * 2, *_RUN],
    [*[_POINTER] * 8, *_RUN],
    [*[_POINTER] * 4, *_RUN],
    [*[_INT] * 2, _POINTER, *[_INT64] * 2, _POINTER, _FLOAT, *[_POINTER] * 3, *_RUN],
    [_POINTER, _INT64, *_RUN],
    [*[_POINTER] * 2, _INT64, *[_POINTER] * 7, *_RUN],
    [*[_POINTER] * 4, *_RUN],
    [*[_POINTER] * 5, *_RUN],
    [*[_POINTER] * 2, *[_INT64] * 2, *[_POINTER] * 6, *_RUN],
    [_INT, _POINTER, _INT64],
    [_INT, _POINTER, *_RUN],
    [_POINTER, *_RUN],
    [_POINTER, *_RUN],
    [_POINTER, _INT64, _INT64, _POINTER],
    [*[_POINTER] * 2, _INT64, *[_POINTER] * 9, *_RUN],
    [*[_INT] * 2, *[_POINTER] * 2, *[_INT64] * 3, _POINTER],
    [*[_INT] * 3, _POINTER, *[_INT64] * 2, *[_POINTER] * 4, *_RUN],
    [*[_INT] * 2, _POINTER, *[_INT64] * 2, _POINTER, *_RUN],
)
"""Of the library's functions that return a code; the C source says what they are."""
_BEGINNING: tuple[list[Any], ...] = (
    [*[_POINTER] * 2, *[_INT64] * 2, *[_POINTER] * 2, ctypes.c_uint],
    [*[_POINTER] * 8, ctypes.c_uint],
    [*[_POINTER] * 4, ctypes.c_uint],
    [*[_POINTER] * 4, ctypes.c_uint],
    [_POINTER] * 5,
)
"""Of those that return half a layer."""


@dataclass(frozen=True)
class NativeMatrix:
    """One matrix (outputs, inputs) where it lies in memory, checked. Holds on to its tensors."""

    kind: int
    group: int
    """Inputs that share a scale; 0 where an output has one, or none."""
    outputs: int
    inputs: int
    weights: Tensor
    scales: Tensor | None
    pointers: tuple[int, int]

    @property
    def form(self) -> tuple[int, int, int, int]:
        return self.kind, self.group, self.outputs, self.inputs


@dataclass(frozen=True)
class GatedMatrices:
    """One expert's two matrices, as a call takes them."""

    forms: tuple[int, ...]
    """The same object for equal ones."""
    addresses: bytes
    """Codes and scales of gate and up, and of down, as C has four addresses."""
    matrices: tuple[NativeMatrix, NativeMatrix]


@dataclass(frozen=True)
class Library:
    """The loaded library."""

    multiply: Callable[..., int]
    attend: Callable[..., int]
    """Of `router.native_attention`, as is `norm`."""
    norm: Callable[..., int]
    route: Callable[..., int]
    """Of `router.native_routing`."""
    attention_half: Callable[..., int]
    """Of `router.native_step`, as are the next two."""
    experts_half: Callable[..., int]
    dense_half: Callable[..., int]
    head: Callable[..., int]
    """Of `router.native_head`."""
    run_half: Callable[..., int]
    """Of `router.native_step`, as are `run_layers` and what begins and ends a half."""
    run_layers: Callable[..., int]
    dispatch: Callable[..., int]
    """Of `router.native_dispatch`, as are the next two."""
    combine: Callable[..., int]
    reach_experts: Callable[..., int]
    are_finite: Callable[..., int]
    """Of `find_finite`."""
    choose: Callable[..., int]
    """Of `router.native_choosing`, as is `stand_in`."""
    stand_in: Callable[..., int]
    past_signals: Callable[..., int]
    """Of `router.native_signals`, as is `conflict`."""
    conflict: Callable[..., int]
    ask_layers: Callable[..., int]
    """Of `router.native_dispatch`."""
    add_gated: Callable[..., int]
    """Of `router.shared_expert`."""
    snake: Callable[..., int]
    """Of `router.speech.native_snake`."""
    draw: Callable[..., int]
    """Of `router.native_sampling`."""
    begin_attention: Callable[..., int | None]
    begin_experts: Callable[..., int | None]
    begin_dense: Callable[..., int | None]
    begin_dispatch: Callable[..., int | None]
    """Of `router.native_dispatch`, as is `begin_combine`."""
    begin_combine: Callable[..., int | None]
    end_half: Callable[..., None]
    best_level: str
    loaded: ctypes.CDLL
    """For `experts.native_plane`."""
    run_in_threads: int | None
    """Address of the OpenMP runtime's entry point; None where PyTorch has no such runtime."""


def float_matrix(weight_OI: Tensor) -> NativeMatrix:
    """Raises ValueError for a tensor that is not a matrix of a dtype that is computed here, row-major on the CPU."""
    if (
        weight_OI.dim() != 2
        or weight_OI.dtype not in DTYPES
        or weight_OI.device.type != "cpu"
        or not weight_OI.is_contiguous()
    ):
        raise ValueError(f"no matrix for native products: {_described(weight_OI)}")
    outputs, inputs = weight_OI.shape
    return NativeMatrix(
        KINDS[weight_OI.dtype], 0, outputs, inputs, weight_OI, None, (weight_OI.data_ptr(), 0)
    )


def coded_matrix(codes: Tensor, scales: Tensor, inputs: int, group_size: int | None) -> NativeMatrix:
    """int8 codes with a scale for each output, or int4 codes with one for each group, as a store has them.

    codes: uint8, (outputs, bytes of a row). scales: bfloat16. Raises ValueError where shapes do not fit.
    """
    outputs = codes.shape[0]
    row_bytes = inputs if group_size is None else -(-inputs // 2)
    num_scales = (outputs,) if group_size is None else (outputs, -(-inputs // group_size))
    is_sound = (codes.dtype, scales.dtype) == (torch.uint8, torch.bfloat16) and all(
        tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (codes, scales)
    )
    fits = codes.shape == (outputs, row_bytes) and scales.shape == num_scales
    if not is_sound or not fits or group_size not in GROUP_SIZES:
        raise ValueError(
            f"no matrix for native products: {_described(codes)} with {_described(scales)}, "
            f"{inputs} inputs in groups of {group_size}"
        )
    kind = INT8_KIND if group_size is None else INT4_KIND
    pointers = codes.data_ptr(), scales.data_ptr()
    return NativeMatrix(kind, group_size or 0, outputs, inputs, codes, scales, pointers)


def gated_matrices(gate_up_FD: NativeMatrix, down_DF: NativeMatrix) -> GatedMatrices:
    """Raises ValueError where the two do not fit each other."""
    if gate_up_FD.outputs != 2 * down_DF.inputs:
        raise ValueError(f"{gate_up_FD.outputs} gate and up outputs do not fit {down_DF.inputs} inputs")
    if gate_up_FD.weights.dtype != down_DF.weights.dtype:
        raise ValueError(
            f"gate and up of {gate_up_FD.weights.dtype} do not fit down of {down_DF.weights.dtype}"
        )
    forms = _shared(gate_up_FD.form + down_DF.form)
    addresses = struct.pack("@4Q", *gate_up_FD.pointers, *down_DF.pointers)
    return GatedMatrices(forms, addresses, (gate_up_FD, down_DF))


@cache
def _shared(forms: tuple[int, ...]) -> tuple[int, ...]:
    return forms


def multiply(level: str, x_RI: Tensor, matrix: NativeMatrix, out_RO: Tensor | None = None) -> Tensor:
    """x @ matrix.T, (R, O) in x's dtype. Raises ValueError for tensors that do not fit, MemoryError."""
    x_RI = _checked_rows(x_RI, matrix.inputs)
    num_rows = x_RI.shape[0]
    if out_RO is None:
        out_RO = x_RI.new_empty(num_rows, matrix.outputs)
    elif out_RO.shape != (num_rows, matrix.outputs) or out_RO.dtype != x_RI.dtype or not _is_room(out_RO):
        raise ValueError(f"no room for ({num_rows}, {matrix.outputs}) {x_RI.dtype} in {_described(out_RO)}")
    if matrix.weights.dtype.is_floating_point and matrix.weights.dtype != x_RI.dtype:
        raise ValueError(f"{x_RI.dtype} rows for a matrix of {matrix.weights.dtype}")
    addresses = struct.pack("@4Q", *matrix.pointers, 0, 0)
    _run(level, x_RI, matrix.form, addresses, (num_rows,), None, out_RO)
    return out_RO


def compute_gated(
    level: str,
    tokens_TD: Tensor,
    experts: Sequence[GatedMatrices],
    counts: Sequence[int],
    token_of_R: Sequence[int] | None = None,
) -> Tensor:
    """Each expert's gated projections of its rows, (R, outputs of the last matrix) in the tokens' dtype.

    counts: rows of each expert, one after the other. token_of_R: which token each row is; None: row r is token r.
    Raises ValueError where anything does not fit, MemoryError.
    """
    forms, (first, down) = experts[0].forms, experts[0].matrices
    tokens_TD = _checked_rows(tokens_TD, first.inputs)
    num_tokens = tokens_TD.shape[0]
    num_rows = num_tokens if token_of_R is None else len(token_of_R)
    if len(counts) != len(experts) or min(counts) < 0 or sum(counts) != num_rows:
        raise ValueError(f"{len(experts)} experts with {tuple(counts)} of {num_rows} rows")
    if token_of_R and not 0 <= min(token_of_R) <= max(token_of_R) < num_tokens:
        raise ValueError(f"row map reaches outside the {num_tokens} token rows")
    if any(expert.forms is not forms for expert in experts):
        raise ValueError("experts of one call have matrices of several forms")
    if first.weights.dtype.is_floating_point and first.weights.dtype != tokens_TD.dtype:
        raise ValueError(f"{tokens_TD.dtype} rows for matrices of {first.weights.dtype}")
    out_RD = tokens_TD.new_empty(num_rows, down.outputs)
    addresses = b"".join([expert.addresses for expert in experts])
    rows = None if token_of_R is None else array("q", token_of_R)
    _run(level, tokens_TD, forms, addresses, counts, rows, out_RD)
    return out_RD


def find_finite(values: Tensor) -> bool | None:
    """Whether no value is infinite or not a number; None where the library is not there, or does not read such."""
    found = library()
    if found is None or values.dtype not in DTYPES or not values.is_cpu or not values.is_contiguous():
        return None
    return bool(found.are_finite(values.dtype == torch.bfloat16, values.data_ptr(), values.numel()))


def _run(
    level: str,
    x_TI: Tensor,
    forms: Sequence[int],
    addresses: bytes,
    counts: Sequence[int],
    token_of_R: array[int] | None,
    out_RO: Tensor,
) -> None:
    found = library_for(level)
    if not out_RO.numel():
        return
    if not x_TI.shape[1]:
        out_RO.zero_()
        return
    num_rows = array("q", counts)
    shape = array("q", forms)
    code = found.multiply(
        LEVELS.index(level),
        x_TI.dtype == torch.bfloat16,
        len(forms) > 4,
        shape.buffer_info()[0],
        addresses,
        len(counts),
        num_rows.buffer_info()[0],
        None if token_of_R is None else token_of_R.buffer_info()[0],
        x_TI.data_ptr(),
        x_TI.shape[0],
        x_TI.stride(0) * x_TI.itemsize,
        out_RO.data_ptr(),
        out_RO.stride(0) * out_RO.itemsize,
        found.run_in_threads,
        torch.get_num_threads(),
    )
    if code == OUT_OF_MEMORY:
        raise MemoryError(f"no memory for a product of {x_TI.shape[0]} rows")


def _checked_rows(x_RI: Tensor, inputs: int) -> Tensor:
    """As the library reads them, a copy where they are not."""
    if x_RI.dim() != 2 or x_RI.shape[1] != inputs or x_RI.dtype not in DTYPES or x_RI.device.type != "cpu":
        raise ValueError(f"no rows of {inputs} inputs: {_described(x_RI)}")
    return x_RI if _has_rows(x_RI) else x_RI.contiguous()


def _has_rows(x: Tensor) -> bool:
    """Whether elements of a row lie side by side; rows may be apart, or the same one several times for reading."""
    return x.stride(1) == 1 or x.shape[1] == 1


def _is_room(out: Tensor) -> bool:
    """Whether rows can be written that do not overlap."""
    return out.device.type == "cpu" and _has_rows(out) and (out.shape[0] < 2 or out.stride(0) >= out.shape[1])


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"


def chosen_level(dtype: torch.dtype, environment: Mapping[str, str] = os.environ) -> str | None:
    """The level with which this process multiplies rows of a dtype; None: PyTorch's products.

    Raises ProductsUnavailable where the environment asks for what is not here.
    """
    asked = environment.get(VARIABLE, "")
    if asked == TORCH:
        return None
    found = library()
    levels = () if found is None else LEVELS[: LEVELS.index(found.best_level) + 1]
    if asked and asked not in levels:
        raise ProductsUnavailable(f"{VARIABLE}={asked}", ", ".join((TORCH, *levels)))
    if dtype not in DTYPES or not levels:
        return None
    return asked or levels[-1]


def library_for(level: str) -> Library:
    """Raises ValueError where this machine does not have the level."""
    found = library()
    if found is None or LEVELS.index(level) > LEVELS.index(found.best_level):
        raise ValueError(f"this process has no native products of level {level}")
    return found


@cache
def library() -> Library | None:
    """The library, loaded once; None where there is none, or one of another version."""
    if not LIBRARY.exists():
        return None
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        version, best = int(loaded.sage_version()), int(loaded.sage_level())
        functions = (
            *(loaded.sage_multiply, loaded.sage_attend, loaded.sage_norm, loaded.sage_route),
            *(loaded.sage_attention_half, loaded.sage_experts_half, loaded.sage_dense_half),
            *(loaded.sage_head, loaded.sage_run_half),
            *(loaded.sage_run_layers, loaded.sage_dispatch, loaded.sage_combine),
            *(loaded.sage_reach_experts, loaded.sage_are_finite),
            *(loaded.sage_choose, loaded.sage_stand_in, loaded.sage_past_signals, loaded.sage_conflict),
            *(loaded.sage_ask_layers, loaded.sage_add_gated, loaded.sage_snake),
            loaded.sage_draw,
        )
        beginning = (
            *(loaded.sage_begin_attention, loaded.sage_begin_experts, loaded.sage_begin_dense),
            *(loaded.sage_begin_dispatch, loaded.sage_begin_combine),
        )
        end_half = loaded.sage_end_half
    except AttributeError as error:
        logger.warning("native products are older than what calls them: install again (%s)", error)
        return None
    except OSError as error:
        logger.warning("native products cannot be loaded: %s", error)
        return None
    if version != VERSION:
        logger.warning("native products are of version %d, not %d: install again", version, VERSION)
        return None
    for function, arguments in zip(functions, _ARGUMENTS, strict=True):
        function.restype, function.argtypes = ctypes.c_int, arguments
    for function, arguments in zip(beginning, _BEGINNING, strict=True):
        function.restype, function.argtypes = _POINTER, arguments
    end_half.restype, end_half.argtypes = None, [_POINTER]
    return Library(*functions, *beginning, end_half, LEVELS[best], loaded, _find_openmp())


def _find_openmp() -> int | None:
    """`GOMP_parallel` of the runtime that PyTorch's threads are of; a second runtime would have threads of its own."""
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    for path in dict.fromkeys(re.findall(r"(/\S*lib(?:gomp|iomp5|omp)\b\S*)$", mapped, re.MULTILINE)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (AttributeError, OSError):
            continue
    logger.warning("native products compute with one thread: PyTorch's OpenMP runtime is not to be found")
    return None
