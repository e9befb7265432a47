"""One sequence on its way through the engine: its tokens, how far they are computed, and what it was given."""

from __future__ import annotations

import torch
from torch import Tensor

from router.batcher import SequenceFacts
from router.errors import GrammarFailed
from router.grammar import GrammarState
from router.penalties import TokenHistory, adjusted
from router.prompt_groups import Member
from router.prompt_inputs import NO_INPUTS, PromptInputs
from router.request import FinishReason, GenerationRequest, TokenLogprob


class Sequence:
    """A request's state. Owned by the engine's thread."""

    def __init__(
        self,
        request: GenerationRequest,
        inputs: PromptInputs = NO_INPUTS,
        grammar: GrammarState | None = None,
    ) -> None:
        """grammar: that has taken `request.generated_ids`, where the request has one."""
        self.request = request
        self.inputs = inputs
        self.grammar = grammar
        self.tokens = [*request.prompt_ids, *request.generated_ids]
        self.num_computed = 0
        self.is_mixed = False
        """Whether something that it rests on was computed by experts of another numerics class."""
        self.swapped: tuple[Tensor, Tensor] | None = None
        self.num_cached: int | None = None
        """Positions that it found computed when it was admitted first; None before that."""
        self.block_keys: list[bytes] = []
        """Of its full blocks, as far as somebody asked (`router.prefix_keys`)."""
        self.can_give_prefix = True
        """Whether others may find what it has computed; not where an expert that it rests on may have been wrong."""
        self.prompt_logprobs: list[TokenLogprob | None] = []
        """Of the prompt's first tokens, as far as they are known; stays when the sequence is computed again."""
        if self.wants_prompt_logprobs:
            self.prompt_logprobs.extend([None] * max(1, min(request.num_unscored, len(request.prompt_ids))))
        self._history: TokenHistory | None = None
        self._position_shift = 0
        if inputs.positions_3P is not None:
            self._position_shift = int(inputs.positions_3P.max()) + 1 - len(request.prompt_ids)

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def has_drawn(self) -> bool:
        """Whether a token was drawn here: its logits were finite, and so is the cache that they were made of."""
        return self.num_generated > len(self.request.generated_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They come with the first token, so a resumed request has had them."""
        return self.request.num_prompt_logprobs is not None and not self.request.generated_ids

    @property
    def can_share_prompt(self) -> bool:
        """Whether its prompt may come from, or go to, another sequence of its group."""
        return self.request.group is not None and self.has_plain_prompt

    @property
    def has_plain_prompt(self) -> bool:
        """Whether its keys and values follow from its tokens and media. Never under other routing than native, whose
        signals only computing the prompt gives, nor where the prompt is to be explained."""
        return self.inputs.media is not None and self.request.routing.is_plain

    def as_member(self) -> Member:
        """Of its group, for who may share its prompt."""
        if not self.can_share_prompt:
            return Member(self.name, None)
        is_prompt_there = self.num_computed >= len(self.request.prompt_ids)
        is_untouched = self.num_computed == 0 and self.swapped is None
        return Member(
            self.name,
            self.request.group,
            can_give=self.has_drawn and is_prompt_there,
            can_take=is_untouched and not self.wants_prompt_logprobs,
        )

    @property
    def max_total(self) -> int:
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    def facts(self, num_blocks: int, num_shared_blocks: int = 0, num_given: int = 0) -> SequenceFacts:
        """num_given: positions that it would get computed when it is admitted, in `num_shared_blocks` blocks."""
        num_computed = max(self.num_computed, num_given)
        return SequenceFacts(
            self.name,
            len(self.tokens),
            num_computed,
            num_blocks,
            self.max_total,
            num_shared_blocks,
        )

    def unscored(self, first: int, count: int) -> range:
        """Of the positions first .. first + count - 1, those whose logits give a prompt logprob still missing."""
        if not self.wants_prompt_logprobs:
            return range(0)
        known = len(self.prompt_logprobs)
        return range(max(first, known - 1), min(first + count, len(self.request.prompt_ids) - 1))

    def drawable(self, logits_V: Tensor) -> Tensor:
        """The logits that the next token is drawn from: those given, or float64 ones with the request's grammar,
        penalties and biases. Raises GrammarFailed where these leave no token."""
        sampling = self.request.sampling
        if not sampling.has_adjustments:
            return logits_V
        if self.grammar is not None:
            logits_V = self.grammar.allowed_only(logits_V)
        if self._history is None and sampling.has_penalties:
            num_prompt = len(self.request.prompt_ids)
            self._history = TokenHistory(self.tokens[:num_prompt], self.tokens[num_prompt:])
        adjusted_V = adjusted(logits_V, sampling, self._history, self.num_generated)
        if self.grammar is not None and not bool(adjusted_V.max() > float("-inf")):
            raise GrammarFailed("min_tokens holds back every token that it allows")
        return adjusted_V

    def append(self, token: int) -> None:
        """Raises GrammarFailed."""
        self.tokens.append(token)
        if self.grammar is not None:
            self.grammar.take(token)
        if self._history is not None:
            self._history.add(token)

    def positions(self, first: int, count: int) -> Tensor:
        """(3, count) rotary positions of tokens first .. first + count - 1."""
        given = self.inputs.positions_3P
        if given is None:
            return torch.arange(first, first + count).expand(3, -1)
        num_given = max(0, min(given.shape[1] - first, count))
        behind = (torch.arange(first + num_given, first + count) + self._position_shift).expand(3, -1)
        return behind if num_given == 0 else torch.cat((given[:, first : first + num_given], behind), dim=1)

    def text_lengths(self, first: int, count: int) -> Tensor:
        """(count,) for each token the longer of the prompt and the text up to it: a function of the request alone,
        whatever the prompt was cut into."""
        return torch.arange(first + 1, first + count + 1).clamp_(min=len(self.request.prompt_ids))

    def finish_after(self, token: int) -> FinishReason | None:
        """Why the sequence ends once `token` was appended, if it does."""
        is_complete = self.grammar is not None and self.grammar.is_complete
        if is_complete or token in self.request.sampling.stop_token_ids:
            return "stop"
        if self.num_generated >= self.request.sampling.max_tokens:
            return "length"
        return None
