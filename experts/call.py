"""One layer's work for a set of experts: what a router asks and what an expert worker computes.

The same struct is computed in the router's process and sent over the wire, so a token's way reads the same
on both. Called by `router.dispatch` (builds), `experts.worker` (computes), `experts.connection` and
`experts.server` (carry).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ExpertCall(NamedTuple):
    """Rows of one layer for some of its experts.

    Output row r (R in all) is expert `experts[g]` applied to `tokens_TD[token_of_R[r]]`, where g is the
    segment that r falls in: the first `counts[0]` output rows belong to `experts[0]`, and so on. Each token's
    activation is thus carried once, however many of its experts are asked for.
    """

    component: str
    layer: int
    experts: tuple[int, ...]
    """Distinct expert numbers, ascending."""
    counts: tuple[int, ...]
    """Rows of each expert, all at least 1; their sum is R."""
    token_of_R: tuple[int, ...]
    """For each output row, which of the T token rows is its input."""
    tokens_TD: torch.Tensor
    """Activations in the expert dtype, contiguous, on the caller's device."""
    request_id: str = ""
    """Trace id for logs; at most 64 ASCII characters."""

    @property
    def num_rows(self) -> int:
        return len(self.token_of_R)

    def validate(self) -> None:
        """Raises ValueError when the fields disagree with each other."""
        if len(self.experts) != len(self.counts):
            raise ValueError(f"{len(self.experts)} experts but {len(self.counts)} counts")
        if any(low >= high for low, high in zip(self.experts, self.experts[1:], strict=False)):
            raise ValueError("experts are not distinct and ascending")
        if not self.counts:
            raise ValueError("the call asks for no rows")
        if any(count < 1 for count in self.counts) or sum(self.counts) != self.num_rows:
            raise ValueError(f"counts {self.counts} do not cover {self.num_rows} rows")
        num_tokens = self.tokens_TD.shape[0]
        if self.tokens_TD.dim() != 2 or any(not 0 <= t < num_tokens for t in self.token_of_R):
            raise ValueError(f"row map reaches outside the {num_tokens} token rows")
