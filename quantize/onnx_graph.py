"""Quantized convolutions as integers: traced by the ONNX exporter, they become operators that runtimes run on codes.

Trained steps, zero points and codes go in as they are. The functions compute what the operators of their names compute.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantize.layers import QuantizedConvolution
from quantize.quantizers import UniformQuantizer

_TOP = 255  # the largest code of one byte
_WEIGHT_BITS = 6  # that codes of fewer bits are stretched to: with more, sums of two products may exceed 16 bits (see README)
_LARGEST_BIAS = 2**30


class _QuantizeLinear(torch.autograd.Function):
    """Codes uint8 of values, 0 ... top. Narrow grids are cut as integers: a cut before the rounding would prevent fusions."""

    @staticmethod
    def forward(ctx, values: Tensor, step: Tensor, zero_point: Tensor, top: int) -> Tensor:
        return (values / step).round_().add_(zero_point).clamp_(0, top).to(torch.uint8)

    @staticmethod
    def symbolic(g, values, step, zero_point, top: int):
        codes = g.op("QuantizeLinear", values, step, zero_point)
        if top == _TOP:
            return codes
        low, high = (g.op("Constant", value_t=torch.tensor(code, dtype=torch.uint8)) for code in (0, top))
        return g.op("Clip", codes, low, high)


class _DequantizeLinear(torch.autograd.Function):
    """Values of codes; step and zero point are scalars, or one per index of the first axis."""

    @staticmethod
    def forward(ctx, codes: Tensor, step: Tensor, zero_point: Tensor) -> Tensor:
        shape = (-1, *[1] * (codes.ndim - 1)) if step.ndim else ()
        return (codes.int() - zero_point.int().view(shape)) * step.view(shape)

    @staticmethod
    def symbolic(g, codes, step, zero_point):
        return g.op("DequantizeLinear", codes, step, zero_point, axis_i=0)


class _MatMulInteger(torch.autograd.Function):
    """Sums int32 of products of codes (..., n) and weights (n, out) less their zero points."""

    @staticmethod
    def forward(ctx, codes: Tensor, weight: Tensor, zero_point: Tensor, weight_zero: Tensor) -> Tensor:
        return ((codes.double() - zero_point) @ (weight.double() - weight_zero)).int()  # exact below 2^53

    @staticmethod
    def symbolic(g, codes, weight, zero_point, weight_zero):
        return g.op("MatMulInteger", codes, weight, zero_point, weight_zero)


class ActivationCodes(nn.Module):
    """What a `UniformQuantizer` of activations does, as codes of one byte."""

    def __init__(self, quantizer: UniformQuantizer):
        super().__init__()
        self.top = quantizer.top
        self.register_buffer("step", quantizer.step.detach())
        self.register_buffer("zero_point", quantizer.zero_point.to(torch.uint8))

    def forward(self, values: Tensor) -> Tensor:
        return _QuantizeLinear.apply(values, self.step, self.zero_point, self.top)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for."""
        return _DequantizeLinear.apply(codes, self.step, self.zero_point)


class IntegerConvolution(nn.Module):
    """What a `QuantizedConvolution` computes, from float to float, on codes in between.

    With an output quantizer it is a float convolution of dequantized codes, quantized at once, which a runtime fuses into
    one of integers. No runtime fuses what nothing quantizes, and ONNX's own convolution of integers is slow: without an
    output quantizer it is a product of matrices of integers, whose sums become float values.

    Args:
        layer: with ranges; it is left as it is.
    """

    def __init__(self, layer: QuantizedConvolution):
        super().__init__()
        self.rectified, self.stride, self.padding = layer.rectified, layer.stride, layer.padding
        self.input_codes = ActivationCodes(layer.input_quantizer)
        self.output_codes = None if layer.output_quantizer is None else ActivationCodes(layer.output_quantizer)
        self.kernel = layer.kernel_size
        bias, input_step = layer.bias.detach(), self.input_codes.step
        codes, step = byte_codes(layer, bias.abs() / (input_step * _LARGEST_BIAS))
        if self.output_codes is None:
            self.register_buffer("weight", codes.permute(2, 3, 1, 0).flatten(0, 2).to(torch.int8))  # as `_windows` has it
            self.register_buffer("weight_zero", torch.tensor(0, dtype=torch.int8))
            self.register_buffer("sum_step", input_step * step)
            self.register_buffer("bias", bias.clone())
        else:
            self.register_buffer("weight", codes.to(torch.int8))
            self.register_buffer("weight_step", step)
            self.register_buffer("weight_zero", torch.zeros_like(step, dtype=torch.int8))
            self.register_buffer("bias_step", input_step * step)
            self.register_buffer("bias_zero", torch.zeros_like(step, dtype=torch.int32))
            self.register_buffer("bias", (bias.double() / self.bias_step.double()).round().to(torch.int32))

    def forward(self, inputs: Tensor) -> Tensor:
        return self._summed(inputs) if self.output_codes is None else self._fused(inputs)

    def _fused(self, inputs: Tensor) -> Tensor:
        weight = _DequantizeLinear.apply(self.weight, self.weight_step, self.weight_zero)
        bias = _DequantizeLinear.apply(self.bias, self.bias_step, self.bias_zero)
        values = self.input_codes.values(self.input_codes(inputs))
        output = F.relu(F.conv2d(values, weight, bias, self.stride, self.padding))  # only rectified layers have output codes
        return self.output_codes.values(self.output_codes(output))

    def _summed(self, inputs: Tensor) -> Tensor:
        vertical, horizontal = self.padding
        padded = F.pad(inputs, (horizontal, horizontal, vertical, vertical)) if vertical or horizontal else inputs
        windows = _windows(self.input_codes(padded).permute(0, 2, 3, 1), self.kernel, self.stride)
        sums = _MatMulInteger.apply(windows, self.weight, self.input_codes.zero_point, self.weight_zero)
        output = (sums.float() * self.sum_step + self.bias).permute(0, 3, 1, 2)
        return F.relu(output) if self.rectified else output


