"""Writes a checkpoint as GGUF for llama.cpp, and lets llama.cpp quantise it: the peer of `bench_peers`.

The same values: matrices stay bfloat16 bit for bit, norms and gates become float32 as that format wants them. It has no
tokenizer; prompts are token ids. Quantised files are `pure`, so that the head has the same form as the layers
and bytes can be compared. Needs the extra `bench`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

GgufType = Literal["bf16", "q8_0", "q4_0"]
ARCHITECTURES: Mapping[str, str] = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
"""By `model_type`: families that both programs have, with rotary embeddings laid out alike."""
PROJECTIONS: Mapping[str, str] = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
LAYER_NAMES: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
TOP_NAMES: Mapping[str, str] = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file and where its values come from."""

    name: str
    sources: tuple[str, ...]
    """Published names; several are stacked, in this order."""
    shape: tuple[int, ...]
    is_wide: bool
    """Whether it is written as float32."""

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * (4 if self.is_wide else 2)


def gguf_tensors(names: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[GgufTensor]:
    """The file's tensors. names: of the checkpoint, with their shapes. Raises ValueError for one that has no place."""
    tensors, seen = [], set()
    has_head = not config.get("tie_word_embeddings", False)
    for published, name in TOP_NAMES.items():
        seen.add(published)
        if published in names and (has_head or published != "lm_head.weight"):
            shape = names[published]
            tensors.append(GgufTensor(name, (published,), shape, len(shape) == 1))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for part, name in LAYER_NAMES.items():
            if (published := f"{prefix}{part}.weight") in names:
                seen.add(published)
                shape = names[published]
                is_wide = len(shape) == 1 or part == "mlp.gate"
                tensors.append(GgufTensor(f"blk.{layer}.{name}.weight", (published,), shape, is_wide))
        for projection, name in PROJECTIONS.items():
            parts = tuple(
                f"{prefix}mlp.experts.{expert}.{projection}.weight" for expert in range(config["num_experts"])
            )
            seen.update(parts)
            shape = (len(parts), *names[parts[0]])
            tensors.append(GgufTensor(f"blk.{layer}.ffn_{name}_exps.weight", parts, shape, False))
    if unknown := sorted(set(names) - seen):
        raise ValueError(f"no place in a GGUF file for {unknown[:3]} and {len(unknown)} in all")
    return tensors


def write_gguf(checkpoint: Path, path: Path) -> None:
    """The checkpoint, bfloat16, one expert a tensor as published. Raises ValueError for another family."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise ValueError(f"{config['model_type']} is not among {sorted(ARCHITECTURES)}")
    with _Shards(checkpoint) as shards:
        tensors = gguf_tensors(shards.shapes, config)
        writer = gguf.GGUFWriter(path, architecture)
        _describe(writer, config)
        kinds = gguf.GGMLQuantizationType
        for tensor in tensors:
            kind = kinds.F32 if tensor.is_wide else kinds.BF16
            writer.add_tensor_info(tensor.name, tensor.shape, _dtype(tensor), tensor.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            values = torch.cat([shards.read(name).flatten() for name in tensor.sources])
            array = (
                values.float().numpy()
                if tensor.is_wide
                else values.bfloat16().contiguous().view(torch.int16).numpy()
            )
            writer.write_tensor_data(array)
        writer.close()


def quantise_gguf(source: Path, path: Path, kind: GgufType, num_threads: int) -> None:
    """By llama.cpp itself, every matrix in the one form. Raises RuntimeError."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {
        "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
        "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    }[kind]
    params.nthread, params.pure = num_threads, True
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), params)
    if code:
        raise RuntimeError(f"llama.cpp cannot quantise {source} as {kind}: {code}")


def gguf_bytes(path: Path) -> tuple[int, int]:
    """Weights that one token reads, and of these the head's."""
    import gguf

    reader = gguf.GGUFReader(path)
    fields = {name.split(".", 1)[-1]: field.contents() for name, field in reader.fields.items()}
    share = fields["expert_used_count"] / fields["expert_count"]
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    embeddings = sizes.pop("token_embd.weight")
    head = sizes.pop("output.weight", embeddings)
    layers = sum(round(size * share) if "_exps." in name else size for name, size in sizes.items())
    return layers + head, head


def _describe(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    expert_width = config.get("moe_intermediate_size") or config["intermediate_size"]
    writer.add_feed_forward_length(config.get("intermediate_size") or expert_width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(expert_width)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])


def _dtype(tensor: GgufTensor) -> Any:
    import numpy as np

    return np.dtype(np.float32 if tensor.is_wide else np.int16)


class _Shards:
    """A checkpoint's tensors by name, read when they are wanted."""

    def __init__(self, root: Path) -> None:
        self._files: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(root.glob("*.safetensors"))
        ]
        self._file_of = {name: file for file in self._files for name in _names(file)}
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *error: object) -> None:
        self._file_of.clear()
        self._files.clear()

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


def _names(file: Any) -> list[str]:
    return list(file.keys())
