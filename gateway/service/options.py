"""What a service is started with, made of the options that a user gave (`gateway.service.option_values`).

Here is what options mean together. Called by `gateway.service.command`; `gateway.service.launch` gets the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cluster.placement import Grouping
from experts.budget import FIT, BudgetRequest
from experts.devices import CPU, resolve_device
from experts.eviction import DEFAULT_EVICTION, Eviction
from experts.store_source import CacheSpec
from gateway.byte_sizes import format_budget, format_bytes
from gateway.errors import OptionInvalid
from gateway.http.api_keys import NO_KEYS, KeyRing
from gateway.http.routing_rules import NATIVE_ONLY, RoutingRules
from gateway.service.option_values import (
    BATCH_TOKENS,
    DEFAULT_AUDIT_SHARE,
    DEFAULT_REPLICAS,
    MAX_ACTORS,
    MAX_SHOWN_CHARS,
    CapacityMode,
    OptionValues,
)
from gateway.service.state_folder import resolve_state_folder
from router.scoring import DEFAULT_PRESET, PRESETS, SnarcWeights

LEAVE_ACTORS_OUT = (
    "goes with address or with actors, not with both: on a cluster leave actors out, "
    "and the machines place them"
)


@dataclass(frozen=True)
class ServiceOptions:
    """What the service is started with. Made by `compose_options`, which has checked every value."""

    store_root: Path
    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    num_actors: int = 0
    dtype: str | None = None
    ray_address: str | None = None
    """Of a Ray that runs already, `auto` or HOST:PORT; None starts one for this service."""
    is_placed: bool = False
    """Whether actors are placed on the machines of that Ray by what these are, in place of `num_actors` alike."""
    replicas: int = DEFAULT_REPLICAS
    """Most actors of a group, on different machines, where memory is left."""
    grouping: Grouping = "expert"
    demand_trace: Path | None = None
    """By which experts are expected to be used; None goes by what trust was learned from, or evenly."""
    num_cpus: int | None = None
    """What a Ray that is started counts as its CPUs; None means the machine's."""
    model_aliases: tuple[str, ...] = ()
    """Further names that requests may use; answers carry `model_name`."""
    max_model_len: int | None = None
    """Most tokens of prompt and answer together; None means the model's context."""
    max_num_seqs: int = 64
    max_queue: int = 256
    max_batch_tokens: int = BATCH_TOKENS
    kv_budget_bytes: int = 2**30
    eviction: Eviction = DEFAULT_EVICTION
    is_prefetching: bool = False
    """Whether the router's process reads experts ahead by the next layer's gate."""
    capacity: CapacityMode = "fixed"
    audit_share: float = DEFAULT_AUDIT_SHARE
    """Share of expert actors' answers that are computed again elsewhere and compared."""
    device: torch.device = CPU
    """Of the router: its backbone, its cache, and the experts that it computes itself."""
    expert_device: str = "cpu"
    """Of expert actors: `cpu`, or `cuda` for cards of which Ray gives them shares; where machines are asked also
    `auto`, for those that have one."""
    expert_budgets: tuple[BudgetRequest, ...] = (FIT,)
    """Bytes of experts on each node, added up; the experts' tiers on a machine that computes in host memory."""
    host_budgets: tuple[BudgetRequest, ...] = ()
    """Of host memory behind another device than the CPU."""
    node_budgets: Mapping[str, BudgetRequest] = field(default_factory=dict)
    """In place of `expert_budgets`, by node name or address."""
    store_copies: tuple[Path, ...] = ()
    """Further folders of the same store, read where it fails."""
    store_cache: CacheSpec | None = None
    """Where machines that do not have the store keep what they fetch of it; None expects it everywhere."""
    keys: KeyRing = NO_KEYS
    cors_origins: tuple[str, ...] = ()
    trace_folder: Path | None = None
    """Where the router writes which experts each token was given; None means nowhere."""
    is_trace_with_tokens: bool = False
    """Whether traces hold token ids, which give the prompts away."""
    routing: RoutingRules = NATIVE_ONLY
    snarc: SnarcWeights = PRESETS[DEFAULT_PRESET]
    is_trust_learned: bool = True
    has_prefix_cache: bool = True
    """Whether keys and values of earlier requests are used again where one begins alike."""
    has_media: bool = True
    """Whether images and sound are taken where the model does."""
    has_speech: bool = True
    """Whether answers are spoken where the model does."""
    speech_budget: BudgetRequest | None = None
    """Of the experts that speak, in each router; None means all of them."""
    state_dir: str | None = None
    """Where what is learned is kept; None means the user's state folder."""
    actor_range: tuple[int, int] | None = None
    """Fewest and most expert actors, where their number follows the load."""
    num_routers: int = 1
    resume_timeout_s: int = 60
    """How long a request whose router was lost waits for another."""

    def __post_init__(self) -> None:
        if self.max_num_seqs > self.max_batch_tokens:
            reason = f"({self.max_num_seqs}) is above max-batch-tokens ({self.max_batch_tokens}): "
            raise OptionInvalid("max-num-seqs", f"{reason}each running request needs a row in every step")
        if self.is_trace_with_tokens and self.trace_folder is None:
            raise OptionInvalid("trace-tokens", "goes with trace, which says where traces are written")
        if self.device.type != "cpu" and self.num_routers > 1:
            raise OptionInvalid("device", f"({self.device}) goes with one router, not {self.num_routers}")
        if self.device.type != "cpu" and self.ray_address is not None and self.num_actors:
            raise OptionInvalid("device", f"({self.device}) {LEAVE_ACTORS_OUT}")
        if self.speech_budget is not None and not self.has_speech:
            raise OptionInvalid("speech-budget", "goes with speech, which is off")
        if self.is_prefetching and self.is_placed:
            raise OptionInvalid("prefetch", "goes with no expert actors, which a cluster may get")
        if self.is_prefetching and self.num_actors:
            raise OptionInvalid(
                "prefetch", f"goes with no expert actors, not {self.num_actors}: they do not read ahead"
            )
        if "*" in self.cors_origins and not self.keys:
            reason = "* without an API key lets every web page use the service; name origins or give a key"
            raise OptionInvalid("cors-origin", reason)

    @property
    def has_cards(self) -> bool:
        """Whether any process computes on a card."""
        return self.device.type != "cpu" or self.expert_device != "cpu"

    def shown(self) -> dict[str, Any]:
        """For people: option names, sizes with units, and of the keys their number."""
        return {
            "store": str(self.store_root),
            "served-model-name": [self.model_name, *self.model_aliases],
            "host": self.host,
            "port": self.port,
            "address": self.ray_address,
            "actors": "placed by the machines" if self.is_placed else self.num_actors,
            "replicas": self.replicas if self.is_placed else None,
            "grouping": self.grouping if self.is_placed else None,
            "demand": str(self.demand_trace) if self.demand_trace else None,
            "autoscale": self.actor_range is not None,
            "min-actors": self.actor_range[0] if self.actor_range else None,
            "max-actors": self.actor_range[1] if self.actor_range else None,
            "routers": self.num_routers,
            "resume-timeout": self.resume_timeout_s,
            "dtype": self.dtype or "as stored",
            "max-model-len": self.max_model_len or "the model's context",
            "max-num-seqs": self.max_num_seqs,
            "max-queue": self.max_queue,
            "max-batch-tokens": self.max_batch_tokens,
            "kv-budget": format_bytes(self.kv_budget_bytes),
            "eviction": self.eviction,
            "prefetch": self.is_prefetching,
            "capacity": self.capacity,
            "audit-share": self.audit_share,
            "device": str(self.device),
            "expert-device": self.expert_device if self.num_actors or self.is_placed else None,
            "expert-budget": " + ".join(map(format_budget, self.expert_budgets)),
            "host-budget": " + ".join(map(format_budget, self.host_budgets)) or None,
            "node-budgets": {name: format_budget(budget) for name, budget in self.node_budgets.items()},
            "store-copy": [str(path) for path in self.store_copies],
            "store-cache": self.store_cache.folder if self.store_cache else None,
            "store-cache-limit": _shown_limit(self.store_cache),
            "api-keys": len(self.keys),
            "cors-origin": list(self.cors_origins),
            "trace": str(self.trace_folder) if self.trace_folder else None,
            "trace-tokens": self.is_trace_with_tokens,
            "policy": self.routing.policy,
            "effort": self.routing.effort,
            "allow-policy": list(self.routing.policies),
            "allow-effort": list(self.routing.efforts),
            "snarc": asdict(self.snarc),
            "trust": self.is_trust_learned,
            "prefix-cache": self.has_prefix_cache and self.trace_folder is None,
            "media": self.has_media,
            "speech": self.has_speech,
            "speech-budget": _shown_speech_budget(self.has_speech, self.speech_budget),
            "state-dir": str(resolve_state_folder(self.state_dir)),
        }


