"""What people who study routing ask of one run in this process: a trace, masked experts, replayed routing.

Called by `gateway.local.generate` and `gateway.evaluation.run`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from gateway.errors import OptionInvalid
from router.loading import LoadedEngine
from router.mask import MaskPolicy, parse_mask
from router.replay import ReplayPolicy
from router.routing_choice import RoutingChoice
from router.step_routing import RoutingPolicy
from router.trace import RoutingTrace
from router.trace_file import TraceFacts
from router.trace_reader import read_trace

PolicyLabel = Literal["native", "masked", "replayed"]


@dataclass(frozen=True)
class Study:
    """Raises OptionInvalid for two ways of routing at once, MaskInvalid for a mask that cannot be read."""

    trace: Path | None = None
    mask: str | None = None
    replay: Path | None = None

    def __post_init__(self) -> None:
        if self.mask is not None and self.replay is not None:
            raise OptionInvalid("--mask-experts", "does not go with --replay-routing: both say who is chosen")
        if self.mask is not None:
            parse_mask(self.mask)

    @property
    def policy(self) -> PolicyLabel:
        return "masked" if self.mask is not None else "replayed" if self.replay is not None else "native"

    def policy_beside(self, routing: RoutingChoice) -> str:
        """As answers, results and traces name it. Raises OptionInvalid where both change the routing."""
        if self.policy != "native" and not routing.is_plain:
            raise OptionInvalid(
                "--policy", f"(with --effort and --explain) does not go with {self.policy} routing"
            )
        return routing.policy if self.policy == "native" else self.policy


NO_STUDY = Study()


@contextmanager
def studied(loaded: LoadedEngine, study: Study, policy_name: str) -> Iterator[None]:
    """The engine routes and is watched as asked while the context lasts; a trace that ended in an error is dropped.

    policy_name: as the trace names it; see `Study.policy_beside`. Raises TraceFailed, TraceInvalid or MaskInvalid.
    """
    engine = loaded.engine
    policy = _routing_policy(loaded, study)
    trace = None
    if study.trace is not None:
        trace = RoutingTrace.to_file(study.trace, trace_facts(loaded, policy_name, has_tokens=True))
    before = engine.policy, engine.watchers, engine.kv.scope
    if policy is not None or trace is not None:
        engine.kv.scope = None  # a trace has every position, and other routing has other keys and values
    if policy is not None:
        engine.policy = policy
    if trace is not None:
        engine.watchers = (*engine.watchers, trace)
    is_done = False
    try:
        yield
        is_done = True
    finally:
        engine.policy, engine.watchers, engine.kv.scope = before
        if trace is not None:
            trace.close(is_kept=is_done)


def _routing_policy(loaded: LoadedEngine, study: Study) -> RoutingPolicy | None:
    if study.mask is not None:
        return MaskPolicy(parse_mask(study.mask), loaded.config)
    if study.replay is not None:
        return ReplayPolicy(read_trace(study.replay), loaded.config, str(study.replay))
    return None


def trace_service(loaded: LoadedEngine, folder: Path, *, has_tokens: bool) -> RoutingTrace:
    """Trace what an engine computes from now on, into parts of a folder that other starts may share.

    Requests may ask for their own routing, so that the policy is called mixed. Raises TraceFailed.
    """
    facts = trace_facts(loaded, "mixed", has_tokens=has_tokens)
    started = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    trace = RoutingTrace.to_folder(folder, f"trace-{started}-{secrets.token_hex(3)}", facts)
    loaded.engine.watchers = (*loaded.engine.watchers, trace)
    loaded.engine.kv.scope = None  # a trace has every position
    return trace


def trace_facts(loaded: LoadedEngine, policy: str, *, has_tokens: bool) -> TraceFacts:
    config = loaded.config
    return TraceFacts(
        store=loaded.store.hash,
        component=loaded.store.served.name,
        policy=policy,
        num_layers=config.num_layers,
        num_experts=config.num_experts,
        experts_per_token=config.experts_per_token,
        numerics_class=loaded.numerics_class,
        sage_moe=program_version(),
        has_tokens=has_tokens,
    )


def program_version() -> str:
    try:
        return version("sage-moe")
    except PackageNotFoundError:
        return "unknown"