def _windows(maps: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """What each weight of a convolution is multiplied with, (B, rows, columns, k k C) from maps (B, H, W, C)."""
    rows, columns = ((side - size) // step for side, size, step in zip(maps.shape[1:3], kernel, stride, strict=True))
    parts = [
        maps[:, i : i + rows * stride[0] + 1 : stride[0], j : j + columns * stride[1] + 1 : stride[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return torch.cat(parts, dim=-1)


@torch.no_grad()
def byte_codes(layer: QuantizedConvolution, least_step: Tensor) -> tuple[Tensor, Tensor]:
    """Integers -128 ... 127 in the shape of a layer's weights and a step per output channel, whose product the weights are.

    Codes of less than 6 bits are multiplied by a power of two and their step divided by it, which is exact: biases are
    integers in units of the steps, and those of few bits would be too coarse for them. A step that is below `least_step`
    (out,) becomes that; only that of weights which vanish beside their bias is.
    """
    quantizer = layer.weight_quantizer
    zero_point, stretch = quantizer.zero_point[:, None, None, None], 2 ** max(0, _WEIGHT_BITS - quantizer.bits)
    own_step = quantizer.step / stretch
    step = torch.maximum(own_step, least_step)
    codes = (layer.weight_codes() - zero_point) * stretch
    return (codes * (own_step / step)[:, None, None, None]).round().to(torch.int32), step


def use_integers(network: nn.Module) -> None:
    """Replace the quantized convolutions of a network by integer ones, in place; it can then no longer be trained."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QuantizedConvolution):
                setattr(parent, name, IntegerConvolution(child))


def means_as_convolutions(content: bytes) -> bytes:
    """A serialised ONNX model whose average pools are convolutions of integer weights 1 and step 1 / n, one per channel.

    What they give is the same, and between codes ONNX Runtime is ten times faster with convolutions than with its means.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(content))
    graph = model.graph
    shapes = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    for node in [node for node in graph.node if node.op_type == "AveragePool"]:
        kernel = next(attribute.ints for attribute in node.attribute if attribute.name == "kernel_shape")
        codes = np.ones((shapes[node.input[0]][1].dim_value, 1, *kernel), np.int8)
        weight = {"codes": codes, "step": np.float32(1 / codes[0].size), "zero": np.int8(0)}
        names = [f"{node.name}/{name}" for name in weight]
        graph.initializer.extend(map(numpy_helper.from_array, map(np.asarray, weight.values()), names))
        graph.node.insert(0, helper.make_node("DequantizeLinear", names, [f"{node.name}/weight"]))
        node.op_type = "Conv"
        node.input.append(f"{node.name}/weight")
        kept = [attribute for attribute in node.attribute if attribute.name in ("kernel_shape", "pads", "strides")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("group", len(codes))])
    _part_initializers(graph)
    return model.SerializeToString()


def _part_initializers(graph) -> None:
    """Give every user of a constant one of its own: ONNX Runtime 1.31 cannot rewrite shared ones for CPUs without VNNI."""
    initializers, used = {tensor.name: tensor for tensor in graph.initializer}, set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in initializers and name in used:
                own = graph.initializer.add()
                own.CopyFrom(initializers[name])
                own.name = node.input[index] = f"{name}/{node.output[0]}/{index}"
            used.add(name)
