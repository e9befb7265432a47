"""From a checked request to its generations: prompt ids, sampling with the model's defaults, the room left.

Everything that depends on the served model is checked here. Called by `gateway.http.app`.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial

from gateway.errors import ApiError
from gateway.http.answers import AnswerHead
from gateway.http.media import TEXT_ONLY, decode_media, placed_in
from gateway.http.openai_types import ChatRequest, CompletionRequest, GenerationOptions
from gateway.http.response_format import NO_GRAMMAR, CheckedGrammar, check_form
from gateway.http.settings import GatewaySettings
from gateway.http.speech import SpokenForm, check_turn, choose_form, new_audio_id
from gateway.http.spoken_answers import SpokenAnswers
from gateway.http.tool_calls import Calling, calling_of, check_tools
from gateway.media.decoder import MediaDecoder
from gateway.text.chat_template import ChatTemplate
from gateway.text.grammar_check import GrammarChecker
from gateway.text.tokenizer import TextTokenizer
from router.media.items import PlacedMedium
from router.request import GenerationRequest, SamplingParams
from router.routing_choice import RoutingChoice

GREEDY_BELOW = 1e-5
"""A lower temperature is greedy in effect, and dividing by it overflows."""


@dataclass(frozen=True)
class ChoiceJob:
    """One answer of a job."""

    index: int
    request: GenerationRequest
    is_echoed: bool
    """Whether the prompt comes first."""
    audio_id: str | None = None
    """Names what is spoken, where the answer is."""


@dataclass(frozen=True)
class Job:
    """All answers to one request, and how they are sent."""

    head: AnswerHead
    choices: tuple[ChoiceJob, ...]
    num_prompt_tokens: int
    """Of every prompt once, however many answers it gets."""
    stops: tuple[str, ...]
    is_streamed: bool
    has_usage_chunk: bool
    started_at: float
    """Of `time.perf_counter`, before the prompt was tokenised."""
    speech: SpokenForm | None = None
    """How the answers are spoken, where they are."""
    calling: Calling | None = None
    """Which tools the answers may call, where any."""
    unenforced: tuple[str, ...] = ()
    """Fields of the request whose values the answers may not follow."""

    @property
    def sound_bytes(self) -> int:
        """That all answers together may take."""
        return 0 if self.speech is None else len(self.choices) * self.speech.most_bytes


def check_model(name: str, settings: GatewaySettings) -> None:
    """Raises ApiError 404."""
    if name not in settings.model_names:
        message = f"The model '{name[:200]}' does not exist."
        raise ApiError(404, message, param="model", code="model_not_found")


async def prepare_completion(
    request: CompletionRequest,
    settings: GatewaySettings,
    tokenizer: TextTokenizer,
    grammars: GrammarChecker,
    owner: str = "",
) -> Job:
    """owner: with whose requests alone it shares what is cached.

    Raises ApiError when the model is another one or the request does not fit it.
    """
    started_at = time.perf_counter()
    check_model(request.model, settings)
    _check_tokens(request, settings)
    fields = ["prompt"] if len(request.prompt) == 1 else [f"prompt.{i}" for i in range(len(request.prompt))]
    prompts = []
    for prompt, field in zip(request.prompt, fields, strict=True):
        if isinstance(prompt, str):
            _refuse_certainly_longer(prompt, field, settings, tokenizer)
            prompts.append(await asyncio.to_thread(tokenizer.encode, prompt))
        else:
            prompts.append(prompt)
    wanted, jobs = request.max_tokens, []
    for prompt_ids, field in zip(prompts, fields, strict=True):
        room = settings.context_length - len(prompt_ids)
        max_tokens = min(settings.default_completion_tokens, room) if wanted is None else wanted
        _check_fit(prompt_ids, max_tokens, field, settings, is_prompt_all=wanted == 0)
        jobs.append((prompt_ids, max_tokens))
    grammar = await check_form(request.response_format, grammars, owner)
    return _job(request, jobs, settings, started_at, owner, grammar=grammar)


async def prepare_chat(
    request: ChatRequest,
    settings: GatewaySettings,
    tokenizer: TextTokenizer,
    template: ChatTemplate,
    grammars: GrammarChecker,
    decoder: MediaDecoder = TEXT_ONLY,
    spoken: SpokenAnswers | None = None,
    owner: str = "",
) -> Job:
    """spoken: earlier answers, of which the owner's may be named by the id of their sound.

    Raises ApiError when the model is another one or the request does not fit it.
    """
    started_at = time.perf_counter()
    check_model(request.model, settings)
    _check_tokens(request, settings)
    speech = choose_form(request, settings.speech, int(time.time()))
    messages = (spoken or SpokenAnswers()).resolved(request.messages, owner)
    media = await decode_media(messages, decoder, settings.context_length)
    tools = request.offered_tools
    render = partial(template.render, messages, variant=request.chat_template, tools=tools)
    text = await asyncio.to_thread(render)
    _refuse_certainly_longer(text, "messages", settings, tokenizer)
    prompt_ids = await asyncio.to_thread(tokenizer.encode_rendered, text)
    prompt_ids, placed = placed_in(prompt_ids, media, decoder)
    if speech is not None and settings.speech is not None:
        check_turn(prompt_ids, speech, settings.speech)
    wanted = request.max_completion_tokens or request.max_tokens
    max_tokens = settings.context_length - len(prompt_ids) if wanted is None else wanted
    num_media = sum(decoder.facts.num_tokens(medium) for medium in media)
    _check_fit(prompt_ids, max_tokens, "messages", settings, num_media=num_media)
    prompts = [(prompt_ids, max_tokens)]
    calling = calling_of(request)
    if calling is None:
        grammar = await check_form(request.response_format, grammars, owner)
    else:
        grammar = await check_tools(calling, grammars, owner)
    return _job(
        request,
        prompts,
        settings,
        started_at,
        owner,
        grammar=grammar,
        calling=calling,
        media=placed,
        speech=speech,
    )


def _job(
    options: GenerationOptions,
    prompts: list[tuple[list[int], int]],
    settings: GatewaySettings,
    started_at: float,
    owner: str,
    *,
    grammar: CheckedGrammar = NO_GRAMMAR,
    media: tuple[PlacedMedium, ...] = (),
    speech: SpokenForm | None = None,
    calling: Calling | None = None,
) -> Job:
    """prompts: ids, and the most tokens of an answer to them. media: of the only one."""
    is_chat = isinstance(options, ChatRequest)
    is_echoed = isinstance(options, CompletionRequest) and bool(options.echo)
    routing = _routing(options, settings)
    answer_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
    # A request without a seed gets a random one, so that it could be repeated elsewhere with the same tokens.
    seed = secrets.randbits(64) if options.seed is None else options.seed % 2**64
    num_answers = len(prompts) * options.num_choices
    choices: list[ChoiceJob] = []
    for position, (prompt_ids, max_tokens) in enumerate(prompts):
        sampling = replace(_sampling(options, max_tokens, seed, settings), grammar=grammar.text)
        for choice in range(options.num_choices):
            request = GenerationRequest(
                answer_id if num_answers == 1 else f"{answer_id}-{len(choices)}",
                tuple(prompt_ids),
                replace(sampling, choice=choice),
                num_logprobs=options.num_logprobs,
                num_prompt_logprobs=options.num_logprobs if is_echoed else None,
                group=f"{answer_id}-prompt-{position}" if options.num_choices > 1 else None,
                routing=routing,
                answer_id=answer_id,
                media=media,
                owner=owner,
            )
            audio_id = None if speech is None else new_audio_id()
            choices.append(ChoiceJob(len(choices), request, is_echoed, audio_id))
    return Job(
        AnswerHead(
            answer_id,
            int(time.time()),
            settings.model_name,
            settings.system_fingerprint,
            is_chat,
            settings.quantization,
        ),
        tuple(choices),
        sum(len(prompt_ids) for prompt_ids, _ in prompts),
        options.stop if calling is None else (*options.stop, *calling.stops),
        bool(options.stream),
        options.stream_options is not None and bool(options.stream_options.include_usage),
        started_at,
        speech,
        calling,
        grammar.unenforced,
    )


def _routing(options: GenerationOptions, settings: GatewaySettings) -> RoutingChoice:
    """Raises ApiError where the service does not allow it."""
    asked = options.sage
    if asked is None:
        return settings.routing.choose(None, None, is_explained=False)
    return settings.routing.choose(asked.policy, asked.effort, is_explained=bool(asked.explain))


def _refuse_certainly_longer(
    text: str, field: str, settings: GatewaySettings, tokenizer: TextTokenizer
) -> None:
    """Spare the tokeniser a text that is far too long."""
    if tokenizer.is_certainly_longer(text, settings.context_length):
        message = f"{field} is longer than the model's context of {settings.context_length} tokens."
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def _check_tokens(options: GenerationOptions, settings: GatewaySettings) -> None:
    """Raises ApiError where a token id that the request names is not the model's."""
    named = {"stop_token_ids": options.stop_token_ids, "logit_bias": [id_ for id_, _ in options.logit_bias]}
    for field, ids in named.items():
        if any(token_id >= settings.vocab_size for token_id in ids):
            message = f"Invalid value for {field}: token ids must be from 0 to {settings.vocab_size - 1}."
            raise ApiError(400, message, param=field, code="invalid_value")
    if options.min_tokens and len({*options.stop_token_ids, *settings.eos_token_ids}) >= settings.vocab_size:
        message = "min_tokens cannot hold back every token of the vocabulary."
        raise ApiError(400, message, param="min_tokens", code="invalid_value")


