"""What speech takes, in bytes, known before a weight is read, or from configurations alone where there is no store.

Called by `router.footprint`, and by `cluster.model_sizes`, which has no store. It is taken when the first speech is
asked for, and must have been left by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from experts.native_products import chosen_level
from experts.numerics import RowKernel
from router.kv_cache import KvPool
from router.linears import FLOAT, LinearForm, LinearForms
from router.media.sizes import TensorCounter
from router.model_config import ModelConfig, read_model_config
from router.speech.code_predictor import read_predictor_config
from router.speech.codec_shape import TAPS, CodecShape, read_codec_shape
from router.speech.codec_weights import CodecReader, codec_dtype
from router.speech.facts import CODE2WAV, CODE_PREDICTOR, TALKER
from router.speech.opening import SpeakerOptions, speech_kv_blocks
from router.speech.states import KEPT_BYTES, MOST_OPEN_BYTES
from router.speech.vocoder import FRAMES_AT_ONCE, Vocoder, stream_blocks
from router.speech.wish import NUM_CODES, SAMPLES_OF_FRAME

VALUES_AT_ONCE = 4
"""Of a channel, float32, while samples are made: what came, what is kept of it, and two on their way."""


def speech_bytes(
    configs: Mapping[str, Mapping[str, Any]],
    talker_bytes: int,
    dtype: torch.dtype,
    forms: LinearForms = FLOAT,
    options: SpeakerOptions | None = None,
) -> int:
    """All but the talker's experts: weights, keys and values, states of media, and what is on its way.

    configs: of the components that speak, by name. talker_bytes: of the talker's weights. forms: of the code
    predictor's. Raises ConfigUnsupported.
    """
    options = options or SpeakerOptions()
    talker, predictor = (
        read_model_config(configs[TALKER]),
        read_predictor_config(configs[CODE_PREDICTOR]),
    )
    shape, most = read_codec_shape(configs[CODE2WAV]), options.limits.most_running
    sound_dtype = codec_dtype(dtype, is_native=chosen_level(dtype) is not None)
    return (
        talker_bytes
        + speech_kv_blocks(talker, dtype, options) * KvPool.block_bytes(talker, dtype)
        + _predictor_bytes(predictor, dtype, forms)
        + (most + 1) * KvPool.block_bytes(predictor, dtype)
        + _codec_bytes(shape, sound_dtype)
        + most * stream_blocks(shape) * KvPool.block_bytes(shape.decoder, sound_dtype)
        + _sound_bytes(shape, sound_dtype)
        + KEPT_BYTES
        + MOST_OPEN_BYTES
    )


def _predictor_bytes(config: ModelConfig, dtype: torch.dtype, forms: LinearForms) -> int:
    """Its matrices, embeddings and heads; norms take little."""
    head, others = (config.vocab_size, config.hidden_size), NUM_CODES - 1
    return (
        sum(_weight_bytes(shape, dtype, forms.backbone) for shape in config.backbone_matrices())
        + others * _weight_bytes(head, dtype, forms.head)
        + others * _weight_bytes(head, dtype, None)
    )


def _weight_bytes(shape: tuple[int, int], dtype: torch.dtype, form: LinearForm | None) -> int:
    return shape[0] * shape[1] * dtype.itemsize if form is None else form.loaded_bytes(shape)


def _codec_bytes(shape: CodecShape, dtype: torch.dtype) -> int:
    read = CodecReader(TensorCounter(torch.float32), RowKernel(1), dtype)
    return Vocoder(shape, read).nbytes


def _sound_bytes(shape: CodecShape, dtype: torch.dtype) -> int:
    """At the last rate, which has the most values; a product has each row as often as others look at it."""
    values = FRAMES_AT_ONCE * SAMPLES_OF_FRAME * shape.channels(len(shape.upsample_rates))
    return values * (VALUES_AT_ONCE * torch.float32.itemsize + TAPS * dtype.itemsize)
