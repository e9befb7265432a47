"""The backbone's weights as they lie in memory, read from an expert store and checked. Used by `router.backbone`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.directory import ExpertDirectory
from experts.ffn import ExpertWeights
from experts.numerics import RowKernel
from experts.store import ExpertStore
from router.errors import WeightMismatch
from router.model_config import ModelConfig
from router.moe_block import MoeBlock


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; `moe` or `dense` is set."""

    input_norm_D: Tensor
    qkv_OD: Tensor
    q_norm_d: Tensor
    k_norm_d: Tensor
    output_DO: Tensor
    post_norm_D: Tensor
    moe: MoeBlock | None
    dense: ExpertWeights | None


class TensorLoader:
    """Reads backbone tensors of one component, checks shapes, converts the dtype."""

    def __init__(self, store: ExpertStore, component: str, dtype: torch.dtype) -> None:
        self._store, self._component, self._dtype = store, component, dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        tensor = self._store.read_tensor(self._component, name)
        if tuple(tensor.shape) != shape:
            raise WeightMismatch(name, tuple(tensor.shape), shape)
        return tensor.to(self._dtype).contiguous()


def load_layer(
    load: TensorLoader,
    index: int,
    component: str,
    config: ModelConfig,
    kernel: RowKernel,
    directory: ExpertDirectory,
) -> Layer:
    prefix = f"layers.{index}."
    width, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
    q_width = config.num_heads * config.head_dim
    attention = prefix + "self_attn."
    moe = dense = None
    if index in config.moe_layers:
        gate = load(prefix + "mlp.gate.weight", config.num_experts, width)
        moe = MoeBlock(component, index, gate, config, kernel, directory)
    else:
        gate = load(prefix + "mlp.gate_proj.weight", config.dense_width, width)
        up = load(prefix + "mlp.up_proj.weight", config.dense_width, width)
        dense = ExpertWeights(
            torch.cat((gate, up)), load(prefix + "mlp.down_proj.weight", width, config.dense_width)
        )
    return Layer(
        input_norm_D=load(prefix + "input_layernorm.weight", width),
        qkv_OD=torch.cat(
            (
                load(attention + "q_proj.weight", q_width, width),
                load(attention + "k_proj.weight", kv_width, width),
                load(attention + "v_proj.weight", kv_width, width),
            )
        ),
        q_norm_d=load(attention + "q_norm.weight", config.head_dim),
        k_norm_d=load(attention + "k_norm.weight", config.head_dim),
        output_DO=load(attention + "o_proj.weight", width, q_width),
        post_norm_D=load(prefix + "post_attention_layernorm.weight", width),
        moe=moe,
        dense=dense,
    )
