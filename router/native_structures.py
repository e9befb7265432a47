"""The structures of `layer.h`, `layers.c` and `asked.c` in `experts/native`, field by field."""

from __future__ import annotations

import ctypes

from experts.native_products import NativeMatrix

_POINTER, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class FormStructure(ctypes.Structure):
    _fields_ = [(name, _INT64) for name in ("kind", "group", "outputs", "inputs")]


class LinearStructure(ctypes.Structure):
    """`linear`."""

    _fields_ = [("form", FormStructure), ("weights", _POINTER), ("scales", _POINTER)]

    @classmethod
    def of(cls, matrix: NativeMatrix) -> LinearStructure:
        return cls(FormStructure(*matrix.form), *matrix.pointers)


class ExpertStructure(ctypes.Structure):
    """`expert`: codes and scales of both matrices."""

    _fields_ = [(name, _POINTER) for name in ("gate_up", "gate_up_scales", "down", "down_scales")]


_LAYER_VECTORS = ("input_norm", "q_norm", "k_norm", "post_norm", "qkv_bias", "output_bias")


class LayerStructure(ctypes.Structure):
    """`layer`."""

    _fields_ = [
        *((name, _POINTER) for name in _LAYER_VECTORS),
        *((name, LinearStructure) for name in ("qkv", "output", "gate", "shared_gate")),
        *((name, FormStructure) for name in ("gate_up", "down", "shared_gate_up", "shared_down")),
        ("experts", _POINTER),
        ("shared", ExpertStructure),
    ]


_STEP_NUMBERS = (
    *(
        "level",
        "is_narrow",
        "width",
        "heads",
        "kv_heads",
        "head_width",
        "has_wide_norms",
        "num_experts",
        "top_k",
        "is_normalised",
    ),
    *("num_tokens", "num_spans", "most_blocks", "block_bytes", "layer_bytes"),
)
_STEP_POINTERS = ("cos", "sin", "keys", "values", "blocks", "offsets", "tables", "spans", "ended_ns")


class StepStructure(ctypes.Structure):
    """`step`."""

    _fields_ = [
        *((name, _INT64) for name in _STEP_NUMBERS),
        *((name, _POINTER) for name in _STEP_POINTERS),
        *((name, _FLOAT) for name in ("eps", "scale", "bound")),
    ]


class DispatchedStructure(ctypes.Structure):
    """`dispatched`."""

    _fields_ = [
        (name, _POINTER)
        for name in (
            *("normed", "chosen", "weights", "row_of", "maps", "num_used"),
            *("shared_gates", "shared_rows"),
        )
    ]


class AskedLayerStructure(ctypes.Structure):
    """`asked_layer`."""

    _fields_ = [
        ("layer", _POINTER),
        *((name, _INT64) for name in ("index", "window", "number")),
        ("owners", _POINTER),
    ]
