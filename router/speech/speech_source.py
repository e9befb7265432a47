"""What a router speaks with, before the first speech is asked for: where it comes from, and how it is opened.

Made by `router.loading`; opened by `router.speech.speech_thread`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.store import ExpertStore
from router.request import GenerationRequest
from router.speech.facts import SpeechFacts
from router.speech.inputs import check_speech
from router.speech.opening import SpeakerOptions, open_speaker
from router.speech.parts import ProveKernel
from router.speech.prompt import TalkerPrompt
from router.speech.speech_engine import SpeechEngine
from router.speech.vocoder import Vocoder


@dataclass(frozen=True)
class SpeechSource:
    store: ExpertStore
    facts: SpeechFacts
    thinker_VD: Tensor
    """Embeddings of the text's decoder."""
    dtype: torch.dtype
    """Of the text's engine."""
    options: SpeakerOptions
    prove: ProveKernel
    """The row kernel of a decoder."""

    def check(self, request: GenerationRequest) -> TalkerPrompt:
        """On any thread. Raises PromptInvalid."""
        return check_speech(self.facts, request, self.thinker_VD.shape[0])

    def open(self) -> SpeechEngine:
        """Reads all weights but those of experts.

        Raises ConfigUnsupported, WeightMismatch, NotRowInvariant, or what reading the store raises.
        """
        speaker = open_speaker(self.store, self.facts, self.thinker_VD, self.dtype, self.options, self.prove)
        try:
            vocoder = Vocoder.open(self.store, speaker.parts.talker.arithmetic.kernel, self.dtype)
        except BaseException:
            speaker.close()
            raise
        return SpeechEngine(speaker, vocoder)
