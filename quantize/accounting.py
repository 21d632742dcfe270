"""What a quantized detector weighs: effective parameters, as published tables count them, and real bytes.

RAAD's Table 4 prints effective parameters, the sum of parameters x bits / 32, cut (not rounded) to two decimals. Its numbers
count a bias with the bits of its layer: with 32-bit biases LSQ's 4-bit row would read 1.01, not 1.00. Its LSQ rows are all
three networks, its OMPQ and RAAD rows teacher and student alone; both sums are given here, since the autoencoder is no less
part of the detector for staying float. In bytes a bias is what it is: 32 bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from models.efficientad import EfficientAD

FLOAT_BITS = 32
_CODE_BITS = 8  # of the widest integer code, and of every code in an integer graph
_SCALE_BYTES = _BIAS_BYTES = 4  # float32; int32 or float32
_ZERO_POINT_BYTES = 1


@dataclass(frozen=True)
class LayerSize:
    """One convolution: its weights, output channels, biases, bits and quantizers of activations, counted."""

    weights: int
    channels: int
    biases: int
    bits: int = FLOAT_BITS
    activation_quantizers: int = 0

    @property
    def parameters(self) -> int:
        return self.weights + self.biases

    @property
    def float_bytes(self) -> int:
        return self.parameters * FLOAT_BITS // 8

    def integer_bytes(self, code_bits: int) -> int:
        """Codes of `code_bits` bits; scale and zero point per output channel and per quantizer of activations; biases."""
        codes = (self.weights * code_bits + 7) // 8  # a layer starts on a whole byte
        grids = self.channels + self.activation_quantizers
        return codes + grids * (_SCALE_BYTES + _ZERO_POINT_BYTES) + self.biases * _BIAS_BYTES


@dataclass(frozen=True)
class DetectorSize:
    """Effective parameters (in parameters of 32 bits) and bytes of teacher, student and autoencoder.

    Bytes are those of the numbers in a file, without its header: float32, one byte per code, codes packed to their bits.
    """

    parameters: int
    effective_teacher_student: float
    effective_all: float
    float32_bytes: int
    int8_bytes: int
    packed_bytes: int


def layer_sizes(network: nn.Module) -> list[LayerSize]:
    """Sizes of all convolutions of a network in its order; one without attribute `bits` is float."""
    return [_layer_size(module) for module in network.modules() if isinstance(module, nn.Conv2d)]


def _layer_size(convolution: nn.Conv2d) -> LayerSize:
    quantizers = (getattr(convolution, name, None) for name in ("input_quantizer", "output_quantizer"))
    return LayerSize(
        weights=convolution.weight.numel(),
        channels=convolution.out_channels,
        biases=0 if convolution.bias is None else convolution.bias.numel(),
        bits=getattr(convolution, "bits", FLOAT_BITS),
        activation_quantizers=sum(quantizer is not None for quantizer in quantizers),
    )


def at_bits(sizes: Sequence[LayerSize], bits: Sequence[int]) -> list[LayerSize]:
    """The same layers at other bits, to count an allocation before anything is quantized.

    Raises:
        ValueError: not one number of bits per layer.
    """
    return [replace(size, bits=layer_bits) for size, layer_bits in zip(sizes, bits, strict=True)]


def effective_parameters(sizes: Sequence[LayerSize]) -> float:
    """Sum of parameters x bits / 32, biases with the bits of their layer (RAAD, Table 4)."""
    return sum(size.parameters * size.bits for size in sizes) / FLOAT_BITS


def file_bytes(sizes: Sequence[LayerSize], packed: bool) -> int:
    """Bytes of the layers as integers, float layers as float32; `packed` stores codes in their bits, else in one byte each.

    Raises:
        ValueError: bits that are neither float's nor those of a code of one byte.
    """
    return sum(_layer_bytes(size, packed) for size in sizes)


def _layer_bytes(size: LayerSize, packed: bool) -> int:
    if size.bits == FLOAT_BITS:
        return size.float_bytes
    if not 1 <= size.bits <= _CODE_BITS:
        raise ValueError(f"a convolution of {size.bits} bits has no integer form of at most {_CODE_BITS} bits")
    return size.integer_bytes(size.bits if packed else _CODE_BITS)


def size_of(detector: EfficientAD) -> DetectorSize:
    """As `detector_size`, of a detector as it is."""
    return detector_size(*map(layer_sizes, (detector.teacher, detector.student, detector.autoencoder)))


def detector_size(teacher: Sequence[LayerSize], student: Sequence[LayerSize], autoencoder: Sequence[LayerSize]) -> DetectorSize:
    """Effective parameters both ways and the three sizes in bytes of a whole detector."""
    pair = [*teacher, *student]
    layers = [*pair, *autoencoder]
    return DetectorSize(
        parameters=sum(size.parameters for size in layers),
        effective_teacher_student=effective_parameters(pair),
        effective_all=effective_parameters(layers),
        float32_bytes=sum(size.float_bytes for size in layers),
        int8_bytes=file_bytes(layers, packed=False),
        packed_bytes=file_bytes(layers, packed=True),
    )
