"""What a component's published names mean: experts one by one or stacked, and everything else.

Pure; called by `extraction.layouts`. Canonical names of a decoder's backbone are the same in every family: those of
Qwen3-MoE without the leading `model.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from extraction.decoder_config import DecoderShape
from extraction.errors import TensorUnexpected
from extraction.manifest import NAME_PATTERN, ROLES, ExpertKey

_NUMBER = "0|[1-9][0-9]{0,5}"
"""One spelling a number: neither leading zeros nor other scripts' digits."""
_EXPERT = re.compile(
    rf"layers\.(?P<layer>{_NUMBER})\.mlp\.experts\.(?P<expert>{_NUMBER})\.(?P<projection>[a-z0-9_]+)\.weight"
)
_STACK = re.compile(rf"layers\.(?P<layer>{_NUMBER})\.mlp\.experts\.(?P<stack>gate_up_proj|down_proj)")
QWEN_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


@dataclass(frozen=True)
class ExpertTensor:
    """One projection of one expert."""

    key: ExpertKey
    role: str


@dataclass(frozen=True)
class BackboneTensor:
    """A tensor of a component's backbone under its canonical name."""

    component: str
    name: str


@dataclass(frozen=True)
class TensorSlice:
    """A part of a stacked tensor: consecutive elements, seen as a matrix."""

    first_element: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """What a published tensor, or a slice of it, is."""

    place: ExpertTensor | BackboneTensor
    slice: TensorSlice | None = None
    """None means the whole tensor."""


@dataclass(frozen=True)
class ComponentLayout:
    """What a checkpoint of one configuration must hold for one component."""

    name: str
    config: Mapping[str, Any]
    prefixes: tuple[str, ...]
    """Of its published names. What follows the longest that fits is the canonical name, up to `renames`."""
    decoder: DecoderShape | None = None
    """None means a component without experts whose tensors are carried as they are, whatever their shapes."""
    renames: tuple[tuple[str, str], ...] = ()
    """Parts of published names, and what they are called here."""
    role_of: Mapping[str, str] = field(default_factory=lambda: QWEN_ROLES)
    """Published names of an expert's projections."""
    backbone_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By canonical name. Not used where `decoder` is None."""
    is_dense_decoder: bool = False
    """Carried, but its matrices are named like a decoder's: what quantises those means them too."""
    carried_names: frozenset[str] = frozenset()
    """Canonical names that a component without a decoder must have; others are carried too."""

    @property
    def experts(self) -> frozenset[ExpertKey]:
        decoder = self.decoder
        if decoder is None:
            return frozenset()
        numbers = range(decoder.num_experts)
        return frozenset(
            ExpertKey(self.name, layer, number) for layer in decoder.moe_layers for number in numbers
        )

    def canonical(self, rest: str) -> str:
        """The canonical name, from what follows the prefix of a published one."""
        for published, ours in self.renames:
            rest = rest.replace(published, ours)
        return rest

    def place(self, name: str, rest: str, shape: tuple[int, ...]) -> tuple[Placement, ...]:
        """What the tensor is, slice by slice. `rest`: what follows the prefix in its name.

        Raises TensorUnexpected for a name or shape that the configuration does not imply.
        """
        canonical = self.canonical(rest)
        if self.decoder is None:
            if not re.fullmatch(NAME_PATTERN, canonical):
                raise TensorUnexpected(name, f"is no name of a tensor of component {self.name}")
            return (Placement(BackboneTensor(self.name, canonical)),)
        if match := _EXPERT.fullmatch(canonical):
            return self._place_projection(name, shape, match, self.decoder)
        if match := _STACK.fullmatch(canonical):
            return self._place_stack(name, shape, match, self.decoder)
        expected = self.backbone_shapes.get(canonical)
        if expected is None:
            raise TensorUnexpected(name, f"is not known in component {self.name}")
        _check_shape(name, shape, expected)
        return (Placement(BackboneTensor(self.name, canonical)),)

    def is_ignored(self, rest: str) -> bool:
        """Tensors that some programs write although the configuration does not use them."""
        canonical = self.canonical(rest)
        is_tied_head = canonical == "lm_head.weight" and canonical not in self.backbone_shapes
        return self.decoder is not None and (is_tied_head or canonical.endswith("rotary_emb.inv_freq"))

    def expected(self) -> set[ExpertTensor | BackboneTensor]:
        """Everything that must be there."""
        experts = {ExpertTensor(key, role) for key in self.experts for role in ROLES}
        names = self.carried_names.union(self.backbone_shapes)
        return experts | {BackboneTensor(self.name, name) for name in names}

    def _place_projection(
        self, name: str, shape: tuple[int, ...], match: re.Match[str], decoder: DecoderShape
    ) -> tuple[Placement, ...]:
        role = self.role_of.get(match["projection"])
        if role is None:
            raise TensorUnexpected(name, f"is not known in component {self.name}")
        key = ExpertKey(self.name, int(match["layer"]), int(match["expert"]))
        if key.layer not in decoder.moe_layers or key.expert >= decoder.num_experts:
            raise TensorUnexpected(name, "the configuration has no such expert")
        _check_shape(name, shape, decoder.expert_shape(role))
        return (Placement(ExpertTensor(key, role)),)

    def _place_stack(
        self, name: str, shape: tuple[int, ...], match: re.Match[str], decoder: DecoderShape
    ) -> tuple[Placement, ...]:
        """`gate_up_proj` (E, 2F, D), gate rows first, or `down_proj` (E, D, F): a layer's experts in one tensor."""
        layer, experts = int(match["layer"]), decoder.num_experts
        width, expert_width = decoder.hidden_size, decoder.expert_width
        if layer not in decoder.moe_layers:
            raise TensorUnexpected(name, "the configuration has no experts in this layer")
        roles, expected = ["down"], (experts, width, expert_width)
        if match["stack"] == "gate_up_proj":
            roles, expected = ["gate", "up"], (experts, 2 * expert_width, width)
        _check_shape(name, shape, expected)
        size = width * expert_width
        return tuple(
            Placement(
                ExpertTensor(ExpertKey(self.name, layer, expert), role),
                TensorSlice((expert * len(roles) + index) * size, decoder.expert_shape(role)),
            )
            for expert in range(experts)
            for index, role in enumerate(roles)
        )


def _check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise TensorUnexpected(name, f"has shape {list(shape)}, the configuration implies {list(expected)}")
