"""From a store to a speaker: reads its parts, and makes room for keys and values.

Called by `router.speech.speech_thread` when the first speech is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from experts.store import ExpertStore
from router.attention import BLOCK_POSITIONS
from router.errors import ConfigUnsupported
from router.kv_cache import KvPool, blocks_for
from router.media.facts import read_media_facts
from router.model_config import ModelConfig
from router.self_test import prove_row_invariance
from router.speech.facts import SpeechFacts
from router.speech.parts import ProveKernel, read_parts
from router.speech.speaker import Speaker, SpeakerLimits

DEFAULT_KV_BUDGET_BYTES = 256 << 20
"""Of the published talker 13,000 positions: eight speeches of more than two minutes each."""


@dataclass(frozen=True)
class SpeakerOptions:
    """What may be chosen about it. Changes no code that is spoken."""

    budget_bytes: int | None = None
    """Of the talker's resident experts; None means all of them."""
    kv_budget_bytes: int = DEFAULT_KV_BUDGET_BYTES
    limits: SpeakerLimits = field(default_factory=SpeakerLimits)


def open_speaker(
    store: ExpertStore,
    facts: SpeechFacts,
    thinker_VD: Tensor,
    dtype: torch.dtype,
    options: SpeakerOptions | None = None,
    prove: ProveKernel = prove_row_invariance,
) -> Speaker:
    """thinker_VD: embeddings of the text's decoder. dtype: of the text's engine. prove: the row kernel of a decoder.

    Raises ConfigUnsupported, WeightMismatch, NotRowInvariant, or what reading the store raises.
    """
    options = options or SpeakerOptions()
    limits = options.limits
    if facts.turns.largest >= thinker_VD.shape[0]:
        raise ConfigUnsupported("tts_pad_token_id", "or another token of speech is outside the vocabulary")
    parts = read_parts(store, thinker_VD, dtype, options.budget_bytes, limits.most_running, prove)
    try:
        num_blocks = speech_kv_blocks(parts.talker.config, dtype, options)
        pool = KvPool(parts.talker.config, num_blocks, dtype)
        images = read_media_facts(store.manifest, store.root).image
    except BaseException:
        parts.close()
        raise
    return Speaker(facts, parts, pool, limits, images)


def speech_kv_blocks(config: ModelConfig, dtype: torch.dtype, options: SpeakerOptions) -> int:
    """Blocks that fit the budget, but no more than all running speeches could fill. Raises ConfigUnsupported."""
    block_bytes = KvPool.block_bytes(config, dtype)
    affordable = options.kv_budget_bytes // block_bytes
    if affordable < 2:
        raise ConfigUnsupported(
            "speech_kv_budget",
            f"{options.kv_budget_bytes} bytes hold no {BLOCK_POSITIONS} positions of {block_bytes} bytes",
        )
    return min(affordable, options.limits.most_running * blocks_for(config.max_position_embeddings) + 1)
