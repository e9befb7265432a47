"""The decoder without its experts: embeddings, attention, norms, gates, dense layers, head.

Computes one step for a batch of token rows that belong to any mix of sequences and positions. Every product
goes through the row kernel, so a row's bits do not depend on the batch. Called by `router.engine`.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from experts.directory import ExpertDirectory
from experts.ffn import compute_segments
from experts.numerics import RowKernel
from experts.store import ExpertStore
from router.attention import ROW_MULTIPLE, attend
from router.kv_cache import KvPool
from router.model_config import ModelConfig
from router.rope import RotaryEmbedding, rotate
from router.step_batch import AttentionGroup, CacheSlots, StepBatch, StepOutput
from router.weights import Layer, TensorLoader, load_layer


class Backbone:
    """Weights on one device, and the forward pass of a step."""

    def __init__(
        self,
        store: ExpertStore,
        component: str,
        config: ModelConfig,
        kernel: RowKernel,
        directory: ExpertDirectory,
        dtype: torch.dtype,
    ) -> None:
        """Reads every backbone tensor of the component. Raises WeightMismatch, or what reading the store raises."""
        self.config, self.kernel, self.dtype = config, kernel, dtype
        load = TensorLoader(store, component, dtype)
        width = config.hidden_size
        self.embeddings_VD = load("embed_tokens.weight", config.vocab_size, width)
        self.layers = [
            load_layer(load, index, component, config, kernel, directory)
            for index in range(config.num_layers)
        ]
        self.norm_D = load("norm.weight", width)
        self.head_VD = (
            self.embeddings_VD if config.has_tied_head else load("lm_head.weight", config.vocab_size, width)
        )
        self.rope = RotaryEmbedding(config)
        self.progressed_at = time.monotonic()
        """When a layer was last finished; a step of a large model may take long without being stuck."""

    @property
    def nbytes(self) -> int:
        """Resident bytes of the weights; a tied head counts once."""
        tensors = [self.embeddings_VD, self.norm_D]
        if not self.config.has_tied_head:
            tensors.append(self.head_VD)
        return sum(tensor.nbytes for tensor in tensors) + sum(layer.nbytes for layer in self.layers)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, pool: KvPool) -> StepOutput:
        """Run one step: reads and extends the KV cache of the batch's sequences.

        Raises ExpertError when an expert could not be computed; the cache positions of this step are then
        undefined and may be computed again.
        """
        num_tokens = batch.num_tokens
        hidden_PD = self._embed(batch)
        cos, sin = self.rope.tables(batch.positions_3T, batch.lengths_T)
        cache = CacheSlots(batch.spans)
        captured: dict[int, Tensor] = {}
        phases = {"attention": 0.0, "experts": 0.0, "head": 0.0}
        for index, layer in enumerate(self.layers):
            started = time.perf_counter()
            normed_PD = self._norm(hidden_PD, layer.input_norm_D)
            attended_TO = self._attention(index, layer, normed_PD, cos, sin, cache, pool)
            hidden_PD = hidden_PD + self._output(attended_TO, layer)
            attended = time.perf_counter()
            normed_PD = self._norm(hidden_PD, layer.post_norm_D)
            hidden_PD = hidden_PD + self._feed_forward(layer, normed_PD, batch)
            phases["attention"] += attended - started
            phases["experts"] += time.perf_counter() - attended
            self.progressed_at = time.monotonic()
            if index in batch.capture_layers:
                captured[index] = hidden_PD[:num_tokens].clone()
            for row, vector_D in batch.injections.get(index, {}).items():
                hidden_PD[row] += vector_D.to(self.dtype)
        started = time.perf_counter()
        logits_LV = self.logits(_select(hidden_PD, batch.logit_rows))
        phases["head"] = time.perf_counter() - started
        return StepOutput(logits_LV, captured, phases, _select(hidden_PD, batch.scored_rows))

    @torch.inference_mode()
    def logits(self, hidden_LD: Tensor) -> Tensor:
        """Float32 logits of final hidden states. No rows are a chunk that does not reach its prompt's end."""
        if not len(hidden_LD):
            return hidden_LD.new_empty(0, self.config.vocab_size, dtype=torch.float32)
        return self.kernel.linear(self._norm(hidden_LD, self.norm_D), self.head_VD).float()

    def _embed(self, batch: StepBatch) -> Tensor:
        hidden_TD = self.embeddings_VD.index_select(0, batch.token_ids_T)
        for row, embedding_D in batch.embeddings.items():
            hidden_TD[row] = embedding_D.to(self.dtype)
        return self._pad(hidden_TD)

    def _pad(self, rows_TD: Tensor) -> Tensor:
        """Repeat the last row up to the row kernel's multiple, so that no product has to."""
        missing = self.kernel.padded(rows_TD.shape[0]) - rows_TD.shape[0]
        return torch.cat((rows_TD, rows_TD[-1:].expand(missing, -1))) if missing else rows_TD

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in float32; the weight is applied in the model's dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale).to(self.dtype) * weight

    def _feed_forward(self, layer: Layer, normed_PD: Tensor, batch: StepBatch) -> Tensor:
        if layer.moe is not None:
            routed_TD = layer.moe.forward(normed_PD, batch.num_tokens, batch.routing, batch.trace)
            return self._pad(routed_TD.to(self.dtype))
        assert layer.dense is not None
        return compute_segments(normed_PD, [(0, normed_PD.shape[0])], [layer.dense], self.kernel)

    def _attention(
        self,
        index: int,
        layer: Layer,
        normed_PD: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: CacheSlots,
        pool: KvPool,
    ) -> Tensor:
        """Returns (T, heads * head_dim) in the model's dtype."""
        config = self.config
        num_tokens = len(cache.blocks_T)
        q, k, v = self._queries_keys_values(layer, normed_PD, num_tokens)
        q = rotate(q.float(), cos, sin).mul_(config.head_dim**-0.5)
        k = rotate(k.float(), cos, sin).to(self.dtype)
        pool.write(index, cache.blocks_T, cache.offsets_T, k, v)
        attended = torch.empty_like(q)
        for group in cache.groups:
            keys, values = pool.gather(index, group.tables_SN)
            attended[group.rows] = _attend_group(
                q[group.rows], keys, values, group, config, config.window(index)
            )
        return attended.to(self.dtype).flatten(1)

    def _queries_keys_values(
        self, layer: Layer, normed_PD: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first `num_tokens` rows, before rotation: (T, heads, head_dim) each, in the model's dtype."""
        config = self.config
        qkv_TO = self.kernel.linear(normed_PD, layer.qkv_OD)[:num_tokens]
        if layer.qkv_bias_O is not None:
            qkv_TO = qkv_TO + layer.qkv_bias_O
        qkv = qkv_TO.view(num_tokens, -1, config.head_dim)
        q, k, v = torch.split(qkv, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            if config.qk_norm == "whole_width":
                q = self._norm(q.flatten(1), layer.q_norm).view(q.shape)
                k = self._norm(k.flatten(1), layer.k_norm).view(k.shape)
            else:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        if config.clip_qkv is not None:
            q, k, v = (part.clamp(-config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        return q, k, v

    def _output(self, attended_TO: Tensor, layer: Layer) -> Tensor:
        """The attention's output projection of padded rows, (P, D)."""
        output_PD = self.kernel.linear(self._pad(attended_TO), layer.output_DO)
        return output_PD if layer.output_bias_D is None else output_PD + layer.output_bias_D


def _select(hidden_PD: Tensor, rows: tuple[int, ...]) -> Tensor:
    return hidden_PD.index_select(0, torch.tensor(rows, dtype=torch.int64))


def _attend_group(
    q_RHd: Tensor,
    keys: Tensor,
    values: Tensor,
    group: AttentionGroup,
    config: ModelConfig,
    window: int | None,
) -> Tensor:
    """Bring query rows into (sequence x kv head, rows) form, attend, and back. Returns (R, heads, head_dim)."""
    num_sequences, count = group.limits_SC.shape
    per_kv = config.num_heads // config.num_kv_heads
    q = q_RHd.view(num_sequences, count, config.num_kv_heads, per_kv, config.head_dim)
    q_BMd = q.transpose(1, 2).reshape(num_sequences * config.num_kv_heads, count * per_kv, config.head_dim)
    limits = group.limits_SC.repeat_interleave(per_kv, dim=1).repeat_interleave(config.num_kv_heads, dim=0)
    num_rows = q_BMd.shape[1]
    missing = -num_rows % ROW_MULTIPLE
    if missing:
        q_BMd = torch.cat((q_BMd, q_BMd.new_zeros(q_BMd.shape[0], missing, config.head_dim)), dim=1)
        limits = torch.cat((limits, limits[:, -1:].expand(-1, missing)), dim=1)
    out = attend(q_BMd, keys, values, limits, window)[:, :num_rows]
    out = out.reshape(num_sequences, config.num_kv_heads, count, per_kv, config.head_dim).transpose(1, 2)
    return out.reshape(num_sequences * count, config.num_heads, config.head_dim)
