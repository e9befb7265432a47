"""The codec's weights, read from a store and laid out as its parts take them. Called by `router.speech.vocoder`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from experts.ffn import ExpertWeights
from experts.huge_pages import joined
from experts.numerics import RowKernel, calibrate
from experts.store import ExpertStore
from router.media.tower_parts import LayerNorm, TowerReader
from router.speech.codec_parts import (
    ConvNeXt,
    Convolution,
    Ending,
    Matrix,
    Part,
    ResidualUnit,
    Snake,
    Stage,
    Upsampling,
)
from router.speech.codec_shape import DILATIONS, ENDING_ROWS, TAPS, CodecShape
from router.weights import Layer

COMPONENT = "code2wav"
NORM_EPSILON, SNAKE_EPSILON = 1e-6, 1e-9


def codec_dtype(dtype: torch.dtype, *, is_native: bool) -> torch.dtype:
    """In which products are computed. dtype: of the text's engine.

    A library has shapes, among the codec's many, at which it sums a few bfloat16 rows in another order than many.
    """
    return dtype if is_native else torch.float32


class CodecReader:
    """Reads tensors in float32; matrices go to the dtype of products at the end, so that what is folded into them is
    rounded once."""

    def __init__(self, read: TowerReader, kernel: RowKernel, dtype: torch.dtype) -> None:
        """read: in float32."""
        self.tensor = read.tensor
        self.kernel, self.dtype = kernel, dtype
        self.nbytes = 0
        """Of all matrices; what else there is takes little."""

    @classmethod
    def of(cls, store: ExpertStore, shape: CodecShape, kernel: RowKernel, dtype: torch.dtype) -> CodecReader:
        """kernel: of the decoder that answers text. Raises NotRowInvariant."""
        if kernel.product != "native":  # a library's is proved by shape
            dtype = codec_dtype(dtype, is_native=False)
            kernel = calibrate(shape.matrices(), dtype)
        return cls(TowerReader(store, COMPONENT, kernel, torch.float32), kernel, dtype)

    def rounded(self, weight: Tensor) -> Tensor:
        rounded = weight.to(self.dtype).contiguous()
        self.nbytes += rounded.nbytes
        return rounded

    def vectors(self, name: str, width: int, *parts: str) -> list[Tensor]:
        return [self.tensor(f"{name}.{part}", width) for part in parts]

    def linear(self, name: str, outputs: int, inputs: int) -> Matrix:
        return self.matrix(self.tensor(f"{name}.weight", outputs, inputs), name, outputs)

    def snake(self, name: str, channels: int, before: str | None = None) -> Snake:
        """From the logarithms that a checkpoint has. before: the convolution whose bias it adds."""
        alpha_C, beta_C = self.vectors(name, channels, "alpha", "beta")
        bias_C = torch.zeros_like(alpha_C) if before is None else self.tensor(f"{before}.conv.bias", channels)
        return Snake(bias_C, alpha_C.exp(), 1.0 / (beta_C.exp() + SNAKE_EPSILON), self.dtype, self.kernel)

    def convolution(
        self, name: str, outputs: int, inputs: int, dilation: int = 1, *, has_bias: bool = True
    ) -> Convolution:
        weight_OCK = self.tensor(f"{name}.conv.weight", outputs, inputs, TAPS)
        bias_O = self.tensor(f"{name}.conv.bias", outputs) if has_bias else None
        weight_OI = self.rounded(weight_OCK.transpose(1, 2).flatten(1))
        return Convolution(name, Matrix(weight_OI, bias_O, self.kernel), dilation)

    def upsampling(self, name: str, inputs: int, outputs: int, rate: int, *, overlaps: bool) -> Upsampling:
        """A row's tap `rate + i` falls on the place of the next row's tap i."""
        steps = 2 if overlaps else 1
        weight_IOK = self.tensor(f"{name}.conv.weight", inputs, outputs, steps * rate)
        taps_ISRO = weight_IOK.reshape(inputs, outputs, steps, rate).permute(0, 2, 3, 1)
        # The row before comes first, with its later taps.
        weight_OI = taps_ISRO.flip(1).permute(2, 3, 1, 0).reshape(rate * outputs, steps * inputs)
        bias_O = self.tensor(f"{name}.conv.bias", outputs).repeat(rate)
        return Upsampling(name, Matrix(self.rounded(weight_OI), bias_O, self.kernel), rate, overlaps)

    def ending(self, snake: str, convolution: str, channels: int) -> Ending:
        """Products in float32, since what they give is heard as it is."""
        weight_1CK = self.tensor(f"{convolution}.conv.weight", 1, channels, TAPS)
        weight_OI = weight_1CK.new_zeros(ENDING_ROWS, TAPS * channels)
        weight_OI[0] = weight_1CK[0].t().flatten()
        bias_O = self.tensor(f"{convolution}.conv.bias", 1).repeat(ENDING_ROWS)
        matrix = Matrix(weight_OI, bias_O, self.kernel)
        activation = replace(self.snake(snake, channels), dtype=torch.float32)
        return Ending(activation, Convolution(convolution, matrix))

    def matrix(self, weight_OI: Tensor, name: str, outputs: int) -> Matrix:
        return Matrix(self.rounded(weight_OI), self.tensor(f"{name}.bias", outputs), self.kernel)


def read_parts(shape: CodecShape, read: CodecReader) -> list[Part]:
    """From the decoder's rows to samples, in order. Raises WeightMismatch, or what reading the store raises."""
    width = shape.decoder.hidden_size
    parts: list[Part] = []
    for i, ratio in enumerate(shape.upsampling_ratios):
        parts.append(read.upsampling(f"upsample.{i}.0", width, width, ratio, overlaps=False))
        parts.append(_conv_next(f"upsample.{i}.1", width, read))
    parts.append(read.convolution("decoder.0", shape.channels(0), width))
    for i, rate in enumerate(shape.upsample_rates):
        parts.append(_stage(f"decoder.{i + 1}.block", shape.channels(i), shape.channels(i + 1), rate, read))
    last = len(shape.upsample_rates) + 1
    parts.append(read.ending(f"decoder.{last}", f"decoder.{last + 1}", shape.channels(last - 1)))
    return parts