def compose_options(values: OptionValues, store_root: Path, store_name: str, keys: KeyRing) -> ServiceOptions:
    """Raises OptionInvalid for values that do not go together, DeviceUnavailable. store_name: what the model is called
    without a name."""
    device = resolve_device(values.device)
    is_on_card = computes_on_cards(values, device)
    expert_budgets, host_budgets = tiers(is_on_card, values.expert_budget, values.host_budget)
    name, *aliases = dict.fromkeys(values.served_model_name or (store_name,))
    return ServiceOptions(
        store_root,
        name,
        values.host,
        values.port,
        values.actors or 0,
        values.dtype,
        values.address,
        **_placing(values),
        model_aliases=tuple(aliases),
        max_model_len=values.max_model_len,
        max_num_seqs=values.max_num_seqs,
        max_queue=values.max_queue,
        max_batch_tokens=values.max_batch_tokens,
        kv_budget_bytes=values.kv_budget,
        eviction=values.eviction,
        is_prefetching=values.prefetch,
        capacity=values.capacity,
        audit_share=values.audit_share,
        device=device,
        expert_device=_expert_device(values),
        expert_budgets=expert_budgets,
        host_budgets=host_budgets,
        node_budgets=values.node_budgets,
        store_copies=tuple(Path(folder) for folder in dict.fromkeys(values.store_copy)),
        store_cache=_store_cache(values),
        keys=keys,
        cors_origins=tuple(dict.fromkeys(values.cors_origin)),
        trace_folder=None if values.trace is None else Path(values.trace),
        is_trace_with_tokens=values.trace_tokens,
        routing=RoutingRules(values.policy, values.effort, values.allow_policy, values.allow_effort),
        snarc=values.snarc,
        is_trust_learned=values.trust,
        has_prefix_cache=values.prefix_cache,
        has_media=values.media,
        has_speech=values.speech,
        speech_budget=values.speech_budget,
        state_dir=values.state_dir,
        actor_range=_actor_range(values),
        num_routers=values.routers,
        resume_timeout_s=values.resume_timeout,
    )


