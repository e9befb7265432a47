"""Answers for `sage-moe chat` from a store, in this process: the engine of `generate`, without Ray and HTTP."""

from __future__ import annotations

import asyncio
import itertools
import queue
import secrets
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experts.budget import BudgetRequest
from experts.store import ExpertStore
from gateway.chat.loop import Piece, Turn
from gateway.errors import ChatFailed
from gateway.http.media import TEXT_ONLY, decode_media, placed_in
from gateway.http.openai_types import Message
from gateway.http.settings import read_eos_token_ids, read_sampling_defaults
from gateway.http.speech import Delivery, SpokenReply
from gateway.http.stream import AnswerText
from gateway.local.engine_events import Events, events_of
from gateway.local.speech import SpeechChoice, choose_speech, speak
from gateway.media.decoder import MediaDecoder
from gateway.service.memory import plan_engine, with_speech_budget
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import TextTokenizer
from router.engine_thread import EngineThread
from router.errors import RouterError
from router.loading import EngineOptions, LoadedEngine, load_engine
from router.request import GenerationRequest, SamplingParams


class LocalChat:
    """One engine on a thread of its own, so that Ctrl-C never strikes inside a step. Made by `open_store`."""

    def __init__(
        self,
        model: str,
        loaded: LoadedEngine,
        tokenizer: TextTokenizer,
        template: ChatTemplate,
        sampling: Mapping[str, Any],
        delivery: Delivery | None = None,
    ) -> None:
        """sampling: fields of SamplingParams; without a seed each answer gets a random one. delivery: how answers are
        spoken, where they are."""
        self.model = model
        self._tokenizer, self._template, self._sampling = tokenizer, template, dict(sampling)
        self._delivery = delivery
        self._context_length = loaded.engine.max_tokens_per_sequence
        self._events: Events = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self._thread = EngineThread(loaded.engine, self._events.put, loaded.media, loaded.speech)
        self._decoder = MediaDecoder(loaded.media.facts) if loaded.media is not None else TEXT_ONLY
        self._thread.start()

    def close(self) -> None:
        self._thread.stop()

    def stream(self, messages: list[Turn]) -> Generator[Piece, None, None]:
        """See ChatBackend.stream. Raises ChatFailed, GenerationFailed, or ApiError where the template or a part is
        refused."""
        request = self._request(messages)
        silent = {*request.sampling.stop_token_ids, *self._tokenizer.special_tokens}
        reply = SpokenReply(silent, self._tokenizer.encode_plain)
        yield from self._text(request, reply)
        if self._delivery is not None:
            with closing(speak(self._thread, self._events, request, self._delivery, reply.ids)) as spoken:
                yield from (Piece("", samples=samples) for samples, _ in spoken)

    def _text(self, request: GenerationRequest, reply: SpokenReply) -> Generator[Piece, None, None]:
        answer = AnswerText(self._tokenizer.detokenizer(), request.sampling.stop_token_ids, ())
        try:
            with closing(events_of(self._thread, self._events, request)) as events:
                for event in events:
                    shown, offsets = answer.take(event.token_ids)
                    reply.note(shown, event.token_ids, offsets)
                    yield Piece(shown, answer.num_tokens)
        except RouterError as error:
            raise ChatFailed(str(error)) from error
        rest = answer.flush()
        reply.end(rest, answer.num_chars)
        yield Piece(rest, answer.num_tokens)

    def _request(self, messages: list[Turn]) -> GenerationRequest:
        turns = [Message.model_validate(message) for message in messages]
        media = asyncio.run(decode_media(turns, self._decoder, self._context_length))
        prompt_ids, placed = placed_in(
            self._tokenizer.encode_rendered(self._template.render(turns)), media, self._decoder
        )
        room = self._context_length - len(prompt_ids)
        if not prompt_ids or room < 1:
            reason = f"the conversation has {len(prompt_ids)} tokens and the model's context {self._context_length}"
            raise ChatFailed(f"{reason}; /reset begins anew")
        chosen = {"max_tokens": room, "seed": secrets.randbits(64)} | self._sampling
        chosen["max_tokens"] = min(chosen["max_tokens"], room)
        name = f"chat-{next(self._numbers)}"
        return GenerationRequest(name, tuple(prompt_ids), SamplingParams(**chosen), media=placed)


@contextmanager
def open_store(
    root: Path,
    model: str,
    sampling: Mapping[str, Any],
    options: EngineOptions,
    budgets: tuple[BudgetRequest, ...] = (),
    host_budgets: tuple[BudgetRequest, ...] = (),
    speech: SpeechChoice | None = None,
) -> Iterator[LocalChat]:
    """A chat with a store's model. sampling: fields of SamplingParams that the user chose; the checkpoint's
    recommendation fills in the others. budgets, host_budgets: of experts, as in `gateway.local.generate`. speech: how
    answers are spoken, where they are.

    Raises what loading the engine raises, or OptionInvalid for speech that the store does not have."""
    store = ExpertStore.open(root)
    delivery = None if speech is None else choose_speech(store, speech)
    if speech is not None:
        options = with_speech_budget(store, replace(options, has_speech=True), speech.budget)
    tokenizer = TextTokenizer.from_folder(root)
    template = ChatTemplate.from_folder(root, tokenizer)
    defaults = asdict(read_sampling_defaults(store.manifest.generation_config))
    if budgets:
        options, _ = plan_engine(store, options, budgets, host_requests=host_budgets)
    loaded = load_engine(store, options)
    eos = read_eos_token_ids(store.manifest, loaded.config.vocab_size)
    chosen = defaults | {"stop_token_ids": eos} | dict(sampling)
    chat = LocalChat(model, loaded, tokenizer, template, chosen, delivery)
    try:
        yield chat
    finally:
        chat.close()
        loaded.close()
