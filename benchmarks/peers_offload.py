"""`transformers` with Accelerate's disk offload, as a contender: experts on disk, everything else in memory.

Accelerate brings the weights of a module in when it is called and drops them afterwards. The checkpoint is a
stacked one: `transformers` would write a copy in this form anyway, and reads this one in place. Needs the extra
`bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experts.cores import num_cores


def offloaded_contender(
    checkpoint: Path,
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], int, int]:
    """A step of one token, the head, vocabulary and width."""
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(num_cores())
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        device_map=_device_map(checkpoint),
        experts_implementation="eager",
        offload_folder=checkpoint / "offload",
    )
    cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def step(ids_T: Tensor) -> Tensor:
        output = model.model(input_ids=ids_T.unsqueeze(0), past_key_values=cache, use_cache=True)
        hidden_TD: Tensor = output.last_hidden_state[0]
        return hidden_TD

    @torch.inference_mode()
    def head(hidden_TD: Tensor) -> Tensor:
        logits_TV: Tensor = model.lm_head(hidden_TD).float()
        return logits_TV

    return step, head, model.config.vocab_size, model.config.hidden_size


def _device_map(checkpoint: Path) -> dict[str, str]:
    """Only the experts are on disk."""
    from transformers import AutoConfig

    num_layers = AutoConfig.from_pretrained(checkpoint).num_hidden_layers
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        parts = ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate")
        places |= {f"{prefix}.{part}": "cpu" for part in parts}
        places[f"{prefix}.mlp.experts"] = "disk"
    return places