def _check_fit(
    prompt_ids: list[int],
    max_tokens: int,
    field: str,
    settings: GatewaySettings,
    *,
    is_prompt_all: bool = False,
    num_media: int = 0,
) -> None:
    """is_prompt_all: nothing is to be generated, so the prompt may fill the context. num_media: of its tokens, those
    that stand for images and sound."""
    if not prompt_ids:
        raise ApiError(400, f"{field} comes to no tokens.", param=field, code="invalid_value")
    low, high = min(prompt_ids), max(prompt_ids)
    if low < 0 or high >= settings.vocab_size:
        message = f"Invalid value for {field}: token ids must be from 0 to {settings.vocab_size - 1}."
        raise ApiError(400, message, param=field, code="invalid_value")
    num_prompt, context = len(prompt_ids), settings.context_length
    num_answer = 0 if is_prompt_all else max(max_tokens, 1)
    if num_prompt + num_answer > context:
        message = (
            f"The model's context is {context} tokens. {field} has {num_prompt} "
            f"{f'({num_media} of them images and sound) ' if num_media else ''}"
            f"and {num_answer} were asked for in the answer."
        )
        raise ApiError(400, message, param=field, code="context_length_exceeded")


def _sampling(
    options: GenerationOptions, max_tokens: int, seed: int, settings: GatewaySettings
) -> SamplingParams:
    """The request's values, else the model's."""
    if options.min_tokens is not None and options.min_tokens > max_tokens:
        message = (
            f"Invalid value for min_tokens: must be a whole number from 0 to max_tokens, {max_tokens} here."
        )
        raise ApiError(400, message, param="min_tokens", code="invalid_value")
    defaults = settings.default_sampling
    temperature = defaults.temperature if options.temperature is None else options.temperature
    eos = () if options.ignore_eos else settings.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=defaults.top_k if options.top_k is None else options.top_k,
        top_p=defaults.top_p if options.top_p is None else options.top_p,
        min_p=defaults.min_p if options.min_p is None else options.min_p,
        seed=seed,
        stop_token_ids=tuple(dict.fromkeys((*eos, *options.stop_token_ids))),
        min_tokens=options.min_tokens or 0,
        repetition_penalty=defaults.repetition_penalty
        if options.repetition_penalty is None
        else options.repetition_penalty,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        logit_bias=options.logit_bias,
    )
