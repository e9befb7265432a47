"""How the rows of one step choose their experts, and who looks on.

A policy turns a layer's gate logits into a `Routing`; watchers see what was chosen and what the experts answered.
Both know whose rows they are. Made by `router.engine` for each step, asked by `router.moe_block` in each layer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from router.dispatch import Dispatch
from router.request import GenerationRequest
from router.routing_choice import RoutingReport
from router.scoring import Routing, route_native

MAX_UNDER_WAY = 4
"""Steps that have begun and not ended, of which something is kept: a prompt's that pauses, and those that failed."""


@dataclass(frozen=True)
class SpanOwner:
    """Consecutive rows of a step and the request that they belong to."""

    request: GenerationRequest
    first: int
    """Position of the first row in the request's text: prompt, then answer."""
    count: int
    tokens: Sequence[int] = ()
    """The request's text as far as it is known, prompt first. It grows; what is there stays as it is."""


@dataclass(frozen=True)
class GateOutput:
    """What one layer's gate says about the T rows of a step."""

    layer: int
    hidden_TD: Tensor
    """The gate's input: normalised hidden states."""
    logits_TE: Tensor
    experts_per_token: int
    """K of the checkpoint."""
    normalise: bool
    """Whether the mixing weights of the chosen experts sum to 1 (`norm_topk_prob`)."""
    level: str | None = None
    """Of our own products, where the model is computed by them."""

    def native(self) -> Routing:
        """The checkpoint's own routing."""
        return self.best(self.logits_TE, self.experts_per_token)

    def best(self, logits_RE: Tensor, k: int) -> Routing:
        """Some rows' best experts, chosen as the checkpoint's own routing does."""
        return route_native(logits_RE, k, self.normalise, self.level)


class RoutingPolicy(Protocol):
    """Chooses experts. Called on the engine's thread, layer after layer."""

    def is_native(self, owners: Sequence[SpanOwner]) -> bool:
        """Whether these rows get `GateOutput.native` in every layer, and nothing is learned from it: then `route` need
        not be called for them."""
        ...

    def route(self, owners: Sequence[SpanOwner], gate: GateOutput) -> Routing: ...


class RoutingReporter(Protocol):
    """Keeps something of requests while they run, and tells it with their tokens. Called on the engine's thread."""

    def report(self, request_id: str) -> RoutingReport | None:
        """What has come together of a request that is not plain. What it explains it explains once."""
        ...

    def forget(self, request_id: str) -> None:
        """The request has ended, however; it may be unknown here."""
        ...

    def abandon(self, owners: Sequence[SpanOwner]) -> None:
        """A step with these rows is over. Where that is before its last layer, nothing of it counts."""
        ...


@dataclass(frozen=True)
class View:
    """What somebody wants to see of a step. What nobody looks at is computed in fewer calls."""

    layers: Collection[int] | None
    """To be shown with their rows; None means all."""
    has_choices: bool = False
    """Whether of the others he wants to know how their rows were routed."""


EVERYTHING, NOTHING = View(None), View(())


class RoutingWatcher(Protocol):
    """Sees layers after their experts were computed. Must not change what it is given."""

    def wanted(self, owners: Sequence[SpanOwner]) -> View:
        """What it must see of a step with these rows; it may be shown more. Asked once a step, before its first layer;
        the same `owners` then come with every layer."""
        return EVERYTHING

    def watch_choices(self, owners: Sequence[SpanOwner], layer: int, routing: Routing) -> None:
        """How the rows of a layer that it is not shown were routed: as the checkpoint says. It may keep it."""
        return

    def watch(
        self,
        owners: Sequence[SpanOwner],
        gate: GateOutput,
        routing: Routing,
        dispatched: Dispatch,
        rows_RD: Tensor,
    ) -> None:
        """rows_RD: the experts' unsummed output rows, in the order of `dispatched.call`."""
        ...


class PromptProbe(Protocol):
    """Asks how well the model predicts a few positions of its prompts. Called on the engine's thread."""

    def positions(self, owner: SpanOwner) -> Sequence[int]:
        """Positions of a span, ascending, whose next token lies in the prompt and whose NLL is wanted."""
        ...

    def scored(self, token_ids: Sequence[int], nll_N: Tensor) -> None:
        """After a step: the tokens that followed all positions asked for, in the order of the step's spans, and their
        negative log-likelihoods in nats, float32; not a number where the logits were none."""
        ...


class NativePolicy:
    """The checkpoint's own routing for everyone."""

    def is_native(self, owners: Sequence[SpanOwner]) -> bool:
        return True

    def route(self, owners: Sequence[SpanOwner], gate: GateOutput) -> Routing:
        return gate.native()


@dataclass(frozen=True)
class StepRouting:
    """Policy and watchers of one step, with the owners of its rows in row order."""

    owners: tuple[SpanOwner, ...] = ()
    policy: RoutingPolicy = field(default_factory=NativePolicy)
    watchers: tuple[RoutingWatcher, ...] = ()

    def shown(self) -> View:
        """What has to be shown of the step, since somebody decides it or needs to see it. Asked once, before its first
        layer."""
        wanted = [watcher.wanted(self.owners) for watcher in self.watchers]
        if not self.policy.is_native(self.owners):
            return EVERYTHING
        layers: set[int] = set()
        for view in wanted:
            if view.layers is None:
                return EVERYTHING
            layers.update(view.layers)
        return View(layers, any(view.has_choices for view in wanted))

    def route(self, gate: GateOutput) -> Routing:
        return self.policy.route(self.owners, gate)

    def watch_choices(self, layer: int, routing: Routing) -> None:
        for watcher in self.watchers:
            watcher.watch_choices(self.owners, layer, routing)

    def watch(self, gate: GateOutput, routing: Routing, dispatched: Dispatch, rows_RD: Tensor) -> None:
        for watcher in self.watchers:
            watcher.watch(self.owners, gate, routing, dispatched, rows_RD)


NATIVE = StepRouting()
