"""What the engine is asked for and what it answers. Shared by the router and the gateway; plain data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from router.effort import Effort
from router.media.items import PlacedMedium
from router.routing_choice import NATIVE_CHOICE, RoutingChoice, RoutingReport
from router.speech.wish import SpeechWish

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is drawn. Range checks belong to whoever takes input from outside."""

    max_tokens: int = 16
    """0 only where a prompt's logprobs are all that is wanted."""
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """0 means no limit."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """64-bit, unsigned. The noise of a token is a pure function of (seed, choice, position)."""
    choice: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Generation ends with reason "stop" when one of these is drawn; the id itself is reported."""
    min_tokens: int = 0
    """None of `stop_token_ids` is drawn among that many first tokens."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of all tokens of prompt and answer so far."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token of the answer so far."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as the answer so far has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); every id once."""
    grammar: str | None = None
    """That the answer's text follows, as text for `llguidance` (`router.grammar`): other tokens are not drawn, those of
    `stop_token_ids` only where the text may end, and generation ends with reason "stop" where nothing can follow."""

    @property
    def has_filters(self) -> bool:
        """Whether some tokens are left out, by their probability, before one is drawn."""
        return bool(self.top_k) or self.top_p < 1.0 or self.min_p > 0.0

    @property
    def has_adjustments(self) -> bool:
        """Whether logits are changed before the token is drawn from them."""
        has_bounds = self.min_tokens > 0 or self.grammar is not None
        return self.has_penalties or bool(self.logit_bias) or has_bounds

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class TokenLogprob(NamedTuple):
    """A token and its natural log probability under the model's own distribution: before penalties, biases,
    temperature and filters."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and theirs, best first, equals by id; as many as were asked for."""


@dataclass(frozen=True)
class GenerationRequest:
    """One sequence to generate. Resubmitting with the tokens already sent in `generated_ids` and the same
    seed continues it with the same tokens: they are computed anew, count as part of the answer, and are not reported
    again (docs/exactness.md)."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    generated_ids: tuple[int, ...] = ()
    generated_efforts: tuple[Effort, ...] = ()
    """What `generated_ids` were computed at where the effort is `auto`, as their reports told; without them they are
    taken for a part of the prompt, which has the native number of experts."""
    num_logprobs: int | None = None
    """Report each generated token's logprob and those of this many best ones; None reports none."""
    num_prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    num_unscored: int = 0
    """So many of the prompt's first tokens are reported without logprobs: they are context, and cost no head."""
    group: str | None = None
    """Requests of one group have the same prompt, which is then computed once where that is possible."""
    routing: RoutingChoice = NATIVE_CHOICE
    answer_id: str | None = None
    """The answer that this sequence is a choice of, by which feedback names it; None means the request's own id."""
    media: tuple[PlacedMedium, ...] = ()
    """Images and sounds that tokens of the prompt stand for, in the prompt's order."""
    owner: str = ""
    """Whose it is: keys and values of a common prefix are shared among the requests of one owner only."""
    speech: SpeechWish | None = None
    """Asks for a reply to be spoken in place of a text."""


class TokenEvent(NamedTuple):
    """Progress of one request: the tokens since the last event, and the end if this is it."""

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    """Safe to show to a client. Set only when `finish_reason` is "error"."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """Of `token_ids`, where asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """Of the whole prompt, where asked for, in the event of the first token; nothing precedes the prompt's first
    token, so it has None."""
    routing: RoutingReport | None = None
    """With the tokens of a request whose routing is not the plain one."""
    is_mixed: bool = False
    """Whether the answer so far rests on experts of more than one numerics class (docs/exactness.md)."""
    is_resumable: bool = False
    """Whether an error is the engine's and not the request's, which may then go on in another."""
    num_cached: int = 0
    """Tokens of the prompt that were found computed; in the event of the first token."""
    is_first: bool = False
    """Whether its token is the first that this engine drew for the request."""
    samples: bytes = b""
    """Of speech, since the last event: 16 bits, little-endian, one channel; see `router.speech.wish`."""

    @property
    def is_urgent(self) -> bool:
        """Whether somebody has waited for it: the first event of a request, or its last."""
        return self.is_first or self.finish_reason is not None

    def followed_by(self, later: TokenEvent) -> TokenEvent:
        """Both in one."""
        return TokenEvent(
            self.request_id,
            self.token_ids + later.token_ids,
            later.finish_reason,
            later.error,
            self.logprobs + later.logprobs,
            self.prompt_logprobs or later.prompt_logprobs,
            later.routing.after(self.routing) if later.routing is not None else self.routing,
            self.is_mixed or later.is_mixed,
            later.is_resumable,
            self.num_cached or later.num_cached,
            self.is_first or later.is_first,
            self.samples + later.samples,
        )
