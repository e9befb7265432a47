"""From a checked request to one generation: prompt ids, sampling with the model's defaults, the room left.

Everything that depends on the served model is checked here. Called by `gateway.http_app`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from dataclasses import dataclass

from gateway.answers import AnswerHead
from gateway.chat_template import ChatTemplate
from gateway.errors import ApiError
from gateway.openai_types import ChatRequest, CompletionRequest, GenerationOptions
from gateway.settings import GatewaySettings
from gateway.tokenizer import TextTokenizer
from router.request import GenerationRequest, SamplingParams

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy in effect, and dividing by it overflows."""


@dataclass(frozen=True)
class Job:
    """One generation and how its answer is sent."""

    head: AnswerHead
    request: GenerationRequest
    stops: tuple[str, ...]
    is_streamed: bool
    has_usage_chunk: bool
    started_at: float
    """Of `time.perf_counter`, before the prompt was tokenised."""


def check_model(name: str, settings: GatewaySettings) -> None:
    """Raises ApiError 404."""
    if name not in settings.model_names:
        message = f"The model '{name[:200]}' does not exist."
        raise ApiError(404, message, param="model", code="model_not_found")


async def prepare_completion(
    request: CompletionRequest, settings: GatewaySettings, tokenizer: TextTokenizer
) -> Job:
    """Raises ApiError when the model is another one or the request does not fit it."""
    started_at = time.perf_counter()
    check_model(request.model, settings)
    if isinstance(request.prompt, str):
        _refuse_certainly_longer(request.prompt, "prompt", settings, tokenizer)
        prompt_ids = await asyncio.to_thread(tokenizer.encode, request.prompt)
    else:
        prompt_ids = request.prompt
    wanted, room = request.max_tokens, settings.context_length - len(prompt_ids)
    max_tokens = min(settings.default_completion_tokens, room) if wanted is None else wanted
    return _job(request, prompt_ids, max_tokens, "prompt", settings, started_at)


async def prepare_chat(
    request: ChatRequest, settings: GatewaySettings, tokenizer: TextTokenizer, template: ChatTemplate
) -> Job:
    """Raises ApiError when the model is another one or the request does not fit it."""
    started_at = time.perf_counter()
    check_model(request.model, settings)
    text = await asyncio.to_thread(template.render, request.messages)
    _refuse_certainly_longer(text, "messages", settings, tokenizer)
    prompt_ids = await asyncio.to_thread(tokenizer.encode_rendered, text)
    wanted = request.max_completion_tokens or request.max_tokens
    max_tokens = settings.context_length - len(prompt_ids) if wanted is None else wanted
    return _job(request, prompt_ids, max_tokens, "messages", settings, started_at)


def _job(
    options: GenerationOptions,
    prompt_ids: list[int],
    max_tokens: int,
    field: str,
    settings: GatewaySettings,
    started_at: float,
) -> Job:
    _check_fit(prompt_ids, max_tokens, field, settings)
    is_chat = isinstance(options, ChatRequest)
    answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    return Job(
        AnswerHead(answer_id, int(time.time()), settings.model_name, settings.system_fingerprint, is_chat),
        GenerationRequest(answer_id, tuple(prompt_ids), _sampling(options, max_tokens, settings)),
        options.stop,
        bool(options.stream),
        options.stream_options is not None and bool(options.stream_options.include_usage),
        started_at,
    )


def _refuse_certainly_longer(
    text: str, field: str, settings: GatewaySettings, tokenizer: TextTokenizer
) -> None:
    """Spare the tokeniser a text that is far too long."""
    if tokenizer.is_certainly_longer(text, settings.context_length):
        message = f"{field} is longer than the model's context of {settings.context_length} tokens."
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def _check_fit(prompt_ids: list[int], max_tokens: int, field: str, settings: GatewaySettings) -> None:
    if not prompt_ids:
        raise ApiError(400, f"{field} comes to no tokens.", param=field, code="invalid_value")
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= settings.vocab_size:
        message = f"Invalid value for {field}: token ids must be from 0 to {settings.vocab_size - 1}."
        raise ApiError(400, message, param=field, code="invalid_value")
    num_prompt, context = len(prompt_ids), settings.context_length
    if num_prompt >= context or num_prompt + max_tokens > context:
        message = (
            f"The model's context is {context} tokens. {field} has {num_prompt} "
            f"and {max(max_tokens, 1)} were asked for in the answer."
        )
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def _sampling(options: GenerationOptions, max_tokens: int, settings: GatewaySettings) -> SamplingParams:
    """The request's values, else the model's. A request without a seed gets a random one, so that it could be
    repeated elsewhere with the same tokens."""
    defaults = settings.default_sampling
    temperature = defaults.temperature if options.temperature is None else options.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=defaults.top_k if options.top_k is None else options.top_k,
        top_p=defaults.top_p if options.top_p is None else options.top_p,
        min_p=defaults.min_p if options.min_p is None else options.min_p,
        seed=secrets.randbits(64) if options.seed is None else options.seed % 2**64,
        stop_token_ids=settings.eos_token_ids,
    )
