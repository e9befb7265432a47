"""Which rotary frequencies a configuration asks for, read and checked. The frequencies are in `router.rope`.

Accepts `rope_parameters` of newer `transformers`, and `rope_theta` with `rope_scaling` of published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from router.errors import ConfigUnsupported

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3"]
MAX_POSITIONS = 1 << 24
"""Positions beyond are no whole numbers in float32."""


@dataclass(frozen=True)
class RopeConfig:
    """One kind of frequencies with its parameters; those that the kind does not use keep their defaults."""

    kind: RopeKind
    theta: float
    original_context: int
    """Positions that the frequencies were trained for."""
    factor: float = 1.0
    attention_scaling: float = 1.0
    """Of cos and sin (yarn)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    is_truncated: bool = True
    """Whether yarn rounds the bounds of its ramp to whole dimensions."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    mrope_section: tuple[int, ...] | None = None
    """Frequencies of the time, height and width rows, interleaved."""

    @property
    def depends_on_length(self) -> bool:
        """Whether a key's bits depend on how long its request's prompt is, so that no other request can use it."""
        return self.kind == "dynamic"


def read_rope(
    config: Mapping[str, Any], head_dim: int, max_position: int, default_theta: float
) -> RopeConfig:
    """Raises ConfigUnsupported when a parameter is missing, out of range, or asks for what is not computed."""
    rope = _merged(config)
    kind = _kind(rope)
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (None, 1, 1.0):
        raise ConfigUnsupported("partial_rotary_factor", "only whole heads are rotated")
    section = _mrope_section(rope, head_dim)
    if kind == "dynamic" and (section is not None or head_dim < 4):
        raise ConfigUnsupported("rope_type", "'dynamic' is computed for one position row and heads from 4 on")
    original = max_position
    if kind in ("yarn", "llama3"):
        original = int(_number(rope, "original_max_position_embeddings", max_position, 1, MAX_POSITIONS))
    factor = 1.0 if kind == "default" else _factor(rope, kind, max_position, original)
    return RopeConfig(
        kind=kind,
        theta=_number(rope, "rope_theta", default_theta, 1.0, 1e15),
        original_context=original,
        factor=factor,
        attention_scaling=_yarn_scaling(rope, factor) if kind == "yarn" else 1.0,
        beta_fast=_number(rope, "beta_fast", 32.0, 1e-6, 1e6),
        beta_slow=_number(rope, "beta_slow", 1.0, 1e-6, 1e6),
        is_truncated=bool(rope.get("truncate", True)),
        mrope_section=section,
        **_llama3(rope) if kind == "llama3" else {},
    )


def context_of(rope: RopeConfig, max_position: int) -> int:
    """How many positions a model serves: what it was trained for, stretched where the kind stretches it.

    Llama 3's configurations already give the stretched number.
    """
    if rope.kind in ("linear", "dynamic", "yarn"):
        return min(max(max_position, int(rope.original_context * rope.factor)), MAX_POSITIONS)
    return max_position


def _merged(config: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key)
        if part is not None and not isinstance(part, dict):
            raise ConfigUnsupported(key, f"{part!r} is no object")
        rope |= part or {}
    if rope.get("rope_theta") is None:
        rope["rope_theta"] = config.get("rope_theta")
    return rope


def _kind(rope: Mapping[str, Any]) -> RopeKind:
    kinds: tuple[RopeKind, ...] = get_args(RopeKind)
    asked = rope.get("rope_type", rope.get("type", "default"))
    if asked == "mrope":  # an older name of the default kind with sections
        return "default"
    for kind in kinds:
        if kind == asked:
            return kind
    raise ConfigUnsupported("rope_type", f"{asked!r}; computed are {', '.join(kinds)}")


def _factor(rope: Mapping[str, Any], kind: str, max_position: int, original: int) -> float:
    default = max_position / original if kind == "yarn" else None
    return _number(rope, "factor", default, 1.0, 65536.0)


def _llama3(rope: Mapping[str, Any]) -> dict[str, float]:
    low = _number(rope, "low_freq_factor", None, 1e-6, 1e6)
    high = _number(rope, "high_freq_factor", None, 1e-6, 1e6)
    if high <= low:
        raise ConfigUnsupported("high_freq_factor", f"{high} is not above low_freq_factor {low}")
    return {"low_freq_factor": low, "high_freq_factor": high}


def _yarn_scaling(rope: Mapping[str, Any], factor: float) -> float:
    """Source: `transformers`, modeling_rope_utils."""
    if rope.get("attention_factor") is not None:
        return _number(rope, "attention_factor", None, 1e-6, 1e6)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        numerator = mscale(_number(rope, "mscale", None, 1e-6, 1e6))
        return numerator / mscale(_number(rope, "mscale_all_dim", None, 1e-6, 1e6))
    return mscale(1.0)


def _number(rope: Mapping[str, Any], key: str, default: float | None, low: float, high: float) -> float:
    value = rope.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigUnsupported(key, f"{value!r} is not a number from {low:g} to {high:g}")
    return float(value)


def _mrope_section(rope: Mapping[str, Any], head_dim: int) -> tuple[int, ...] | None:
    section = rope.get("mrope_section")
    if section is None:
        return None
    is_triple = isinstance(section, list | tuple) and len(section) == 3
    if not is_triple or not all(type(part) is int and part >= 0 for part in section):
        raise ConfigUnsupported("mrope_section", f"{section!r} is not three whole numbers")
    if sum(section) != head_dim // 2:
        raise ConfigUnsupported("mrope_section", f"{section} does not share out {head_dim // 2} frequencies")
    if not rope.get("mrope_interleaved", rope.get("interleaved", True)):
        raise ConfigUnsupported("mrope_interleaved", "only interleaved sections are computed")
    return tuple(section)
