"""The kernels as torch operators: tracing and export see one node each, the CPU runs C, or plain torch without a compiler.

Activations are bits (rows, words) int32 and weights panels (panels, words, 32) int32, see kernels.c and oracle.py.
"""

import ctypes
from ctypes import c_float, c_int64
from typing import NoReturn

import torch
from torch import Tensor

from binarize.kernels import oracle
from binarize.kernels.library import PATHS, chosen_path, load_library

MOST_PROTOTYPES, MOST_CHANNELS, MOST_COLUMNS = 64, 4096, 16384
_KEY_PADDING = 16
_TYPES_IN_C = (torch.float32, torch.int32, torch.uint8)


class Kernels:
    """The compiled library with a path chosen; `call` passes path and thread count first."""

    def __init__(self, library: ctypes.CDLL, path: str):
        self.library = library
        self.path = path
        self._number = PATHS[path]
        self._threaded = bool(library.binaryad_has_threads())
        self.has_softmax_attention = path == "avx512" and bool(library.binaryad_has_softmax_attention())

    def call(self, name: str, *arguments: Tensor | int | float | None) -> int:
        """Run a C function on tensors and numbers; outputs must be dense, of other tensors it gets dense copies.

        Returns what it returned, which means nothing for those without a result.
        """
        threads = torch.get_num_threads() if self._threaded else 1
        dense = [value.contiguous() if isinstance(value, Tensor) else value for value in arguments]  # outlive the call
        return getattr(self.library, f"binaryad_{name}")(self._number, threads, *map(_c_value, dense))


def _c_value(value: Tensor | int | float | None) -> ctypes._SimpleCData | None:
    if isinstance(value, Tensor):
        if not value.is_cpu or value.dtype not in _TYPES_IN_C:
            raise TypeError(f"the kernels take float32, int32 and uint8 on the CPU, not {value.dtype} on {value.device}")
        return ctypes.c_void_p(value.data_ptr())
    return c_float(value) if isinstance(value, float) else value if value is None else c_int64(value)


_kernels: list[Kernels | None] = []


def kernels() -> Kernels | None:
    """The compiled kernels on the path chosen at the first call, None where there is no compiler."""
    if not _kernels:
        library = load_library()
        _kernels.append(None if library is None else Kernels(library, chosen_path(library)))
    return _kernels[0]


def use_kernels(chosen: Kernels | None) -> None:
    """Use another path from now on, or plain torch: for tests and benchmarks."""
    _kernels[:] = [chosen]


def describe_path() -> str:
    """What computes the binary layers, for logs and reports."""
    return "plain torch (no C compiler)" if kernels() is None else f"C kernels, {kernels().path}"


def _for_c(tensor: Tensor) -> Kernels | None:
    """The kernels, if they can take this tensor: some keep a row on the stack."""
    return kernels() if tensor.is_cpu and tensor.shape[-1] <= MOST_COLUMNS else None


def _refuse(what: str, *tensors: Tensor | None) -> NoReturn:
    raise ValueError(f"{what}: {', '.join(str(tensor if tensor is None else tuple(tensor.shape)) for tensor in tensors)}")


def _are_rows(rows: Tensor, per_row: Tensor | None, *per_column: Tensor | None) -> bool:
    """Whether `rows` is (rows, n), and the others are absent or (rows,) and (n,)."""
    return (
        rows.ndim == 2
        and (per_row is None or per_row.shape == rows.shape[:1])
        and all(values is None or values.shape == rows.shape[1:] for values in per_column)
    )


@torch.library.custom_op("binaryad::pack", mutates_args=())
def pack(x: Tensor, threshold: Tensor) -> Tensor:
    """Bits of x (rows, k) - threshold (k) >= 0."""
    if not _are_rows(x, None, threshold):
        _refuse("x and threshold do not fit", x, threshold)
    c = _for_c(x)
    if c is None:
        return oracle.pack(x, threshold)
    x = x.float()
    bits = x.new_empty(len(x), oracle.words_of(x.shape[1]), dtype=torch.int32)
    c.call("pack", x, len(x), x.shape[1], threshold, bits)
    return bits


@pack.register_fake
def _(x: Tensor, threshold: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], oracle.words_of(x.shape[1]), dtype=torch.int32)


