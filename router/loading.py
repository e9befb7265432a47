"""From an expert store to an engine: reads the configuration, proves the numerics, loads the backbone.

Called by `sage-moe generate` and by the router's service, so that both run the same engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experts.cores import num_cores, useful_threads
from experts.device_proof import prove_experts
from experts.device_tier import open_tiers
from experts.devices import CPU, settle_arithmetic
from experts.directory import ExpertDirectory, LocalDirectory
from experts.eviction import DEFAULT_EVICTION, Eviction
from experts.numerics import RowKernel
from experts.store import ExpertStore
from experts.worker import DTYPES, ExpertWorker
from router.attention import BLOCK_POSITIONS
from router.backbone import Backbone
from router.batcher import BatchLimits
from router.effort import EffortChoice
from router.engine import Engine
from router.errors import ConfigUnsupported
from router.expert_facts import FactSource
from router.grammar import Grammars
from router.kv_cache import KvPool, blocks_for
from router.linears import FLOAT, LinearForms, prove_linears
from router.means_keeper import MeansKeeper, StandInOptions, keep_means
from router.media.encoder import MediaEncoder
from router.media.facts import read_media_facts
from router.model_config import ModelConfig, read_model_config
from router.output_means import OutputMeans
from router.prefetch import Prefetcher
from router.prefix_keys import PrefixScope
from router.scoring import DEFAULT_PRESET, PRESETS, SnarcWeights
from router.self_test import prove_row_invariance
from router.speech.facts import read_speech_facts
from router.speech.opening import SpeakerOptions
from router.speech.speech_source import SpeechSource
from router.steering import MoeShape, SteeredPolicy
from router.trust_options import TrustOptions, open_local_ledger
from router.trust_session import OpenKeeper, TrustSession

logger = logging.getLogger(__name__)

DEFAULT_KV_BUDGET_BYTES = 1 << 30


@dataclass(frozen=True)
class EngineOptions:
    """What a user may choose about an engine."""

    dtype: str | None = None
    """`float32` or `bfloat16`; None means the dtype of the stored experts."""
    kv_budget_bytes: int = DEFAULT_KV_BUDGET_BYTES
    expert_budget_bytes: int | None = None
    """Resident bytes of experts in this process; None means no bound."""
    device: torch.device = CPU
    """On which the backbone, the cache and the experts are and are computed."""
    host_budget_bytes: int | None = None
    """Of experts in host memory behind another device than the CPU, whose own bytes the other budget then is."""
    eviction: Eviction = DEFAULT_EVICTION
    """Which expert goes first when room is needed."""
    is_resizable: bool = False
    """Whether the experts' memory may be given back, and taken again, while the engine runs."""
    prefetch: bool = False
    """Whether experts of this process are read ahead by the next layer's gate (docs/memory.md)."""
    store_copies: tuple[str, ...] = ()
    """Further folders of the same store, read where it fails."""
    limits: BatchLimits = field(default_factory=BatchLimits)
    num_threads: int | None = None
    """Torch threads of the process; None means what suits machine and model."""
    prompt_threads: int | None = None
    """The same for passes of many rows, where it is more; None means `num_threads`, or all cores where that is None."""
    max_model_len: int | None = None
    """Most tokens that a request will be let reach, by whoever takes requests; None means the model's context.
    Only bounds the cache that is allocated."""
    snarc: SnarcWeights = PRESETS[DEFAULT_PRESET]
    """Of requests that ask for the snarc policy."""
    audit_share: float = 0.0
    """Share of expert actors' answers that are computed again elsewhere; see `experts.audit`."""
    stand_ins: StandInOptions | None = None
    """Whether mean outputs may stand in for absent experts, where `snarc` lets them; None where no request can ask for
    the snarc policy."""
    efforts: tuple[EffortChoice, ...] = ("focus",)
    """That requests may ask for; only bounds what a step is expected to hold."""
    trust: TrustOptions | None = None
    """Whether and where trust is learned; None means that nobody watches."""
    has_media: bool = False
    """Whether images and sound are taken where the model does."""
    has_speech: bool = False
    """Whether answers are spoken where the model does."""
    speech_budget_bytes: int | None = None
    """Resident bytes of the talker's experts; None means no bound."""
    prefix_cache: bool = True
    """Whether keys and values of earlier requests are used again where a request begins alike (docs/serving.md)."""

    @property
    def has_stand_ins(self) -> bool:
        return self.stand_ins is not None and self.snarc.stand_in > 0


@dataclass(frozen=True)
class LoadedEngine:
    """An engine and what it was made from."""

    engine: Engine
    store: ExpertStore
    worker: ExpertWorker
    directory: ExpertDirectory
    config: ModelConfig
    kernel: RowKernel
    dtype: torch.dtype
    forms: LinearForms = FLOAT
    trust: TrustSession | None = None
    stand_ins: MeansKeeper | None = None
    """Of mean outputs, where they are kept."""
    media: MediaEncoder | None = None
    """Of images and sound, where the store has what the model sees or hears with."""
    speech: SpeechSource | None = None
    """Where what speaks is read when it is asked for, where the store has it."""

    @property
    def numerics_class(self) -> str:
        """Of its answers. An expert actor's has no more than the part that the worker's has."""
        own = "" if self.kernel.is_on_cpu else f"/{self.kernel.name}/norm-{self.kernel.norm}"
        return self.worker.numerics_class + self.forms.class_suffix + own

    def keep_learned(self) -> None:
        """Bring what was learned last to where it is kept, and stop keeping."""
        if self.trust is not None:
            self.trust.close()
        if self.stand_ins is not None:
            self.stand_ins.close()

    def close(self) -> None:
        self.keep_learned()
        self.directory.close()
        self.worker.close()
        self.store.close()


