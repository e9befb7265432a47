"""What the vision and the audio tower are made of: weights as they are read, linear layers, norms, attention.

Every product goes through the row kernel, sums within attention lie with one thread each, and activations are written
so that vector tails do not matter: like a decoder's rows, a tower's depend on nothing but its input
(docs/exactness.md). One image or sound at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.numerics import RowKernel
from experts.store import ExpertStore
from router.errors import ConfigUnsupported, WeightMismatch

ROWS_AT_ONCE = 1024
"""Of the wide inner layer, in float32: bounds its memory."""


@dataclass(frozen=True)
class Linear:
    weight_OI: Tensor
    bias_O: Tensor | None
    kernel: RowKernel

    def __call__(self, x_RI: Tensor) -> Tensor:
        y_RO = self.kernel.linear(x_RI, self.weight_OI)
        return y_RO if self.bias_O is None else y_RO + self.bias_O


@dataclass(frozen=True)
class LayerNorm:
    weight_D: Tensor
    bias_D: Tensor
    epsilon: float

    def __call__(self, x_RD: Tensor) -> Tensor:
        return F.layer_norm(x_RD, self.weight_D.shape, self.weight_D, self.bias_D, self.epsilon)


@dataclass(frozen=True)
class FeedForward:
    """Two linear layers and what lies between them."""

    inner: Linear
    outer: Linear
    activation: Callable[[Tensor], Tensor]

    def __call__(self, x_RD: Tensor) -> Tensor:
        """Some rows at a time, which changes no bit."""
        return torch.cat(
            [self.outer(self.activation(self.inner(part))) for part in torch.split(x_RD, ROWS_AT_ONCE)]
        )


class TowerReader:
    """Reads a tower's tensors from its component, checks shapes, converts the dtype."""

    def __init__(self, store: ExpertStore, component: str, kernel: RowKernel, dtype: torch.dtype) -> None:
        self._store, self._component = store, component
        self._kernel, self._dtype = kernel, dtype
        self.nbytes = 0
        """Of all that was read."""

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Raises WeightMismatch, or what reading the store raises."""
        tensor = self._store.read_tensor(self._component, name)
        if tuple(tensor.shape) != shape:
            raise WeightMismatch(f"{self._component} {name}", tuple(tensor.shape), shape)
        tensor = tensor.to(self._dtype).contiguous()
        self.nbytes += tensor.nbytes
        return tensor

    def linear(self, name: str, outputs: int, inputs: int, *, has_bias: bool = True) -> Linear:
        return self.convolution(name, (outputs, inputs), has_bias=has_bias)

    def convolution(self, name: str, shape: Sequence[int], *, has_bias: bool = True) -> Linear:
        """As a matrix whose inputs are what a place of its kernel looks at."""
        weight_OI = self.tensor(f"{name}.weight", *shape).flatten(1)
        bias_O = self.tensor(f"{name}.bias", shape[0]) if has_bias else None
        return Linear(weight_OI, bias_O, self._kernel)

    def norm(self, name: str, width: int, epsilon: float) -> LayerNorm:
        weight_D, bias_D = (self.tensor(f"{name}.{part}", width) for part in ("weight", "bias"))
        return LayerNorm(weight_D, bias_D, epsilon)


def attend(q_HRd: Tensor, k_HRd: Tensor, v_HRd: Tensor) -> Tensor:
    """Every row sees every other. Returns (R, H x d)."""
    found_HRd = F.scaled_dot_product_attention(q_HRd[None], k_HRd[None], v_HRd[None])[0]
    return found_HRd.transpose(0, 1).flatten(1)


def gelu(x: Tensor) -> Tensor:
    """By the error function, in float32."""
    wide = x.float()
    return torch.erf(wide * math.sqrt(0.5)).add_(1.0).mul_(wide).mul_(0.5).to(x.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """By its approximation with a hyperbolic tangent, in float32: x * (1 + tanh(u)) / 2 is x / (1 + exp(-2u))."""
    wide = x.float()
    inner = wide.pow(3).mul_(0.044715).add_(wide).mul_(-2.0 * math.sqrt(2.0 / math.pi))
    return (wide / inner.exp_().add_(1.0)).to(x.dtype)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "gelu_pytorch_tanh": gelu_tanh}


def activation(name: object) -> Callable[[Tensor], Tensor]:
    """Raises ConfigUnsupported."""
    found = ACTIVATIONS.get(str(name))
    if found is None:
        raise ConfigUnsupported("activation", f"{name!r} is none of {', '.join(ACTIVATIONS)}")
    return found
