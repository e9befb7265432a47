"""RMSNorm on a device, in one of two ways that give a row the same bits beside any other rows.

`fused` is PyTorch's own kernel, where the self-test at start finds that it does; `halves` adds element by element and
does by construction. Called by `router.decoder_layer`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from experts.numerics import Norm
from router.device_attention import sum_by_halves


def norm_on_device(kind: Norm, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension, in float32. Returns x's dtype, which is the weight's."""
    if kind == "fused":
        return rms_norm(x.contiguous(), (x.shape[-1],), weight, eps)
    wide = x.float()
    mean = sum_by_halves(wide * wide).div_(x.shape[-1]).unsqueeze(-1)
    return (wide * torch.rsqrt(mean + eps)).to(x.dtype) * weight
