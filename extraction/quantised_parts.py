"""Which parts of a store are quantised, and how: experts, the backbone's linear layers, the head. Pure.

Embeddings, norms, biases and gates never are: they are small, or choose what everything after them computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from extraction.quantise import Quantization

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
_HEAD = re.compile(r"lm_head(\.[0-9]+)?\.weight")
"""The code predictor has one for each code that it draws."""
_LINEAR = re.compile(
    r"layers\.[0-9]+\.(self_attn\.[qkvo]_proj|mlp\.(shared_expert\.)?(gate|up|down)_proj)\.weight"
)


@dataclass(frozen=True)
class QuantisedParts:
    """Each part's form; None where it is in a float dtype."""

    experts: Quantization | None = None
    backbone: Quantization | None = None
    """Of every decoder layer's attention projections, dense layers and shared experts."""
    head: Quantization | None = None

    @property
    def name(self) -> str | None:
        """`int8`, `int4-g32+backbone-int8+head-int8`, `head-int8`: what answers say; None where nothing is."""
        named = {"": self.experts, "backbone-": self.backbone, "head-": self.head}
        return "+".join(prefix + part.name for prefix, part in named.items() if part is not None) or None

    def of_tensor(self, name: str) -> Quantization | None:
        """Of a decoder's backbone tensor, the code predictor's too, by its canonical name."""
        if _HEAD.fullmatch(name):
            return self.head
        return self.backbone if _LINEAR.fullmatch(name) else None


NOT_QUANTISED = QuantisedParts()
