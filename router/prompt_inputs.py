"""What a prompt brings beside token ids: inputs that stand for media, and a wish to see hidden states.

Made by `router.media.encoder`; `router.step_pass` cuts it into the rows of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from router.errors import PromptInvalid


class InputRows(NamedTuple):
    """Vectors of consecutive tokens."""

    first: int
    """Of a prompt's tokens, or of a step's rows."""
    rows_ND: Tensor

    @property
    def end(self) -> int:
        return self.first + len(self.rows_ND)

    def within(self, first: int, end: int, shift: int) -> InputRows | None:
        """The part among tokens first .. end - 1, counted from `-shift`; None where there is none."""
        begin, stop = max(self.first, first), min(self.end, end)
        if begin >= stop:
            return None
        return InputRows(begin + shift, self.rows_ND[begin - self.first : stop - self.first])


class MediaSpan(NamedTuple):
    """Which of a prompt's tokens stand for an image or a sound."""

    first: int
    length: int
    digest: bytes
    """Of what they stand for."""


@dataclass(frozen=True)
class PromptInputs:
    """All of it, by index of the prompt's tokens."""

    embeddings: tuple[InputRows, ...] = ()
    """Inputs in place of the tokens' embeddings."""
    positions_3P: Tensor | None = None
    """int64 rotary positions of the P prompt tokens; None means 0, 1, 2, ... in all three rows."""
    injections: Mapping[int, tuple[InputRows, ...]] = field(default_factory=dict)
    """Layer -> what is added to the hidden states after that layer."""
    capture_layers: tuple[int, ...] = ()
    on_capture: Callable[[int, int, Tensor], None] | None = None
    """Called with (layer, first index, (count, D) hidden states) for every computed piece."""
    capture_from: int = 0
    """Index of the first token whose states are wanted; keys and values of those before may be found computed."""
    media: tuple[MediaSpan, ...] | None = None
    """In order, where all of the above follows from them and the token ids; None where it does not."""

    def validate(self, num_prompt: int, num_layers: int, width: int) -> None:
        """Raises PromptInvalid when something lies outside the prompt or the model, or has another width."""
        if self.positions_3P is not None and tuple(self.positions_3P.shape) != (3, num_prompt):
            raise PromptInvalid(
                f"positions of shape {tuple(self.positions_3P.shape)} for {num_prompt} tokens"
            )
        layers = {*self.capture_layers, *self.injections}
        if any(not 0 <= layer < num_layers for layer in layers):
            raise PromptInvalid(f"layers {sorted(layers)} are not all among the model's {num_layers}")
        for runs in (self.embeddings, *self.injections.values()):
            for run in runs:
                if run.first < 0 or run.end > num_prompt or run.rows_ND.shape[1:] != (width,):
                    raise PromptInvalid(
                        f"inputs of shape {tuple(run.rows_ND.shape)} from index {run.first} of {num_prompt} tokens"
                    )


NO_INPUTS = PromptInputs(media=())


def rows_within(runs: Iterable[InputRows], first: int, end: int, shift: int) -> Iterator[InputRows]:
    """See `InputRows.within`."""
    for run in runs:
        part = run.within(first, end, shift)
        if part is not None:
            yield part
