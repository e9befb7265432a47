"""The code predictor: a small dense decoder that draws codes 1 to 15 of a frame, one after another.

It begins anew with every frame, with what the talker made of it and code 0. Frames of several speeches go together; a
frame's codes depend on nothing beside it (docs/exactness.md). Called by `router.speech.speaker`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from experts.directory import ExpertDirectory
from experts.numerics import RowKernel
from experts.packed_matrix import linear
from experts.store import ExpertStore
from extraction.decoder_config import read_flag, read_size
from extraction.errors import ConfigInvalid
from router.decoder_layer import LayerArithmetic
from router.errors import ConfigUnsupported
from router.kv_cache import KvPool
from router.layer_run import compute_run, find_run
from router.linears import FLOAT, LinearForms
from router.model_config import ModelConfig
from router.rope_config import read_rope
from router.speech.facts import CODE_PREDICTOR
from router.speech.wish import NUM_CODES
from router.step_batch import Span, StepBatch
from router.weights import TensorLoader, load_layer

DrawCode = Callable[[int, int, Tensor], int]
"""(frame of the batch, number of the code, (V,) float32 logits) -> the code."""


def read_predictor_config(config: Mapping[str, Any]) -> ModelConfig:
    """Raises ConfigUnsupported when a key is missing, out of range, or asks for what is not computed."""
    try:
        heads = read_size(config, "num_attention_heads", 16)
        has_bias = read_flag(config, "attention_bias")
        width, head_dim = read_size(config, "hidden_size", 1024), read_size(config, "head_dim", 128)
        num_kv_heads = read_size(config, "num_key_value_heads", 8)
        epsilon = config.get("rms_norm_eps", 1e-6)
        shape = {
            "vocab_size": read_size(config, "vocab_size", 2048),
            "num_layers": read_size(config, "num_hidden_layers", 5),
            "dense_width": read_size(config, "intermediate_size", 3072),
        }
    except ConfigInvalid as error:
        raise ConfigUnsupported(f"code_predictor_config.{error.key}", error.reason) from error
    if heads % num_kv_heads or head_dim % 2 or config.get("hidden_act", "silu") != "silu":
        raise ConfigUnsupported("code_predictor_config", "has heads or an activation that are not computed")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ConfigUnsupported("code_predictor_config.rms_norm_eps", f"{epsilon!r} is no small number")
    return ModelConfig(
        **shape,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=epsilon,
        rope=read_rope(config, head_dim, NUM_CODES, 10000.0),
        max_position_embeddings=NUM_CODES,
        qk_norm="per_head",
        has_qkv_bias=has_bias,
        has_output_bias=has_bias,
        clip_qkv=None,
        sliding_window=None,
        windowed_layers=frozenset(),
        num_experts=0,
        experts_per_token=1,
        normalise_top_k=False,
        moe_layers=frozenset(),
        expert_width=0,
        shared_width=None,
        has_tied_head=False,
    )


class CodePredictor:
    """Weights, and one block of keys and values for each frame that is drawn at a time."""

    def __init__(
        self,
        store: ExpertStore,
        config: ModelConfig,
        kernel: RowKernel,
        directory: ExpertDirectory,
        dtype: torch.dtype,
        most_frames: int,
        forms: LinearForms = FLOAT,
    ) -> None:
        """directory: is never asked, the decoder has no experts. most_frames: that are drawn together. forms: of the
        layers' matrices and the heads.

        Raises WeightMismatch, or what reading the store raises.
        """
        self.config, self._kernel = config, kernel
        load = TensorLoader(store, CODE_PREDICTOR, dtype, kernel, forms)
        self._layers = [
            load_layer(load, index, CODE_PREDICTOR, config, kernel, directory)
            for index in range(config.num_layers)
        ]
        sizes = config.vocab_size, config.hidden_size
        others = range(NUM_CODES - 1)
        self.embeddings = [load(f"codec_embedding.{number}.weight", *sizes) for number in others]
        """Of codes 1 to 15, (V, D) each."""
        self._heads = [load.own_head(f"lm_head.{number}.weight", *sizes) for number in others]
        self._norm_D = load("norm.weight", config.hidden_size)
        self._arithmetic = LayerArithmetic(config, kernel, dtype)
        self._pool = KvPool(config, most_frames + 1, dtype)

    @property
    def nbytes(self) -> int:
        tensors = (*self.embeddings, *self._heads, self._norm_D, self._pool.keys, self._pool.values)
        return sum(tensor.nbytes for tensor in tensors) + sum(layer.nbytes for layer in self._layers)

    @torch.inference_mode()
    def draw(self, hidden_BD: Tensor, first_BD: Tensor, draw_code: DrawCode) -> list[tuple[int, ...]]:
        """Codes 1 to 15 of B frames. hidden_BD: the talker's last hidden states, normed. first_BD: embeddings of the
        frames' codes 0. draw_code: is asked frame by frame for each code."""
        frames: list[list[int]] = [[] for _ in hidden_BD]
        inputs_TD = torch.stack((hidden_BD, first_BD), dim=1).flatten(0, 1)
        first = 0
        for number, head_VD in enumerate(self._heads):
            count = len(inputs_TD) // len(frames)
            last_BD = self._forward(inputs_TD, first, count)[count - 1 :: count]
            logits_BV = linear(self._kernel, self._arithmetic.norm(last_BD, self._norm_D), head_VD).float()
            for row, codes in enumerate(frames):
                codes.append(draw_code(row, number + 1, logits_BV[row]))
            drawn = torch.tensor([codes[-1] for codes in frames])
            inputs_TD = self.embeddings[number].index_select(0, drawn)
            first += count
        return [tuple(codes) for codes in frames]

    def scrub(self) -> None:
        """Forget keys and values that may not be finite: masked ones would still poison whoever comes next."""
        self._pool.scrub(range(self._pool.keys.shape[1]))

    def _forward(self, inputs_TD: Tensor, first: int, count: int) -> Tensor:
        """All layers for `count` rows of each frame from position `first` on: (T, D)."""
        num_rows = len(inputs_TD)
        spans = tuple(Span((1 + frame,), first, count) for frame in range(num_rows // count))
        positions = torch.arange(first, first + count).repeat(len(spans))
        ids = torch.zeros(num_rows, dtype=torch.int64)
        step = self._arithmetic.prepare(StepBatch(spans, ids, positions.expand(3, -1), ()))
        hidden_PD = self._arithmetic.pad(inputs_TD)
        run = find_run(0, self._layers, step, len(self._layers))
        if run is not None and len(run.layers) == len(self._layers):
            return compute_run(run, hidden_PD, step, self._pool, None).hidden_TD
        for index, layer in enumerate(self._layers):
            attended_PD = self._arithmetic.attention(index, layer, hidden_PD, step, self._pool)
            assert attended_PD is not None
            computed_PD = self._arithmetic.feed_forward(layer, attended_PD, step)
            assert computed_PD is not None
            hidden_PD = computed_PD
        return hidden_PD[:num_rows]
