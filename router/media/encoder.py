"""From a request with media to what the engine takes: finds what their tokens stand for, encoded once while it is kept.

Towers are read from the store when the first medium of their kind comes. One medium is encoded at a time and alone, so
what it becomes depends on nothing but itself. Called by `router.media.encoding_thread` and by commands without a
service; encodes for one caller at a time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from experts.numerics import RowKernel, calibrate
from experts.store import ExpertStore
from router.errors import ConfigUnsupported, MediaUnwanted, PromptInvalid
from router.media.audio_tower import AudioTower, read_audio_shape
from router.media.facts import AUDIO, VISION, MediaFacts, read_media_facts
from router.media.items import Image, Medium, Sound
from router.media.positions import Grid, image_positions
from router.media.preprocessing import log_mel, patches
from router.media.tower_parts import TowerReader
from router.media.vision_tower import VisionTower, read_vision_shape
from router.model_config import ModelConfig
from router.prompt_inputs import NO_INPUTS, InputRows, MediaSpan, PromptInputs
from router.request import GenerationRequest

logger = logging.getLogger(__name__)

KEPT_BYTES = 256 << 20
"""Of encoded media: a dozen images of the largest size in a model of 2,048 wide rows."""


MOST_WORK_BYTES = 512 << 20
"""Taken at a time, in the published model's towers, by an image of the largest size or five minutes of sound."""


@dataclass(frozen=True)
class Encoded:
    """What stands for one medium."""

    rows_ND: Tensor
    deepstack: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.rows_ND.nbytes + sum(tensor.nbytes for tensor in self.deepstack)


@dataclass
class EncoderStats:
    """Counters since the start."""

    encoded: int = 0
    found: int = 0
    seconds: float = 0.0
    tower_bytes: int = 0
    kept_bytes: int = 0


