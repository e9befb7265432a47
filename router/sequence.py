"""One sequence on its way through the engine: its tokens, how far they are computed, and what it was given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router.batcher import SequenceFacts
from router.errors import PromptInvalid
from router.request import FinishReason, GenerationRequest


@dataclass(frozen=True)
class PromptInputs:
    """What a prompt brings beside token ids: inputs that stand for media, and a wish to see hidden states."""

    embeddings: Mapping[int, Tensor] = field(default_factory=dict)
    """Prompt index -> (D,) input in place of the token's embedding."""
    positions_3P: Tensor | None = None
    """int64 rotary positions of the P prompt tokens; None means 0, 1, 2, ... in all three rows."""
    injections: Mapping[int, Mapping[int, Tensor]] = field(default_factory=dict)
    """Layer -> prompt index -> (D,) added to the hidden state after that layer."""
    capture_layers: tuple[int, ...] = ()
    on_capture: Callable[[int, int, Tensor], None] | None = None
    """Called with (layer, first index, (count, D) hidden states) for every computed piece."""

    def validate(self, num_prompt: int, num_layers: int, width: int) -> None:
        """Raises PromptInvalid when something lies outside the prompt or the model, or has another width."""
        if self.positions_3P is not None and tuple(self.positions_3P.shape) != (3, num_prompt):
            raise PromptInvalid(
                f"positions of shape {tuple(self.positions_3P.shape)} for {num_prompt} tokens"
            )
        layers = {*self.capture_layers, *self.injections}
        if any(not 0 <= layer < num_layers for layer in layers):
            raise PromptInvalid(f"layers {sorted(layers)} are not all among the model's {num_layers}")
        for rows in (self.embeddings, *self.injections.values()):
            for index, vector in rows.items():
                if not 0 <= index < num_prompt or tuple(vector.shape) != (width,):
                    raise PromptInvalid(
                        f"an input of shape {tuple(vector.shape)} at index {index} of {num_prompt} tokens"
                    )


NO_INPUTS = PromptInputs()


class Sequence:
    """A request's state. Owned by the engine's thread."""

    def __init__(self, request: GenerationRequest, inputs: PromptInputs = NO_INPUTS) -> None:
        self.request = request
        self.inputs = inputs
        self.tokens = [*request.prompt_ids, *request.generated_ids]
        self.num_computed = 0
        self.swapped: tuple[Tensor, Tensor] | None = None
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
    def max_total(self) -> int:
        return len(self.request.prompt_ids) + self.request.sampling.max_tokens

    def facts(self, num_blocks: int) -> SequenceFacts:
        return SequenceFacts(self.name, len(self.tokens), self.num_computed, num_blocks, self.max_total)

    def positions(self, first: int, count: int) -> Tensor:
        """(3, count) rotary positions of tokens first .. first + count - 1."""
        given = self.inputs.positions_3P
        plain = torch.arange(first, first + count).expand(3, -1)
        if given is None:
            return plain
        num_given = max(0, min(given.shape[1] - first, count))
        return torch.cat(
            (given[:, first : first + num_given], plain[:, num_given:] + self._position_shift), dim=1
        )

    def text_lengths(self, first: int, count: int) -> Tensor:
        """(count,) for each token the longer of the prompt and the text up to it: a function of the request alone,
        whatever the prompt was cut into."""
        return torch.arange(first + 1, first + count + 1).clamp_(min=len(self.request.prompt_ids))

    def finish_after(self, token: int) -> FinishReason | None:
        """Why the sequence ends once `token` was appended, if it does."""
        if token in self.request.sampling.stop_token_ids:
            return "stop"
        if self.num_generated >= self.request.sampling.max_tokens:
            return "length"
        return None
