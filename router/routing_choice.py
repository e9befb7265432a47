"""What a request may ask of its routing, and what its answer says about it. Plain data, shared with the gateway."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from router.effort import Effort, EffortChoice

PolicyName = Literal["native", "snarc"]
POLICIES: tuple[PolicyName, ...] = ("native", "snarc")
MAX_EXPLAINED = 4096
"""Most (token, layer) pairs of one sequence that are explained; the first ones are."""


@dataclass(frozen=True)
class RoutingChoice:
    """How one sequence is routed. The default is the published model."""

    policy: PolicyName = "native"
    effort: EffortChoice = "focus"
    is_explained: bool = False
    reward: float | None = None
    """In [0, 1], from feedback on earlier answers, as it was when the request came; None where there was none."""

    @property
    def is_native(self) -> bool:
        return self.policy == "native" and self.effort == "focus"

    @property
    def is_plain(self) -> bool:
        """Whether nothing has to be done beyond the checkpoint's own routing."""
        return self.is_native and not self.is_explained


NATIVE_CHOICE = RoutingChoice()


class ExplainedExpert(NamedTuple):
    """One chosen expert: its mixing weight, and the parts whose sum is its score."""

    expert: int
    weight: float
    gate: float
    salience: float
    trust: float
    warmth: float
    stood_in: bool = False
    """Whether its mean output took its place."""


class ExplainedLayer(NamedTuple):
    """Why one token got its experts in one layer."""

    position: int
    """In prompt and answer together."""
    layer: int
    experts: tuple[ExplainedExpert, ...]
    """By rank, best first."""
    signals: tuple[float, float, float, float, float]
    """Surprise, novelty, arousal, reward, conflict."""


@dataclass(frozen=True)
class RoutingReport:
    """How a sequence was routed so far, told with its tokens."""

    choice: RoutingChoice
    native_k: int
    num_experts: int
    num_layers: int
    """Layers with experts."""
    tokens_at: tuple[int, int, int] = (0, 0, 0)
    """Tokens computed at WAKE, FOCUS and CRISIS. A token that was computed again counts again."""
    misses: int = 0
    """Chosen experts that were not resident when they were chosen, and were computed."""
    stand_ins: int = 0
    """Chosen experts whose mean output took their place."""
    explained: tuple[ExplainedLayer, ...] = ()
    """Since the report before; the other fields are totals."""
    is_cut: bool = False
    """Whether there was more to explain than MAX_EXPLAINED."""
    efforts: tuple[Effort, ...] = ()
    """Of `auto`: what each token reported since the report before will be computed at."""
    num_resumed: int = 0
    """How often the sequence went on in another router that chose anew for its tokens so far. Routing that is a
    function of the request, as native routing is, chooses the same and is not counted."""

    def after(self, earlier: RoutingReport | None) -> RoutingReport:
        """Both in one."""
        if earlier is None:
            return self
        explained, efforts = earlier.explained + self.explained, earlier.efforts + self.efforts
        return replace(self, explained=explained, efforts=efforts)