def stored_dtype(store: ExpertStore) -> str:
    """The dtype in which most users want to compute: that of the served decoder's experts.

    Of a store with quantised experts that of its embeddings.
    """
    if store.manifest.quantization is not None:
        tensors = {tensor.name: tensor.dtype for tensor in store.served.tensors}
        return tensors.get("embed_tokens.weight", "float32")
    keys = store.expert_keys(store.served.name)
    return store.record(keys[0]).dtype if keys else "float32"


def chosen_dtype(store: ExpertStore, options: EngineOptions) -> torch.dtype:
    """Raises ConfigUnsupported."""
    name = options.dtype or stored_dtype(store)
    if name not in ("float32", "bfloat16"):
        raise ConfigUnsupported("dtype", f"{name!r}; choose float32 or bfloat16")
    return DTYPES[name]


def load_engine(
    store: ExpertStore,
    options: EngineOptions,
    connect: Callable[[ExpertWorker], ExpertDirectory] = LocalDirectory,
    open_keeper: OpenKeeper = open_local_ledger,
) -> LoadedEngine:
    """connect: makes the way to the experts, given a worker for those that are computed here. open_keeper: of trust,
    where options ask for it.

    Raises ConfigUnsupported, WeightMismatch, NotRowInvariant, StoreDamaged for a copy of another store, or what reading
    the store raises.
    """
    dtype = chosen_dtype(store, options)
    component = store.served
    config = read_model_config(component.config)
    torch.set_num_threads(options.num_threads or useful_threads(num_cores(), config.expert_elements))
    settle_arithmetic(options.device)
    kernel = prove_row_invariance(config, dtype, options.device)
    forms = prove_linears(store.quantised, config, kernel, dtype)
    trust = TrustSession(store, config, options.trust, open_keeper) if options.trust is not None else None
    experts_kernel = kernel
    if not kernel.is_on_cpu and config.moe_layers:
        # By the experts' shapes alone, as an actor does: the two are then of one class.
        experts_kernel = prove_experts(config.hidden_size, config.expert_width, dtype, options.device)
    worker = ExpertWorker(
        store,
        experts_kernel,
        dtype,
        widths={component.name: config.hidden_size},
        budget_bytes=options.expert_budget_bytes,
        eviction=options.eviction,
        trust=trust.book.score if trust is not None else None,
        copies=tuple(map(Path, options.store_copies)),
        tiers=open_tiers(options.device, options.host_budget_bytes),
        is_resizable=options.is_resizable,
    )
    directory = connect(worker)
    backbone = Backbone(store, component.name, config, kernel, directory, dtype, forms)
    backbone.arithmetic.prompt_threads = options.prompt_threads or options.num_threads or num_cores()
    if options.prefetch:
        backbone.prefetcher = Prefetcher(backbone.layers, backbone.arithmetic, directory)
    pool = KvPool(config, num_kv_blocks(config, dtype, options), dtype, options.device)
    limits = options.limits.with_most_rows(kernel.most_rows)
    engine = Engine(backbone, pool, limits, swap_budget_bytes=options.kv_budget_bytes)
    engine.grammars = Grammars(store.root, config.vocab_size)
    stand_ins = None
    if config.moe_layers:
        shape = MoeShape(
            config.hidden_size, config.num_experts, config.experts_per_token, tuple(sorted(config.moe_layers))
        )
        facts = FactSource(
            component.name, config.num_experts, directory.resident, trust.book.scores if trust else None
        )
        means = None
        if options.stand_ins is not None and options.has_stand_ins:
            means = OutputMeans(shape.num_experts, shape.hidden_size, shape.layers)
            engine.watchers += (means,)
            if options.stand_ins.state_folder is not None:
                stand_ins = keep_means(means, store, options.stand_ins.state_folder)
        engine.policy = engine.reporter = SteeredPolicy(shape, facts, options.snarc, means)
    if trust is not None:
        trust.attach(engine)
    media = None
    if options.has_media and read_media_facts(store.manifest, store.root).kinds:
        media = MediaEncoder(store, config, kernel, dtype)
    speech = None
    if options.has_speech and (spoken := read_speech_facts(store.manifest)) is not None:
        own = SpeakerOptions(options.speech_budget_bytes)
        speech = SpeechSource(store, spoken, backbone.embeddings_VD, dtype, own, prove_row_invariance)
    loaded = LoadedEngine(
        engine, store, worker, directory, config, kernel, dtype, forms, trust, stand_ins, media, speech
    )
    # Such keys are turned by an angle that depends on the whole prompt's length.
    if options.prefix_cache and not config.rope.depends_on_length:
        engine.kv.scope = PrefixScope(store.hash, loaded.numerics_class, config.experts_per_token)
    logger.info(
        "engine ready: %s, backbone %d bytes, KV %d bytes",
        loaded.numerics_class,
        backbone.nbytes,
        pool.nbytes,
    )
    return loaded


def num_kv_blocks(config: ModelConfig, dtype: torch.dtype, options: EngineOptions) -> int:
    """Blocks that fit the KV budget, but no more than all running sequences could fill.

    Raises ConfigUnsupported when the budget does not hold one block beside the zero block.
    """
    block_bytes = KvPool.block_bytes(config, dtype)
    affordable = options.kv_budget_bytes // block_bytes
    if affordable < 2:
        raise ConfigUnsupported(
            "kv_budget",
            f"{options.kv_budget_bytes} bytes hold no {BLOCK_POSITIONS} positions of {block_bytes} bytes",
        )
    context = min(options.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    useful = options.limits.max_running * blocks_for(context) + 1
    return min(affordable, useful)
