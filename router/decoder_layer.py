"""What one decoder layer computes for the rows of a step: attention, then dense layer or mixture of experts.

Every product goes through the row kernel or one that was proven like it, so a row's bits do not depend on the batch.
Called by `router.backbone` for the layers of a model, and by `router.single_layer` for one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experts.devices import upload
from experts.expert_table import ExpertTable
from experts.ffn import compute_segments
from experts.numerics import RowKernel
from experts.packed_matrix import linear
from router.asked_half import AskedHalf
from router.attention import ROW_MULTIPLE, attend
from router.device_attention import QUERY_ROWS, attend_in_tiles
from router.device_norm import norm_on_device
from router.kv_cache import KvPool
from router.model_config import ModelConfig
from router.moe_block import Mixture, MoeBlock
from router.native_attention import NO_NORMS, HeadNorms, Places, attend_in_cache, norm_rows
from router.native_dispatch import NativeDispatch
from router.native_step import NativeStep
from router.rope import RotaryEmbedding, rotate
from router.step_batch import AttentionGroup, CacheSlots, Half, StepBatch
from router.step_routing import EVERYTHING, View
from router.weights import Layer

Begun = ExpertTable | AskedHalf | Mixture
"""A layer's experts: all of them in this process for good; some of them elsewhere; or with somebody who looks on."""
MANY_ROWS = 128
"""Beside the work of so many, waking a thread takes no time to speak of, even where matrices are small."""


@dataclass
class StepInputs:
    """What all layers of a step share, and what of the current one is on its way."""

    batch: StepBatch
    cos: Tensor
    sin: Tensor
    cache: CacheSlots | None
    """For attention by PyTorch."""
    places: Places | None
    """For our own."""
    native: NativeStep | None = None
    """For layers that our own calls compute, two for one or one for many."""
    shown: View = EVERYTHING
    dispatching: NativeDispatch | None = None
    """The way to the experts of layers that nobody looks at, where some are elsewhere."""
    begun: Begun | None = None
    """With what the experts of the current layer were begun that pause: meanwhile experts may come and go."""
    expert_s: float = 0.0
    """What an expert took lately, where they are computed one after another; 0 where none was."""

    def is_plain(self, layer: int) -> bool:
        """Whether a layer's rows go to their own experts, and nobody needs to be shown how."""
        return self.shown.layers is not None and layer not in self.shown.layers


class LayerClock(Protocol):
    """Is told of every half of a layer whose experts stay in this process and that was computed by our own calls, with
    the time that its phases took."""

    def attended(self, step: NativeStep) -> None:
        """See `NativeStep.attention_s`."""

    def mixed(self, layer: int, step: NativeStep) -> None:
        """See `NativeStep.experts_s`."""