def computes_on_cards(values: OptionValues, device: torch.device) -> bool:
    """Whether budgets of experts are of cards' memory, and of host memory there are others. device: the router's."""
    kinds = [_expert_device(values) if values.actors else device.type]
    if is_placed(values):
        kinds.append(values.expert_device)
    return any(kind != "cpu" for kind in kinds)


def _expert_device(values: OptionValues) -> str:
    """Of other machines nothing is known yet. What a machine has decides nothing of what goes together."""
    given = values.expert_device
    if is_placed(values) or given == "cpu":
        return given
    if values.address is not None:
        raise OptionInvalid("expert-device", f"({given}) {LEAVE_ACTORS_OUT}")
    if not values.actors:
        reason = f"({given}) goes with actors: without, the router computes experts, on device"
        raise OptionInvalid("expert-device", reason)
    return resolve_device(given, "expert-device").type


def is_placed(values: OptionValues) -> bool:
    """A number of actors means equal groups, on whatever machines."""
    return values.address is not None and values.actors is None


def _placing(values: OptionValues) -> dict[str, Any]:
    if not is_placed(values):
        given = {
            "replicas": values.replicas != DEFAULT_REPLICAS,
            "grouping": values.grouping != "expert",
            "demand": values.demand is not None,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise OptionInvalid(
                name, "goes with address and without actors: they are then placed by the machines"
            )
    return {
        "is_placed": is_placed(values),
        "replicas": values.replicas,
        "grouping": values.grouping,
        "demand_trace": None if values.demand is None else Path(values.demand),
    }


def _actor_range(values: OptionValues) -> tuple[int, int] | None:
    """Where the number of actors follows the load: from none up to those of the start, unless told otherwise; where the
    machines decide how many groups there are, up to `replicas` of each."""
    given = {"min-actors": values.min_actors, "max-actors": values.max_actors}
    if not values.autoscale:
        for name, number in given.items():
            if number is not None:
                raise OptionInvalid(
                    name, "goes with autoscale, which lets the number of actors follow the load"
                )
        return None
    least = values.min_actors or 0
    if is_placed(values):
        most = MAX_ACTORS if values.max_actors is None else values.max_actors
        if least > most:
            raise OptionInvalid("min-actors", f"({least}) is above max-actors ({most})")
        return least, most
    if not values.actors:
        raise OptionInvalid(
            "autoscale",
            "goes with actors, which says in how many groups experts are dealt out, or with address, by whose machines "
            "they are placed",
        )
    most = values.actors if values.max_actors is None else values.max_actors
    if not least <= values.actors <= most:
        reason = f"({values.actors}) is not from min-actors ({least}) to max-actors ({most})"
        raise OptionInvalid("actors", reason)
    return least, most


def _store_cache(values: OptionValues) -> CacheSpec | None:
    if values.store_cache is None:
        if values.store_cache_limit is not None:
            raise OptionInvalid("store-cache-limit", "goes with store-cache, which names the folder")
        return None
    if not values.actors and not is_placed(values):
        raise OptionInvalid(
            "store-cache", "goes with actors or address: what the router computes is read from its store"
        )
    if not Path(values.store_cache).is_absolute():
        reason = f"must be an absolute path, the same on every machine, not {values.store_cache[:MAX_SHOWN_CHARS]!r}"
        raise OptionInvalid("store-cache", reason)
    return CacheSpec(values.store_cache, values.store_cache_limit)


def _shown_speech_budget(has_speech: bool, budget: BudgetRequest | None) -> str | None:
    if not has_speech:
        return None
    return "all of them" if budget is None else format_budget(budget)


def _shown_limit(cache: CacheSpec | None) -> str | None:
    return None if cache is None or cache.limit_bytes is None else format_bytes(cache.limit_bytes)


def tiers(
    is_on_card: bool, expert_budget: BudgetRequest | None, host_budget: BudgetRequest | None
) -> tuple[tuple[BudgetRequest, ...], tuple[BudgetRequest, ...]]:
    """What is asked for of the memory of the cards that compute experts, where nothing given is `fit`, and of host
    memory beside it.

    Where experts are computed in host memory the two are one, and what is given of them is added up.
    """
    if is_on_card:
        return (expert_budget or FIT,), () if host_budget is None else (host_budget,)
    given = tuple(budget for budget in (expert_budget, host_budget) if budget is not None)
    return given or (FIT,), ()
