"""The selective scan in C (scan_kernel.c), compiled on first use: float32 on the CPU."""

import ctypes
from ctypes import c_int64
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.c_library import open_library

SOURCES = [Path(__file__).with_name(name) for name in ("scan_kernel.c", "scan_path.h")]
PATHS = ("baseline", "avx2", "avx512")  # numbered as in scan_kernel.c


@cache
def load_library() -> ctypes.CDLL | None:
    """The C scan, or None, said once, where it cannot be compiled."""
    library = open_library("scan", SOURCES, "selective scans")
    if library is not None:
        for name in ("scan_blocks", "scan_scratch", "scan_starts"):
            getattr(library, name).restype = c_int64
    return library


def best_path() -> int:
    """Number of the fastest path that runs on this CPU; those below run too."""
    return load_library().scan_best_path()


def _call(name: str, threads: int, sizes: tuple[int, ...], *values: Tensor | int | None) -> None:
    """Run a C function on dense tensors and numbers."""
    arguments = [ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value for value in values]
    arguments = [c_int64(value) if isinstance(value, int) else value for value in arguments]
    getattr(load_library(), name)(best_path(), threads, *map(c_int64, sizes), *arguments)


def _threads() -> int:
    return torch.get_num_threads() if load_library().scan_has_threads() else 1


def _sizes(inputs: Tensor, state_matrix: Tensor) -> tuple[int, int, int, int, int]:
    """Sequences, directions, length, channels, states."""
    images, directions, length, channels = inputs.shape
    return images * directions, directions, length, channels, state_matrix.shape[-1]


class CompiledScan(torch.autograd.Function):
    """`selective_scan` of six dense tensors after `keep`: whether gradients will be asked for."""

    @staticmethod
    def forward(ctx, keep: bool, *tensors: Tensor) -> Tensor:
        sizes, threads, library = _sizes(tensors[0], tensors[2]), _threads(), load_library()
        outputs = torch.empty_like(tensors[0])
        scratch = outputs.new_empty(threads, library.scan_scratch(c_int64(sizes[-1])))
        starts = outputs.new_empty(sizes[0], library.scan_starts(*map(c_int64, sizes[2:]))) if keep else None
        _call("scan_forward", threads, sizes, *tensors, starts, scratch, outputs)
        if keep:
            ctx.save_for_backward(*tensors, starts)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts = ctx.saved_tensors
        inputs, step, state_matrix, input_matrix, output_matrix, skip = tensors
        images, threads, library = len(inputs), _threads(), load_library()
        sizes = _sizes(inputs, state_matrix)
        scratch = inputs.new_empty(threads, library.scan_scratch(c_int64(sizes[-1])))
        blocks = library.scan_blocks(c_int64(sizes[-2]))
        at_once = min(sizes[0], -(-threads // blocks))  # as many sequences as keep all threads busy
        shares = inputs.new_empty(at_once, 2, blocks, *input_matrix.shape[2:])
        per_image = [values.new_empty(images, *values.shape) for values in (state_matrix, skip)]
        gradients = [torch.empty_like(values) for values in (inputs, step, input_matrix, output_matrix)]
        of_inputs, of_step, of_input_matrix, of_output_matrix = gradients
        results = [of_inputs, of_step, per_image[0], of_input_matrix, of_output_matrix, per_image[1]]
        dense = out_gradient.contiguous()
        _call("scan_backward", threads, sizes, *tensors, starts, scratch, dense, shares, at_once, *results)
        return None, of_inputs, of_step, per_image[0].sum(0), of_input_matrix, of_output_matrix, per_image[1].sum(0)
