"""One speech on its way: what the talker was shown, the frames so far, and how far both are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from router.penalties import TokenHistory
from router.request import GenerationRequest
from router.speech.inputs import TalkerInputs
from router.speech.wish import NUM_CODES

Frame = tuple[int, ...]
"""NUM_CODES codes."""


class Speech:
    """Owned by `router.speech.speaker`. A position of the talker is one of the prompt's, then one for each frame."""

    def __init__(
        self, request: GenerationRequest, inputs: TalkerInputs, positions_3P: Tensor | None = None
    ) -> None:
        """positions_3P: see `router.speech.inputs.speech_positions`."""
        self.request, self.inputs = request, inputs
        self.frames: list[Frame] = frames_of(request.generated_ids)
        self.num_computed = 0
        self.has_drawn = False
        """Whether a frame was drawn from what is computed: then its keys and values are finite."""
        self.history = TokenHistory((), (frame[0] for frame in self.frames))
        self._positions_3P = positions_3P
        self._shift = 0 if positions_3P is None else int(positions_3P.max()) + 1 - inputs.num_positions

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def num_prompt(self) -> int:
        """Positions before the first frame's."""
        return self.inputs.num_positions

    @property
    def num_known(self) -> int:
        """Positions whose input is known."""
        return self.num_prompt + len(self.frames)

    @property
    def num_missing(self) -> int:
        return self.num_known - self.num_computed

    @property
    def is_complete(self) -> bool:
        """Whether there are as many frames as were asked for at most."""
        return len(self.frames) >= self.request.sampling.max_tokens

    def advance(self, count: int) -> int:
        """So many positions more are computed. Returns how many of them were the prompt's."""
        before = min(self.num_computed, self.num_prompt)
        self.num_computed += count
        return min(self.num_computed, self.num_prompt) - before

    def begin_anew(self) -> None:
        """Its keys and values are gone; what is known stays."""
        self.num_computed, self.has_drawn = 0, False

    def append(self, frame: Frame) -> None:
        self.has_drawn = True
        self.frames.append(frame)
        self.history.add(frame[0])

    def frames_at(self, first: int, count: int) -> range:
        """Numbers of the frames among so many positions."""
        behind = first - self.num_prompt
        return range(max(0, behind), max(0, behind + count))

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
