"""The backbone's weights as they lie in memory, read from an expert store and checked. Used by `router.backbone`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experts.directory import ExpertDirectory
from experts.ffn import ExpertWeights
from experts.huge_pages import joined
from experts.numerics import RowKernel
from experts.packed_matrix import CanonicalMatrix, PackedMatrix, Weight
from experts.store import ExpertStore
from extraction.quantised_parts import HEAD
from router.errors import WeightMismatch
from router.linears import FLOAT, LinearForm, LinearForms
from router.model_config import ModelConfig
from router.moe_block import MoeBlock
from router.native_layer import LayerMatrices, NativeLayer, SharedMatrices
from router.shared_expert import SharedExpert, padded_gate


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; `moe` or `dense` is set. What a family does not have is None."""

    input_norm_D: Tensor
    qkv_OD: Weight
    qkv_bias_O: Tensor | None
    q_norm: Tensor | None
    """(head_dim,) or, over the whole width, (heads * head_dim,)."""
    k_norm: Tensor | None
    output_DO: Weight
    output_bias_D: Tensor | None
    post_norm_D: Tensor
    moe: MoeBlock | None
    dense: ExpertWeights | None
    native: NativeLayer | None = None
    """The same, where its halves are calls of our own."""

    @property
    def nbytes(self) -> int:
        """Resident bytes, without the experts."""
        tensors = (
            *(self.input_norm_D, self.qkv_OD, self.qkv_bias_O, self.q_norm, self.k_norm),
            *(self.output_DO, self.output_bias_D, self.post_norm_D),
        )
        gate = self.moe.nbytes if self.moe is not None else 0
        dense = self.dense.nbytes if self.dense is not None else 0
        return sum(tensor.nbytes for tensor in tensors if tensor is not None) + gate + dense


class TensorLoader:
    """Reads backbone tensors of one component, checks shapes, converts the dtype or packs, and brings them to the
    kernel's device."""

    def __init__(
        self,
        store: ExpertStore,
        component: str,
        dtype: torch.dtype,
        kernel: RowKernel,
        forms: LinearForms = FLOAT,
    ) -> None:
        """kernel: of products with quantised matrices, which lie in `forms`."""
        self._store, self._component, self._dtype = store, component, dtype
        self._kernel, self._forms = kernel, forms

    def __call__(self, name: str, *shape: int) -> Tensor:
        tensor = self._store.read_tensor(self._component, name)
        if tuple(tensor.shape) != shape:
            raise WeightMismatch(name, tuple(tensor.shape), shape)
        return tensor.to(self._kernel.device, self._dtype).contiguous()

    def linear(self, rows: Mapping[str, int], inputs: int) -> Weight:
        """Matrices of a layer one below the other, as one; rows: of each. Names are those without `.weight`."""
        names = {f"{name}.weight": count for name, count in rows.items()}
        if self._forms.backbone is not None:
            return self._packed(self._forms.backbone, names, inputs)
        matrices = [self(name, count, inputs) for name, count in names.items()]
        return joined(matrices)

    def head(self, config: ModelConfig, embeddings_VD: Tensor) -> Weight:
        """The embedding itself where the head is tied to it and not quantised."""
        if config.has_tied_head and self._forms.head is None:
            return embeddings_VD
        return self.own_head(HEAD, config.vocab_size, config.hidden_size)

    def own_head(self, name: str, outputs: int, inputs: int) -> Weight:
        """One that is no embedding."""
        if self._forms.head is not None:
            return self._packed(self._forms.head, {name: outputs}, inputs)
        return self(name, outputs, inputs)

    def _packed(self, form: LinearForm, rows: Mapping[str, int], inputs: int) -> PackedMatrix:
        matrices = []
        for name, count in rows.items():
            codes, scales, shape = self._store.read_quantised(self._component, name, form.quantization)
            if shape != (count, inputs):
                raise WeightMismatch(name, shape, (count, inputs))
            matrix = CanonicalMatrix(codes, scales, inputs, form.quantization)
            matrices.append(matrix.on(self._kernel.device))
        return form.packed(matrices, self._kernel)


def load_layer(
    load: TensorLoader,
    index: int,
    component: str,
    config: ModelConfig,
    kernel: RowKernel,
    directory: ExpertDirectory,
) -> Layer:
    prefix = f"layers.{index}."
    width, q_width, kv_width = config.hidden_size, config.q_width, config.kv_width
    attention = prefix + "self_attn."
    moe = dense = None
    if index in config.moe_layers:
        gate = load(prefix + "mlp.gate.weight", config.num_experts, width)
        shared = _load_shared(load, prefix + "mlp.", config, kernel)
        moe = MoeBlock(component, index, gate, config, kernel, directory, shared)
    else:
        assert config.dense_width is not None
        dense = _load_gated(load, prefix + "mlp.", config.dense_width, width)
    is_per_head = config.qk_norm == "per_head"
    norms = {
        "q": config.head_dim if is_per_head else q_width,
        "k": config.head_dim if is_per_head else kv_width,
    }
    q_norm, k_norm = (
        load(f"{attention}{name}_norm.weight", size) if config.qk_norm != "none" else None
        for name, size in norms.items()
    )
    outputs = {"q": q_width, "k": kv_width, "v": kv_width}
    layer = Layer(
        input_norm_D=load(prefix + "input_layernorm.weight", width),
        qkv_OD=load.linear({f"{attention}{name}_proj": size for name, size in outputs.items()}, width),
        qkv_bias_O=torch.cat([load(f"{attention}{name}_proj.bias", size) for name, size in outputs.items()])
        if config.has_qkv_bias
        else None,
        q_norm=q_norm,
        k_norm=k_norm,
        output_DO=load.linear({attention + "o_proj": width}, q_width),
        output_bias_D=load(attention + "o_proj.bias", width) if config.has_output_bias else None,
        post_norm_D=load(prefix + "post_attention_layernorm.weight", width),
        moe=moe,
        dense=dense,
    )
    return replace(layer, native=as_native(layer, config, kernel))


def as_native(layer: Layer, config: ModelConfig, kernel: RowKernel) -> NativeLayer | None:
    """For our own products; None where others compute. Raises ValueError where shapes do not fit."""
    if kernel.product != "native":
        return None
    moe = layer.moe
    shared = None if moe is None else moe.shared
    matrices = LayerMatrices(
        layer.input_norm_D,
        layer.q_norm,
        layer.k_norm,
        layer.post_norm_D,
        layer.qkv_bias_O,
        layer.output_bias_D,
        layer.qkv_OD,
        layer.output_DO,
        None if moe is None else moe.gate_ED,
        None if shared is None else SharedMatrices(shared.gate_GD[:1], shared.weights),
        layer.dense,
    )
    return NativeLayer.of(matrices, config, kernel, layer.post_norm_D.dtype)


def _load_gated(load: TensorLoader, prefix: str, inner: int, width: int) -> ExpertWeights:
    gate_up_FD = load.linear({f"{prefix}{name}_proj": inner for name in ("gate", "up")}, width)
    return ExpertWeights(gate_up_FD, load.linear({prefix + "down_proj": width}, inner))


def _load_shared(
    load: TensorLoader, prefix: str, config: ModelConfig, kernel: RowKernel
) -> SharedExpert | None:
    if config.shared_width is None:
        return None
    gate_1D = load(prefix + "shared_expert_gate.weight", 1, config.hidden_size)
    weights = _load_gated(load, prefix + "shared_expert.", config.shared_width, config.hidden_size)
    return SharedExpert(weights, padded_gate(gate_1D), kernel)
