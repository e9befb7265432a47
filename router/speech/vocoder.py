"""From a speech's frames of codes to its samples, as they come: the codec's decoder, exact in any pieces.

A `Vocoder` owns the weights, a `VoiceStream` what one speech has so far. What is told of n frames is a pure function of
these frames, whatever they were cut into, and equals one call of the published decoder. One thread at a time.
Source: `transformers`, Qwen3OmniMoeCode2Wav. Called by `router.speech.speech_thread`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.numerics import RowKernel
from experts.store import ExpertStore
from router.decoder_layer import LayerArithmetic
from router.errors import SpeechFailed
from router.kv_cache import KvPool, blocks_for
from router.speech.codec_parts import StreamState
from router.speech.codec_shape import CodecShape, read_codec_shape
from router.speech.codec_weights import COMPONENT, CodecReader, read_layers, read_parts
from router.speech.wish import NUM_CODES
from router.step_batch import Span, StepBatch

FRAMES_AT_ONCE = 8
"""Bounds the memory of a call: at the published sizes a frame has up to 7 MB of values on their way at a time. Weights
are read from memory once for so many, beside whose products that takes little."""
LARGEST_SAMPLE = 32767

Frame = Sequence[int]
"""NUM_CODES codes."""


def stream_blocks(shape: CodecShape) -> int:
    """Of a stream's keys and values, written over in turn."""
    return blocks_for(shape.window + FRAMES_AT_ONCE) + 1


class VoiceStream:
    """What one speech has so far: the last rows of every layer, and the keys and values that are within the window."""

    def __init__(self, shape: CodecShape, dtype: torch.dtype, first: int) -> None:
        self.num_frames = first
        self.state = StreamState()
        self.num_blocks = stream_blocks(shape)
        self.pool = KvPool(shape.decoder, self.num_blocks, dtype)

    def span(self, num_frames: int) -> Span:
        """Of the next frames. What the window has left is written over."""
        last = blocks_for(self.num_frames + num_frames)
        table = tuple(index % self.num_blocks for index in range(last))
        return Span(table, self.num_frames, num_frames)


class Vocoder:
    """The codec's weights, and the way through them."""

    def __init__(self, shape: CodecShape, read: CodecReader) -> None:
        """Raises WeightMismatch, ConfigUnsupported, or what reading the store raises."""
        config = shape.decoder
        self.shape, self._dtype = shape, read.dtype
        num_codes = NUM_CODES * shape.codebook_size
        self._embeddings = read.rounded(read.tensor("code_embedding.weight", num_codes, config.hidden_size))
        self._offsets = torch.arange(NUM_CODES) * shape.codebook_size
        self._arithmetic = LayerArithmetic(config, read.kernel, read.dtype)
        self._layers = list(read_layers(shape, read))
        self._norm_D = read.rounded(read.tensor("pre_transformer.norm.weight", config.hidden_size))
        self._parts = read_parts(shape, read)
        self.nbytes = read.nbytes

    @classmethod
    def open(cls, store: ExpertStore, kernel: RowKernel, dtype: torch.dtype) -> Vocoder:
        """kernel, dtype: of the decoder that answers text.

        Raises WeightMismatch, ConfigUnsupported, NotRowInvariant, or what reading the store raises.
        """
        shape = read_codec_shape(store.component(COMPONENT).config)
        return cls(shape, CodecReader.of(store, shape, kernel, dtype))

    def stream(self, first: int = 0) -> VoiceStream:
        """Of a speech from its frame `first` on: what then comes of the first `CodecShape.lookback` frames is not how
        the speech sounds, since it depends on frames before them, and all behind these is."""
        return VoiceStream(self.shape, self._dtype, first)

    @torch.inference_mode()
    def speak(self, stream: VoiceStream, frames: Sequence[Frame]) -> bytes:
        """The samples that these frames settle, as `router.request.TokenEvent` has them.

        Raises IndexError for a code outside the codebook, SpeechFailed where a sample is no number.
        """
        pieces = [
            self.waveform(stream, torch.tensor(frames[first : first + FRAMES_AT_ONCE]))
            for first in range(0, len(frames), FRAMES_AT_ONCE)
        ]
        return b"".join(map(_as_bytes, pieces))

    @torch.inference_mode()
    def waveform(self, stream: VoiceStream, codes_TQ: Tensor) -> Tensor:
        """float32 samples within [-1, 1], of FRAMES_AT_ONCE frames at most."""
        x_TC = self._decode(stream, codes_TQ)
        for part in self._parts:
            x_TC = part(x_TC, stream.state)
        return x_TC[:, 0]

    def _decode(self, stream: VoiceStream, codes_TQ: Tensor) -> Tensor:
        """Frames in the light of those before them: (T, D) float32."""
        num_frames = len(codes_TQ)
        arithmetic = self._arithmetic
        hidden_PD = arithmetic.pad(self._embed(codes_TQ).to(self._dtype))
        step = arithmetic.prepare(_batch(stream.span(num_frames)))
        for index, layer in enumerate(self._layers):
            attended_PD = arithmetic.attention(index, layer, hidden_PD, step, stream.pool)
            assert attended_PD is not None
            mixed_PD = arithmetic.feed_forward(layer, attended_PD, step)
            assert mixed_PD is not None
            hidden_PD = mixed_PD
        stream.num_frames += num_frames
        return arithmetic.norm(hidden_PD, self._norm_D)[:num_frames].float()

    def _embed(self, codes_TQ: Tensor) -> Tensor:
        """The mean over a frame's codes, summed one after another."""
        if codes_TQ.min() < 0 or codes_TQ.max() >= self.shape.codebook_size:
            raise IndexError(f"codes outside the codebook of {self.shape.codebook_size}")
        rows_QTD = self._embeddings[(codes_TQ + self._offsets).t()].float()
        total_TD = rows_QTD[0]
        for rows_TD in rows_QTD[1:]:
            total_TD = total_TD + rows_TD
        return total_TD / NUM_CODES


def _batch(span: Span) -> StepBatch:
    positions = torch.arange(span.first, span.first + span.count)
    return StepBatch(
        spans=(span,),
        token_ids_T=torch.zeros(span.count, dtype=torch.int64),
        positions_3T=positions.expand(3, -1),
        logit_rows=(),
        lengths_T=torch.full((span.count,), span.first + span.count),
    )


def _as_bytes(samples: Tensor) -> bytes:
    """16 bits each, little-endian. Raises SpeechFailed."""
    if not torch.isfinite(samples).all():
        raise SpeechFailed("the codec's decoder produced non-finite numbers")
    return (samples * LARGEST_SAMPLE).round_().to(torch.int16).numpy().astype("<i2").tobytes()
