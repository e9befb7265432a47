"""All experts of one layer as our own products take them, for a caller that chooses among them by itself.

Exists where they are in this process's memory for good. Made by `experts.worker`, used by `router.native_step`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from experts.native_products import GatedMatrices
from extraction.manifest import ExpertKey


@dataclass(frozen=True)
class ExpertTable:
    """Experts 0 to E - 1. Holds on to their weights."""

    keys: tuple[ExpertKey, ...]
    experts: tuple[GatedMatrices, ...]
    addresses: array[int]
    """Four an expert: codes and scales of gate and up, and of down."""

    @classmethod
    def of(cls, keys: Sequence[ExpertKey], experts: Sequence[GatedMatrices]) -> ExpertTable | None:
        """None where they cannot be in one call: without experts, or with matrices of several forms."""
        if not experts or any(expert.forms is not experts[0].forms for expert in experts):
            return None
        addresses = array("Q", b"".join(expert.addresses for expert in experts))
        return cls(tuple(keys), tuple(experts), addresses)

    @property
    def forms(self) -> tuple[int, ...]:
        """Kind, group, outputs, inputs of gate and up together, and of down."""
        return self.experts[0].forms
