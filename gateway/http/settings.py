"""What the HTTP app is told about the served model, and the limits on what clients send.

Composed once, from a store's manifest, by `gateway.service.gateway_replica`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from extraction.quantised_parts import QuantisedParts
from gateway.errors import ModelFileInvalid
from gateway.http.api_keys import NO_KEYS, KeyRing
from gateway.http.routing_rules import NATIVE_ONLY, RoutingRules
from router.media.facts import NO_MEDIA, MediaFacts
from router.speech.facts import SpeechFacts

GENERATION_CONFIG = "generation_config.json"


class ModelFacts(Protocol):
    """The part of a store's manifest that is read here."""

    @property
    def config(self) -> dict[str, object]: ...

    @property
    def generation_config(self) -> dict[str, object]: ...


class StoreFacts(ModelFacts, Protocol):
    """That and what was done to the weights."""

    @property
    def quantised(self) -> QuantisedParts: ...


@dataclass(frozen=True)
class SamplingDefaults:
    """Values for what a request leaves out. OpenAI's, unless the checkpoint's generation config sets its own."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class RequestLimits:
    """Checked while a request is being read, before anything is built from it."""

    max_body_bytes: int = 8 * 1024 * 1024
    max_header_bytes: int = 16 * 1024
    """Names and values of all headers, the path and the query together."""
    max_json_depth: int = 32
    max_json_marks: int = 500_000
    """Strings, brackets and commas in one body; bounds what a small body can grow to in memory."""
    body_grace_s: float = 8.0
    """For a whole body, and longer the more of it has come: see the next."""
    min_body_bytes_per_s: float = 16 * 1024.0
    """A client that sends more slowly than this, beyond the grace, gets 408."""


MEDIA_LIMITS = RequestLimits(max_body_bytes=24 * 1024 * 1024)
"""Where requests may bring images and sound, in base64."""


@dataclass(frozen=True)
class GatewaySettings:
    """Everything the HTTP app knows that is not behaviour."""

    model_name: str
    created: int
    """Unix time in seconds, as `/v1/models` reports it."""
    context_length: int
    """Most tokens of prompt and answer together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: SamplingDefaults = SamplingDefaults()
    limits: RequestLimits = RequestLimits()
    default_completion_tokens: int = 16
    """`max_tokens` of /v1/completions when absent; chat then uses the rest of the context."""
    system_fingerprint: str | None = None
    quantization: str | None = None
    """What of the weights is quantised, as answers name it; None where nothing is."""
    model_aliases: tuple[str, ...] = ()
    """Further names of the model."""
    keys: KeyRing = NO_KEYS
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call: exact ones, or "*"."""
    max_open_requests: int = 320
    """Generations from their first header to the end of their answers; one more gets 429 at once. Of all requests
    there may be more; see `gateway.http.admission`."""
    request_timeout_s: float = 3600.0
    """A request may take so long, with its answer."""
    routing: RoutingRules = NATIVE_ONLY
    media: MediaFacts = NO_MEDIA
    """What chats may hold beside text."""
    speech: SpeechFacts | None = None
    """What answers are spoken with, where they may be."""

    @property
    def model_names(self) -> tuple[str, ...]:
        """All names that a request may use. Answers carry the first."""
        return (self.model_name, *self.model_aliases)

    @classmethod
    def from_manifest(
        cls, manifest: StoreFacts, model_name: str, context_length: int, vocab_size: int, created: int
    ) -> GatewaySettings:
        """Raises ModelFileInvalid when the generation config holds values that cannot be used."""
        generation = manifest.generation_config
        quantization = manifest.quantised.name
        facts = repr((sorted(manifest.config.items()), sorted(generation.items())))
        if quantization is not None:
            facts += quantization
        return cls(
            model_name,
            created,
            context_length,
            vocab_size,
            read_eos_token_ids(manifest, vocab_size),
            read_sampling_defaults(generation),
            system_fingerprint=f"fp_{hashlib.sha256(facts.encode()).hexdigest()[:10]}",
            quantization=quantization,
        )


def read_sampling_defaults(generation: Mapping[str, object]) -> SamplingDefaults:
    """The checkpoint's recommended sampling. Raises ModelFileInvalid.

    `do_sample: false` is a default of training scripts rather than advice to chat greedily, so it leaves OpenAI's
    values in place, but for the repetition penalty, which greedy texts have too.
    """
    repetition_penalty = _number(generation, "repetition_penalty", 1.0, 0.01, 100.0)
    if generation.get("do_sample") is False:
        return SamplingDefaults(repetition_penalty=repetition_penalty)
    return SamplingDefaults(
        temperature=_number(generation, "temperature", 1.0, 0.0, 2.0),
        top_k=int(_number(generation, "top_k", 0, 0, 2**31)),
        top_p=_number(generation, "top_p", 1.0, 0.0, 1.0),
        min_p=_number(generation, "min_p", 0.0, 0.0, 1.0),
        repetition_penalty=repetition_penalty,
    )


def _number(config: Mapping[str, object], name: str, default: float, low: float, high: float) -> float:
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ModelFileInvalid(GENERATION_CONFIG, f"{name} is not a number")
    if not low <= value <= high:
        raise ModelFileInvalid(GENERATION_CONFIG, f"{name} is {value}, outside {low:g} to {high:g}")
    return value


def read_eos_token_ids(manifest: ModelFacts, vocab_size: int) -> tuple[int, ...]:
    """Ids that end an answer: the generation config's, else the model config's. Raises ModelFileInvalid.

    Qwen3-Omni names none, only the token that ends a turn.
    """
    value = manifest.generation_config.get("eos_token_id")
    for key in ("eos_token_id", "im_end_token_id"):
        if value is None:
            value = manifest.config.get(key)
    ids = value if isinstance(value, list | tuple) else () if value is None else (value,)
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise ModelFileInvalid(GENERATION_CONFIG, f"eos_token_id is not an id below {vocab_size}")
    return tuple(dict.fromkeys(ids))