@torch.library.custom_op("binaryad::layer_norm_pack", mutates_args=())
def layer_norm_pack(x: Tensor, weight: Tensor, bias: Tensor, eps: float, threshold: Tensor) -> Tensor:
    """Bits of layer_norm(x (rows, k)) - threshold (k) >= 0."""
    if not _are_rows(x, None, weight, bias, threshold):
        _refuse("x, norm and threshold do not fit", x, weight, bias, threshold)
    c = _for_c(x)
    if c is None:
        return oracle.layer_norm_pack(x, weight, bias, eps, threshold)
    x = x.float()
    bits = x.new_empty(len(x), oracle.words_of(x.shape[1]), dtype=torch.int32)
    c.call("layer_norm_pack", x, len(x), x.shape[1], weight, bias, float(eps), threshold, bits)
    return bits


@layer_norm_pack.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, threshold: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], oracle.words_of(x.shape[1]), dtype=torch.int32)


@torch.library.custom_op("binaryad::linear", mutates_args=())
def linear(bits: Tensor, panels: Tensor, in_features: int, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """scale * (signs of bits @ signs of weights) + bias (+ residual (rows, out)), (rows, out) float32."""
    _check_product(bits, panels, in_features, scale, bias)
    shape = (len(bits), len(scale))
    if residual is not None and residual.shape != shape:
        _refuse(f"residual is not {shape}", residual)
    c = _for_c(bits)
    if c is None:
        return oracle.linear(bits, panels, in_features, scale, bias, residual)
    out = scale.new_empty(shape)
    residual = None if residual is None else residual.float()
    c.call("linear", bits, len(bits), panels, in_features, len(scale), scale, bias, residual, out)
    return out


@linear.register_fake
def _(bits: Tensor, panels: Tensor, in_features: int, scale: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return scale.new_empty(bits.shape[0], scale.shape[0])


@torch.library.custom_op("binaryad::linear_to_bits", mutates_args=())
def linear_to_bits(bits: Tensor, panels: Tensor, in_features: int, low: Tensor, span: Tensor) -> Tensor:
    """Bits that are 0 where low (out) <= mismatches <= low + span (out), else 1: what follows the product is folded in."""
    _check_product(bits, panels, in_features, low, span)
    c = _for_c(bits)
    if c is None:
        return oracle.linear_to_bits(bits, panels, in_features, low, span)
    out = bits.new_empty(len(bits), oracle.words_of(len(low)))
    c.call("linear_to_bits", bits, len(bits), panels, in_features, len(low), low, span, out)
    return out


@linear_to_bits.register_fake
def _(bits: Tensor, panels: Tensor, in_features: int, low: Tensor, span: Tensor) -> Tensor:
    return bits.new_empty(bits.shape[0], oracle.words_of(low.shape[0]))


@torch.library.custom_op("binaryad::prototype_attention", mutates_args=())
def prototype_attention(
    query: Tensor,
    projected: Tensor,
    head_scale: Tensor,
    share: Tensor | None,
    slope: Tensor | None,
    middle: Tensor | None,
    threshold: Tensor,
) -> Tensor:
    """Attention of query (B, N, C) over keys and values projected (B, M, 2C), softmax-aware binarization, then bits.

    head_scale, share, slope, middle: (heads). Without `share` the map stays float, without `slope` the gate is 1.
    Returns (B * N, words).
    """
    heads, gates = len(head_scale), (head_scale, share, slope, middle)
    if query.ndim != 3 or projected.ndim != 3 or (slope is None) != (middle is None):
        _refuse("queries, prototypes or gates are not what they must be", query, projected, *gates)
    (batch, tokens, width), count = query.shape, projected.shape[1]
    fits = projected.shape == (batch, count, 2 * width) and width % heads == 0 and threshold.shape == (width,)
    if not (fits and all(values is None or values.shape == (heads,) for values in gates)):
        _refuse("queries, prototypes, gates and threshold do not fit", query, projected, *gates, threshold)
    c = _for_c(query)
    if c is None or count > MOST_PROTOTYPES or width > MOST_CHANNELS:
        return oracle.prototype_attention(query, projected, head_scale, share, slope, middle, threshold)
    keys = query.new_empty(batch * width * (-(-count // _KEY_PADDING) * _KEY_PADDING))
    bits = query.new_empty(batch * tokens, oracle.words_of(width), dtype=torch.int32)
    sizes = (count, heads, width // heads)
    c.call("prototype_attention", query, batch, tokens, projected, *sizes, keys, *gates, threshold, bits)
    return bits


@prototype_attention.register_fake
def _(query, projected, head_scale, share, slope, middle, threshold) -> Tensor:
    return query.new_empty(query.shape[0] * query.shape[1], oracle.words_of(query.shape[2]), dtype=torch.int32)


def _check_product(bits: Tensor, panels: Tensor, in_features: int, *per_output: Tensor) -> None:
    words, outputs = oracle.words_of(in_features), per_output[0].shape[:1]
    fits = bits.shape[1:] == (words,) and panels.shape == (-(-len(per_output[0]) // 32), words, 32)
    if not (fits and all(values.shape == outputs for values in per_output)):
        _refuse(f"bits, panels and outputs do not fit, or not to {in_features} inputs", bits, panels, *per_output)


def _quantized_like(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[:1])


@torch.library.custom_op("binaryad::quantize", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, n) -> bytes 128 + round(x / scale), and scale = max |x| / 127 of each row."""
    if x.ndim != 2:
        _refuse("x is not (rows, n)", x)
    c = _for_c(x)
    if c is None:
        return oracle.quantize(x)
    out, scales = _quantized_like(x)
    c.call("quantize", x, *x.shape, out, scales)
    return out, scales


@quantize.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized_like(x)


@torch.library.custom_op("binaryad::layer_norm_quantize", mutates_args=())
def layer_norm_quantize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`quantize` of layer_norm(x (rows, n))."""
    if not _are_rows(x, None, weight, bias):
        _refuse("x and norm do not fit", x, weight, bias)
    c = _for_c(x)
    if c is None:
        return oracle.layer_norm_quantize(x, weight, bias, eps)
    out, scales = _quantized_like(x)
    c.call("layer_norm_quantize", x, *x.shape, weight, bias, float(eps), out, scales)
    return out, scales


@layer_norm_quantize.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _quantized_like(x)


@torch.library.custom_op("binaryad::gelu_quantize", mutates_args=())
def gelu_quantize(sums: Tensor, row_scales: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize` of gelu(sums (rows, n) * row_scales (rows) + bias (n))."""
    if not _are_rows(sums, row_scales, bias):
        _refuse("sums, row scales and bias do not fit", sums, row_scales, bias)
    c = _for_c(sums)
    if c is None:
        return oracle.gelu_quantize(sums, row_scales, bias)
    out, scales = _quantized_like(sums)
    c.call("gelu_quantize", sums, *sums.shape, row_scales, bias, out, scales)
    return out, scales


@gelu_quantize.register_fake
def _(sums: Tensor, row_scales: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return _quantized_like(sums)


@torch.library.custom_op("binaryad::rescale", mutates_args=())
def rescale(sums: Tensor, row_scales: Tensor, bias: Tensor, layer_scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """residual (rows, n) + layer_scale (n) (sums (rows, n) * row_scales (rows) + bias (n)); the last two may be absent."""
    if not _are_rows(sums, row_scales, bias, layer_scale) or (residual is not None and residual.shape != sums.shape):
        _refuse("sums, scales, bias and residual do not fit", sums, row_scales, bias, layer_scale, residual)
    c = _for_c(sums)
    if c is None:
        return oracle.rescale(sums, row_scales, bias, layer_scale, residual)
    out = torch.empty_like(sums, memory_format=torch.contiguous_format)
    c.call("rescale", sums, *sums.shape, row_scales, bias, layer_scale, residual, out)
    return out


@rescale.register_fake
def _(sums, row_scales, bias, layer_scale, residual) -> Tensor:
    return torch.empty_like(sums, memory_format=torch.contiguous_format)


@torch.library.custom_op("binaryad::softmax_attention", mutates_args=())
def softmax_attention(sums: Tensor, row_scales: Tensor, bias: Tensor, tokens: int, heads: int) -> Tensor:
    """Attention of queries, keys and values sums * row_scales + bias (B * tokens, 3C) -> (B * tokens, C).

    With AVX-512 BF16 the products are bfloat16, the sums float32; elsewhere torch's float32 attention.
    """
    if not _are_rows(sums, row_scales, bias) or min(tokens, heads) < 1 or len(sums) % tokens or sums.shape[1] % (3 * heads):
        _refuse(f"sums, row scales and bias are not for {tokens} tokens and {heads} heads", sums, row_scales, bias)
    width = sums.shape[1] // 3
    c = _for_c(sums)
    if c is None or not c.has_softmax_attention or width // heads % 32:
        return oracle.softmax_attention(rescale(sums, row_scales, bias, None, None), tokens, heads)
    out = sums.new_empty(len(sums), width)
    images = len(sums) // tokens
    if not c.call("softmax_attention", sums, images, tokens, heads, width // heads, row_scales, bias, out):
        raise MemoryError("no memory for the attention's keys and scores")
    return out


@softmax_attention.register_fake
def _(sums: Tensor, row_scales: Tensor, bias: Tensor, tokens: int, heads: int) -> Tensor:
    return sums.new_empty(sums.shape[0], sums.shape[1] // 3)
