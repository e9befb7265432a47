"""Which routing a service gives by default, and which its clients may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.errors import ApiError, OptionInvalid
from router.effort import EFFORT_CHOICES, EffortChoice
from router.routing_choice import POLICIES, PolicyName, RoutingChoice


@dataclass(frozen=True)
class RoutingRules:
    """Native routing with its own number of experts, the published model, may always be asked for."""

    policy: PolicyName = "native"
    effort: EffortChoice = "focus"
    allowed_policies: tuple[PolicyName, ...] = ()
    allowed_efforts: tuple[EffortChoice, ...] = ()

    @property
    def policies(self) -> tuple[PolicyName, ...]:
        """All that a client may name, the default and native ones included."""
        return tuple(dict.fromkeys((self.policy, "native", *self.allowed_policies)))

    @property
    def efforts(self) -> tuple[EffortChoice, ...]:
        return tuple(dict.fromkeys((self.effort, "focus", *self.allowed_efforts)))

    def choose(
        self, policy: PolicyName | None, effort: EffortChoice | None, *, is_explained: bool
    ) -> RoutingChoice:
        """What a request gets; None stands for the default. Raises ApiError 403 that names what is allowed."""
        _check("policy", policy, self.policies)
        _check("effort", effort, self.efforts)
        return RoutingChoice(policy or self.policy, effort or self.effort, is_explained)


NATIVE_ONLY = RoutingRules()


def read_choice(policy: str, effort: str, *, is_explained: bool) -> RoutingChoice:
    """From words of a command line. Raises OptionInvalid."""
    known_policy = next((name for name in POLICIES if name == policy), None)
    known_effort = next((name for name in EFFORT_CHOICES if name == effort), None)
    if known_policy is None:
        raise OptionInvalid("--policy", f"must be {' or '.join(POLICIES)}, not {policy[:40]!r}")
    if known_effort is None:
        raise OptionInvalid("--effort", f"must be one of {', '.join(EFFORT_CHOICES)}, not {effort[:40]!r}")
    return RoutingChoice(known_policy, known_effort, is_explained)


def _check(name: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        message = f"sage.{name} {value} is not allowed by this service; allowed: {', '.join(allowed)}."
        raise ApiError(403, message, "permission_error", f"sage.{name}", "routing_not_allowed")