def read_layers(shape: CodecShape, read: CodecReader) -> Iterator[Layer]:
    """Of the decoder that reads frames; a layer's scales are folded into the matrices before them."""
    config = shape.decoder
    width, inner = config.hidden_size, config.dense_width
    assert inner is not None
    sizes = {"q": config.q_width, "k": config.kv_width, "v": config.kv_width}
    for i in range(config.num_layers):
        name = f"pre_transformer.layers.{i}"
        norms = read.vectors(name, width, "input_layernorm.weight", "post_attention_layernorm.weight")
        scales = read.vectors(name, width, "self_attn_layer_scale.scale", "mlp_layer_scale.scale")
        qkv = [
            read.tensor(f"{name}.self_attn.{part}_proj.weight", size, width) for part, size in sizes.items()
        ]
        output_DO = read.tensor(f"{name}.self_attn.o_proj.weight", width, config.q_width)
        gate_up = [read.tensor(f"{name}.mlp.{part}_proj.weight", inner, width) for part in ("gate", "up")]
        down_DF = read.tensor(f"{name}.mlp.down_proj.weight", width, inner)
        yield Layer(
            input_norm_D=read.rounded(norms[0]),
            qkv_OD=joined([read.rounded(part) for part in qkv]),
            qkv_bias_O=None,
            q_norm=None,
            k_norm=None,
            output_DO=read.rounded(output_DO * scales[0][:, None]),
            output_bias_D=None,
            post_norm_D=read.rounded(norms[1]),
            moe=None,
            dense=ExpertWeights(
                joined([read.rounded(part) for part in gate_up]), read.rounded(down_DF * scales[1][:, None])
            ),
        )


def _conv_next(name: str, width: int, read: CodecReader) -> ConvNeXt:
    taps_C1K = read.tensor(f"{name}.dwconv.conv.weight", width, 1, TAPS)
    bias_C, gamma_C = read.vectors(name, width, "dwconv.conv.bias", "gamma")
    weight_C, shift_C = read.vectors(f"{name}.norm", width, "weight", "bias")
    return ConvNeXt(
        name,
        taps_C1K[:, 0].t().contiguous(),
        bias_C,
        LayerNorm(weight_C, shift_C, NORM_EPSILON),
        read.linear(f"{name}.pwconv1", 4 * width, width),
        read.linear(f"{name}.pwconv2", width, 4 * width),
        gamma_C,
    )


def _stage(name: str, inputs: int, outputs: int, rate: int, read: CodecReader) -> Stage:
    units = (
        _unit(f"{name}.{number}", outputs, dilation, read) for number, dilation in enumerate(DILATIONS, 2)
    )
    snake = read.snake(f"{name}.0", inputs)
    return Stage(snake, read.upsampling(f"{name}.1", inputs, outputs, rate, overlaps=True), tuple(units))


def _unit(name: str, channels: int, dilation: int, read: CodecReader) -> ResidualUnit:
    wide = read.convolution(f"{name}.conv1", channels, channels, dilation, has_bias=False)
    narrow_OC1 = read.tensor(f"{name}.conv2.conv.weight", channels, channels, 1)
    narrow = read.matrix(narrow_OC1[:, :, 0], f"{name}.conv2.conv", channels)
    first, second = (
        read.snake(f"{name}.act1", channels),
        read.snake(f"{name}.act2", channels, f"{name}.conv1"),
    )
    return ResidualUnit(first, wide, second, narrow)
