"""One speech on its way: what the talker was shown, the frames so far, and how far both are computed."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from router.penalties import TokenHistory
from router.request import GenerationRequest
from router.speech.wish import NUM_CODES

Frame = tuple[int, ...]
"""NUM_CODES codes."""


class Speech:
    """Owned by `router.speech.speaker`. A position of the talker is one of the prompt's, then one for each frame."""

    def __init__(
        self, request: GenerationRequest, prompt_PD: Tensor, trailing_ND: Tensor, positions_3P: Tensor | None
    ) -> None:
        """prompt_PD: inputs of the prompt. trailing_ND: what is added to the frames' inputs; the last row stands for
        all frames behind. positions_3P: int64; None means 0, 1, 2, ... in all three rows."""
        self.request = request
        self.prompt_PD, self.trailing_ND = prompt_PD, trailing_ND
        self.frames: list[Frame] = frames_of(request.generated_ids)
        self.num_computed = 0
        self.has_drawn = False
        """Whether a frame was drawn from what is computed: then its keys and values are finite."""
        self.history = TokenHistory((), (frame[0] for frame in self.frames))
        self._positions_3P = positions_3P
        self._shift = 0 if positions_3P is None else int(positions_3P.max()) + 1 - len(prompt_PD)

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def num_known(self) -> int:
        """Positions whose input is known."""
        return len(self.prompt_PD) + len(self.frames)

    @property
    def num_missing(self) -> int:
        return self.num_known - self.num_computed

    @property
    def is_complete(self) -> bool:
        """Whether there are as many frames as were asked for at most."""
        return len(self.frames) >= self.request.sampling.max_tokens

    def advance(self, count: int) -> int:
        """So many positions more are computed. Returns how many of them were the prompt's."""
        before = min(self.num_computed, len(self.prompt_PD))
        self.num_computed += count
        return min(self.num_computed, len(self.prompt_PD)) - before

    def begin_anew(self) -> None:
        """Its keys and values are gone; what is known stays."""
        self.num_computed, self.has_drawn = 0, False

    def append(self, frame: Frame) -> None:
        self.has_drawn = True
        self.frames.append(frame)
        self.history.add(frame[0])

    def frames_at(self, first: int, count: int) -> range:
        """Indices of the frames among so many positions."""
        num_prompt = len(self.prompt_PD)
        return range(max(0, first - num_prompt), max(0, first + count - num_prompt))

    def text_at(self, frames: Iterable[int]) -> Tensor:
        """(F, D) what is added to these frames' inputs."""
        last = len(self.trailing_ND) - 1
        return self.trailing_ND[[min(frame, last) for frame in frames]]

    def positions(self, first: int, count: int) -> Tensor:
        """(3, count) rotary positions."""
        behind = torch.arange(first, first + count).expand(3, -1) + self._shift
        if self._positions_3P is None:
            return behind
        given_3G = self._positions_3P[:, first : first + count]
        return torch.cat((given_3G, behind[:, given_3G.shape[1] :]), dim=1)


def frames_of(codes: tuple[int, ...]) -> list[Frame]:
    """Codes of whole frames, frame by frame."""
    return [codes[first : first + NUM_CODES] for first in range(0, len(codes), NUM_CODES)]
