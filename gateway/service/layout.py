"""What a service runs where, and how much of it: threads, memory, actors and the engine, from options and store.

Starts nothing. On the machines of a cluster `gateway.service.placing` decides in place of `lay_out_here`. Called by
`gateway.service.launch`.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.autoscaler import ScalerSettings
from cluster.memory_plan import MemoryPlan, Node, choose_requests
from cluster.placement import plan_local
from cluster.plan import CardShare, ServicePlan
from cluster.resources import ThreadPlan, plan_spin_s, plan_threads
from experts.cores import num_cores
from experts.loader import check_copies
from experts.store import ExpertStore
from extraction.manifest import ExpertKey
from gateway.errors import OptionInvalid
from gateway.service.memory import cards_here, plan_service, plan_service_on_cards, with_speech_budget
from gateway.service.options import ServiceOptions
from gateway.service.state_folder import resolve_state_folder
from router.batcher import BatchLimits
from router.footprint import measure_footprint
from router.loading import EngineOptions, stored_dtype
from router.means_keeper import StandInOptions
from router.model_config import ModelConfig, read_model_config
from router.trust_options import TrustOptions

if TYPE_CHECKING:
    from cluster.service_spec import Placing, Scaling


@dataclass(frozen=True)
class Layout:
    """What is to run where."""

    plan: ServicePlan
    memory: MemoryPlan
    threads_per_actor: int
    spin_s: float
    placing: Placing | None = None
    """How the plan follows the machines; None on one machine."""
    card_share: CardShare | None = None
    """Of every actor, where actors compute on this machine's cards."""


def read_model(options: ServiceOptions) -> tuple[ModelConfig, str]:
    """The model's configuration and the dtype to compute in. Raises OptionInvalid for a context it does not have, and
    StoreDamaged for a copy that is none."""
    with closing(ExpertStore.open(options.store_root)) as store:
        config = read_model_config(store.served.config)
        dtype = options.dtype or stored_dtype(store)
        check_copies(store, options.store_copies)
    if (options.max_model_len or 0) > config.max_position_embeddings:
        reason = f"({options.max_model_len}) is above the model's context of {config.max_position_embeddings}"
        raise OptionInvalid("max-model-len", reason)
    return config, dtype


def plan_service_threads(options: ServiceOptions, config: ModelConfig) -> ThreadPlan:
    return plan_threads(num_cores(), options.num_actors, config.expert_elements, options.num_routers)


def lay_out_here(options: ServiceOptions, engine: EngineOptions, threads: ThreadPlan, node: Node) -> Layout:
    """Everything on one machine, in `num_actors` equal groups. Raises like `plan_service`."""
    with closing(ExpertStore.open(options.store_root)) as store:
        budgets = (options.expert_budgets, options.node_budgets)
        if not options.has_cards:
            memory = plan_service(store, engine, options.num_actors, *budgets, node, options.num_routers)
        else:
            actors = options.num_actors, options.expert_device
            asked = choose_requests(options.expert_budgets, options.node_budgets, node)
            tiers = asked, options.host_budgets
            memory = plan_service_on_cards(store, engine, *actors, *tiers, node, options.num_routers)
        keys = store.expert_keys(store.served.name)
    card_share = _card_share(options, memory)
    plan = plan_local(keys, options.num_actors, memory.actor_budgets, card_share)
    spin_s = plan_spin_s(num_cores(), options.num_actors, threads.expert_actor, options.num_routers)
    return Layout(plan, memory, threads.expert_actor, spin_s, card_share=card_share)


def _card_share(options: ServiceOptions, memory: MemoryPlan) -> CardShare | None:
    """Of every actor, where actors compute on this machine's cards. Raises OptionInvalid."""
    if not memory.actor_host_budgets:
        return None
    cards = cards_here()
    if cards.number > 1 and options.actor_range is not None:
        reason = f"goes with one card, not {cards.number}: which of them has room is not known while the number changes"
        raise OptionInvalid("autoscale", reason)
    return CardShare(1 / cards.most_beside(options.num_actors), min(memory.actor_host_budgets))


def record_bytes(options: ServiceOptions) -> dict[ExpertKey, int]:
    with closing(ExpertStore.open(options.store_root)) as store:
        return {key: store.record(key).nbytes for key in store.expert_keys(store.served.name)}


def plan_scaling(
    options: ServiceOptions, engine: EngineOptions, card_share: CardShare | None = None
) -> Scaling | None:
    """How the number of actors follows the load, where it does."""
    if options.actor_range is None:
        return None
    from cluster.node_report import UNKNOWN_DISK_BYTES_S
    from cluster.node_speed import measure_disk
    from cluster.service_spec import Scaling

    with closing(ExpertStore.open(options.store_root)) as store:
        expert_bytes = measure_footprint(store, engine).experts.largest
        per_token = read_model_config(store.served.config).experts_per_token
        records = (store.record(key) for key in store.expert_keys(store.served.name))
        files = dict.fromkeys(part.file for record in records for part in record.parts)
    least, most = options.actor_range
    paths = (options.store_root / name for name in files)
    read_bytes_s = measure_disk(paths, options.store_root) or UNKNOWN_DISK_BYTES_S
    replicas = options.replicas if options.is_placed else None
    settings = ScalerSettings(most, least, replicas)
    return Scaling(settings, expert_bytes, per_token, read_bytes_s, card_share=card_share)


def engine_options(options: ServiceOptions, dtype: str, num_threads: int) -> EngineOptions:
    """Raises OptionInvalid for a budget of speech that is too small."""
    state_folder = str(resolve_state_folder(options.state_dir))
    engine = EngineOptions(
        dtype=dtype,
        device=options.device,
        kv_budget_bytes=options.kv_budget_bytes,
        eviction=options.eviction,
        is_resizable=options.capacity == "auto",
        prefetch=options.is_prefetching,
        audit_share=options.audit_share,
        store_copies=store_copies(options),
        limits=BatchLimits(
            max_batch_tokens=options.max_batch_tokens,
            max_running=options.max_num_seqs,
            max_waiting=options.max_queue,
        ),
        num_threads=num_threads,
        prompt_threads=max(1, num_cores() // options.num_routers),
        max_model_len=options.max_model_len,
        snarc=options.snarc,
        efforts=options.routing.efforts,
        stand_ins=StandInOptions(state_folder) if "snarc" in options.routing.policies else None,
        trust=TrustOptions(state_folder) if options.is_trust_learned else None,
        has_media=options.has_media,
        has_speech=options.has_speech,
        prefix_cache=options.has_prefix_cache,
    )
    if options.speech_budget is None:
        return engine
    with closing(ExpertStore.open(options.store_root)) as store:
        return with_speech_budget(store, engine, options.speech_budget)


def store_copies(options: ServiceOptions) -> tuple[str, ...]:
    return tuple(str(path.resolve()) for path in options.store_copies)


def context_length(options: ServiceOptions, config: ModelConfig) -> int:
    """Tokens of a prompt and its answer together."""
    return options.max_model_len or config.max_position_embeddings