class LayerArithmetic:
    """One model's way from a layer's input rows to its output rows. Holds no weights."""

    def __init__(self, config: ModelConfig, kernel: RowKernel, dtype: torch.dtype) -> None:
        self.config, self.kernel, self.dtype = config, kernel, dtype
        self._is_native = kernel.product == "native"
        self._rope = RotaryEmbedding(config)
        self.clock: LayerClock | None = None
        self.prompt_threads = 0
        """Threads for many rows, where more than the process usually computes with."""

    def threads_for(self, num_rows: int) -> int:
        """Changes speed only."""
        usual = torch.get_num_threads()
        is_free = self._is_native  # a library's products are proven with the usual number
        return max(usual, self.prompt_threads) if is_free and num_rows >= MANY_ROWS else usual

    def is_divisible(self, layer: Layer, half: Half) -> bool:
        """Whether it can pause in the middle. A device's work has only been asked for when a call returns: no pause."""
        if half == "attention":
            return layer.native is not None
        return layer.native is not None or (layer.moe is not None and self.kernel.is_on_cpu)

    def prepare(self, batch: StepBatch) -> StepInputs:
        cos, sin = self._rope.tables(batch.positions_3T, batch.lengths_T)
        shown = batch.routing.shown()
        if self._is_native:
            places = Places.of(batch.spans)
            is_timed = self.clock is not None
            native = NativeStep(
                self.kernel.level, self.config, self.dtype, (cos, sin), places, is_timed=is_timed
            )
            return StepInputs(batch, cos, sin, None, places, native, shown)
        device = self.kernel.device
        cache = CacheSlots(batch.spans, device)
        return StepInputs(batch, upload(cos, device), upload(sin, device), cache, None, shown=shown)

    def attention(
        self,
        index: int,
        layer: Layer,
        hidden_PD: Tensor,
        step: StepInputs,
        pool: KvPool,
        until_ns: int | None = None,
    ) -> Tensor | None:
        """The first half of a layer, residual included: (P, D) -> (P, D).

        until_ns: where the half can pause, None is returned once the monotonic clock has passed it; the next call with
        the same arguments goes on.
        """
        if layer.native is not None and step.native is not None:
            attended_PD = step.native.attention(layer.native, index, hidden_PD, pool, until_ns)
            if self.clock is not None and attended_PD is not None:
                self.clock.attended(step.native)
            return attended_PD
        normed_PD = self.norm(hidden_PD, layer.input_norm_D)
        return hidden_PD + self._output(self._attend(index, layer, normed_PD, step, pool), layer)

    def feed_forward(
        self, layer: Layer, hidden_PD: Tensor, step: StepInputs, until_ns: int | None = None
    ) -> Tensor | None:
        """The second half, residual included: (P, D) -> (P, D). until_ns: as of `attention`. Raises ExpertError."""
        if layer.moe is None:
            assert layer.dense is not None
            if layer.native is not None and step.native is not None:
                return step.native.dense(layer.native, hidden_PD, until_ns)
            normed_PD = self.norm(hidden_PD, layer.post_norm_D)
            segments = [(0, normed_PD.shape[0])]
            return hidden_PD + compute_segments(normed_PD, segments, [layer.dense], self.kernel)
        begun = step.begun or self._begin_experts(layer, layer.moe, hidden_PD, step)
        if isinstance(begun, ExpertTable):
            mixed_PD = self._mix_natively(layer, layer.moe, begun, hidden_PD, step, until_ns)
        else:
            mixed_PD = begun.advance(until_ns)
            step.expert_s = begun.expert_s
            if mixed_PD is None:
                pass
            elif isinstance(begun, Mixture):
                mixed_PD = hidden_PD + self.pad(mixed_PD.to(self.dtype))
            elif step.shown.has_choices:
                step.batch.routing.watch_choices(layer.moe.layer, begun.routing())
        step.begun = begun if mixed_PD is None else None
        return mixed_PD

    def _begin_experts(self, layer: Layer, moe: MoeBlock, hidden_PD: Tensor, step: StepInputs) -> Begun:
        batch = step.batch
        if step.native is not None and layer.native is not None and step.is_plain(moe.layer):
            table = moe.table()
            if table is not None:
                return table
            if step.dispatching is None:
                step.dispatching = NativeDispatch(step.native)
            rest = hidden_PD, batch.trace, step.expert_s
            return AskedHalf(step.dispatching, layer.native, moe, *rest)
        normed_PD = self.norm(hidden_PD, layer.post_norm_D)
        return Mixture(moe, normed_PD, batch.num_tokens, batch.routing, batch.trace, step.expert_s)

    def _mix_natively(
        self,
        layer: Layer,
        moe: MoeBlock,
        table: ExpertTable,
        hidden_PD: Tensor,
        step: StepInputs,
        until_ns: int | None,
    ) -> Tensor | None:
        assert step.native is not None and layer.native is not None
        mixed_PD = step.native.experts(layer.native, table, hidden_PD, until_ns)
        if mixed_PD is None:
            return None
        moe.note_use(table, step.native.used, step.batch.num_tokens)
        if step.shown.has_choices:
            step.batch.routing.watch_choices(moe.layer, step.native.routing())
        if self.clock is not None:
            self.clock.mixed(moe.layer, step.native)
        return mixed_PD

    def pad(self, rows_TD: Tensor) -> Tensor:
        """Repeat the last row up to the row kernel's multiple, so that no product has to."""
        missing = self.kernel.padded(rows_TD.shape[0]) - rows_TD.shape[0]
        return torch.cat((rows_TD, rows_TD[-1:].expand(missing, -1))) if missing else rows_TD

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm over the last dimension, in float32; the weight is applied in the model's dtype."""
        if self._is_native and x.dtype == self.dtype:
            rows = x.reshape(-1, x.shape[-1])
            return norm_rows(self.kernel.level, rows, weight, self.config.rms_norm_eps).view(x.shape)
        if self.kernel.norm:
            return norm_on_device(self.kernel.norm, x, weight, self.config.rms_norm_eps)
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return (wide * scale).to(self.dtype) * weight

    def _attend(
        self,
        index: int,
        layer: Layer,
        normed_PD: Tensor,
        step: StepInputs,
        pool: KvPool,
    ) -> Tensor:
        """Returns (T, heads * head_dim) in the model's dtype."""
        if step.places is not None:
            return self._attend_natively(index, layer, normed_PD, step, step.places, pool)
        config, cache = self.config, step.cache
        assert cache is not None
        num_tokens = len(cache.blocks_T)
        q, k, v = self._queries_keys_values(layer, normed_PD, num_tokens)
        q = rotate(q.float(), step.cos, step.sin).mul_(config.head_dim**-0.5)
        k = rotate(k.float(), step.cos, step.sin).to(self.dtype)
        pool.write(index, cache.blocks_T, cache.offsets_T, k, v)
        attended = torch.empty_like(q)
        for group in cache.groups:
            keys, values = pool.gather(index, group.tables_SN)
            attended[group.rows] = _attend_group(
                q[group.rows], keys, values, group, config, config.window(index), self.kernel.is_on_cpu
            )
        return attended.to(self.dtype).flatten(1)

    def _queries_keys_values(
        self, layer: Layer, normed_PD: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the first `num_tokens` rows, before rotation: (T, heads, head_dim) each, in the model's dtype."""
        config = self.config
        qkv = self._projected(layer, normed_PD, num_tokens).view(num_tokens, -1, config.head_dim)
        q, k, v = torch.split(qkv, [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            if config.qk_norm == "whole_width":
                q = self.norm(q.flatten(1), layer.q_norm).view(q.shape)
                k = self.norm(k.flatten(1), layer.k_norm).view(k.shape)
            else:
                q, k = self.norm(q, layer.q_norm), self.norm(k, layer.k_norm)
        if config.clip_qkv is not None:
            q, k, v = (part.clamp(-config.clip_qkv, config.clip_qkv) for part in (q, k, v))
        return q, k, v

    def _projected(self, layer: Layer, normed_PD: Tensor, num_tokens: int) -> Tensor:
        qkv_TO = linear(self.kernel, normed_PD, layer.qkv_OD)[:num_tokens]
        return qkv_TO if layer.qkv_bias_O is None else qkv_TO + layer.qkv_bias_O

    def _attend_natively(
        self, index: int, layer: Layer, normed_PD: Tensor, step: StepInputs, places: Places, pool: KvPool
    ) -> Tensor:
        """As `_attend`. A norm over the whole width and a bound are applied before."""
        config = self.config
        if config.qk_norm == "whole_width" or config.clip_qkv is not None:
            parts = self._queries_keys_values(layer, normed_PD, places.num_tokens)
            qkv_TO, norms = torch.cat([part.flatten(1) for part in parts], dim=1), NO_NORMS
        else:
            qkv_TO = self._projected(layer, normed_PD, places.num_tokens)
            norms = HeadNorms(layer.q_norm, layer.k_norm)
        rotation = step.cos, step.sin
        return attend_in_cache(self.kernel.level, config, qkv_TO, norms, rotation, pool, index, places)

    def _output(self, attended_TO: Tensor, layer: Layer) -> Tensor:
        """The attention's output projection of padded rows, (P, D)."""
        output_PD = linear(self.kernel, self.pad(attended_TO), layer.output_DO)
        return output_PD if layer.output_bias_D is None else output_PD + layer.output_bias_D


def _attend_group(
    q_RHd: Tensor,
    keys: Tensor,
    values: Tensor,
    group: AttentionGroup,
    config: ModelConfig,
    window: int | None,
    is_on_cpu: bool,
) -> Tensor:
    """Bring query rows into (sequence x kv head, rows) form, attend, and back. Returns (R, heads, head_dim)."""
    num_sequences, count = group.limits_SC.shape
    per_kv = config.num_heads // config.num_kv_heads
    q = q_RHd.view(num_sequences, count, config.num_kv_heads, per_kv, config.head_dim)
    q_BMd = q.transpose(1, 2).reshape(num_sequences * config.num_kv_heads, count * per_kv, config.head_dim)
    limits = group.limits_SC.repeat_interleave(per_kv, dim=1).repeat_interleave(config.num_kv_heads, dim=0)
    num_rows = q_BMd.shape[1]
    missing = -num_rows % (ROW_MULTIPLE if is_on_cpu else QUERY_ROWS)
    if missing:
        q_BMd = torch.cat((q_BMd, q_BMd.new_zeros(q_BMd.shape[0], missing, config.head_dim)), dim=1)
        limits = torch.cat((limits, limits[:, -1:].expand(-1, missing)), dim=1)
    compute = attend if is_on_cpu else attend_in_tiles
    out = compute(q_BMd, keys, values, limits, window)[:, :num_rows]
    out = out.reshape(num_sequences, config.num_kv_heads, count, per_kv, config.head_dim).transpose(1, 2)
    return out.reshape(num_sequences * count, config.num_heads, config.head_dim)