class MediaEncoder:
    """The towers of one store, and what they made last."""

    def __init__(
        self,
        store: ExpertStore,
        config: ModelConfig,
        kernel: RowKernel,
        dtype: torch.dtype,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """kernel: of the decoder. Raises ConfigUnsupported; reads no weights."""
        self.facts: MediaFacts = read_media_facts(store.manifest, store.root)
        self.stats = EncoderStats()
        self._store, self._config, self._dtype = store, config, dtype
        self._kernel, self._most_kept_bytes = kernel, kept_bytes
        self._kept: OrderedDict[tuple[str, bytes], Encoded] = OrderedDict()
        """By owner and digest: nobody learns from the time that an answer takes what others have shown."""
        self._made: WeakValueDictionary[tuple[str, tuple[int, ...], tuple[MediaSpan, ...]], PromptInputs]
        self._made = WeakValueDictionary()
        """What open requests have, by owner and prompt: choices of one prompt share it, however large its media are."""
        self._lock = threading.Lock()
        self._vision: VisionTower | None = None
        self._audio: AudioTower | None = None
        if self.facts.image is not None:
            self._vision_shape = read_vision_shape(store.component(VISION).config)
            _check_width("vision_config.out_hidden_size", self._vision_shape.out_hidden_size, config)
            if len(self._vision_shape.deepstack_visual_indexes) > config.num_layers:
                raise ConfigUnsupported("vision_config.deepstack_visual_indexes", "are more than layers")
        if self.facts.sound is not None:
            self._audio_shape = read_audio_shape(store.component(AUDIO).config)
            _check_width("audio_config.output_dim", self._audio_shape.output_dim, config)

    def inputs_for(
        self, request: GenerationRequest, is_wanted: Callable[[], bool] = lambda: True
    ) -> PromptInputs:
        """Encode what is not kept. is_wanted: asked before each medium, which may take half a minute.

        Raises PromptInvalid where tokens and media do not fit each other, MediaUnwanted, or what reading the store
        raises.
        """
        if not request.media:
            return NO_INPUTS
        spans = self._checked_spans(request)
        name = request.owner, request.prompt_ids, spans
        made = self._made.get(name)
        if made is not None:
            self.stats.found += len(spans)
            return made
        made = self._made[name] = self._encoded_all(request, spans, is_wanted)
        return made

    def _encoded_all(
        self, request: GenerationRequest, spans: tuple[MediaSpan, ...], is_wanted: Callable[[], bool]
    ) -> PromptInputs:
        embeddings: list[InputRows] = []
        injections: dict[int, tuple[InputRows, ...]] = {}
        grids: list[Grid] = []
        for placed in request.media:
            if not is_wanted():
                raise MediaUnwanted
            encoded = self._encoded(placed.medium, request.owner)
            embeddings.append(InputRows(placed.first, encoded.rows_ND))
            for layer, rows_ND in enumerate(encoded.deepstack):
                injections[layer] = (*injections.get(layer, ()), InputRows(placed.first, rows_ND))
            if isinstance(placed.medium, Image):
                assert self.facts.image is not None
                grids.append(Grid(placed.first, *self.facts.image.grid(placed.medium)))
        positions = image_positions(len(request.prompt_ids), grids) if grids else None
        return PromptInputs(tuple(embeddings), positions, injections, media=spans)

    def _checked_spans(self, request: GenerationRequest) -> tuple[MediaSpan, ...]:
        spans: list[MediaSpan] = []
        behind = 0
        for placed in request.media:
            try:
                token, length = self.facts.token_id(placed.medium), self.facts.num_tokens(placed.medium)
            except ValueError as error:
                raise PromptInvalid(str(error)) from error
            found = request.prompt_ids[placed.first : placed.first + length]
            if placed.first < behind or not length or found != (token,) * length:
                raise PromptInvalid(f"no {length} tokens of media from {placed.first} on")
            spans.append(MediaSpan(placed.first, length, placed.medium.digest))
            behind = placed.first + length
        return tuple(spans)

    def _encoded(self, medium: Medium, owner: str) -> Encoded:
        name = owner, medium.digest
        with self._lock:
            kept = self._kept.get(name)
            if kept is not None:
                self._kept.move_to_end(name)
                self.stats.found += 1
                return kept
            started = time.perf_counter()
            try:
                encoded = self._see(medium) if isinstance(medium, Image) else self._hear(medium)
            except ValueError as error:
                raise PromptInvalid(str(error)) from error
            self.stats.encoded += 1
            self.stats.seconds += time.perf_counter() - started
            self._keep(name, encoded)
            return encoded

    def _keep(self, name: tuple[str, bytes], encoded: Encoded) -> None:
        self._kept[name] = encoded
        self.stats.kept_bytes += encoded.nbytes
        while self.stats.kept_bytes > self._most_kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.stats.kept_bytes -= oldest.nbytes

    def _see(self, image: Image) -> Encoded:
        assert self.facts.image is not None
        cut = torch.from_numpy(patches(image, self.facts.image))
        if self._vision is None:
            shape = self._vision_shape
            widths = shape.hidden_size, shape.intermediate_size
            reader = self._reader(VISION, [widths, (widths[1], widths[0]), (widths[0], cut.shape[1])])
            self._vision = VisionTower(shape, reader)
            self.stats.tower_bytes += reader.nbytes
        seen = self._vision.see(cut, self.facts.image.grid(image))
        return Encoded(seen.rows_ND, seen.deepstack)

    def _hear(self, sound: Sound) -> Encoded:
        assert self.facts.sound is not None
        mels = torch.from_numpy(log_mel(sound, self.facts.sound.num_mel_bins))
        if self._audio is None:
            shape = self._audio_shape
            reader = self._reader(
                AUDIO, [(shape.d_model, shape.d_model), (shape.encoder_ffn_dim, shape.d_model)]
            )
            self._audio = AudioTower(shape, reader)
            self.stats.tower_bytes += reader.nbytes
        return Encoded(self._audio.hear(mels))

    def _reader(self, component: str, shapes: list[tuple[int, int]]) -> TowerReader:
        """shapes: of matrices, for which a library's product has to be proved. Towers are computed on the CPU whatever
        computes the decoder."""
        logger.info("reading the %s tower", component)
        kernel = self._kernel if self._kernel.product == "native" else calibrate(shapes, self._dtype)
        return TowerReader(self._store, component, kernel, self._dtype)


def _check_width(key: str, width: int, config: ModelConfig) -> None:
    if width != config.hidden_size:
        raise ConfigUnsupported(key, f"is {width}, the decoder is {config.hidden_size} wide")
