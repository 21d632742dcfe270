"""The selective scan in C (scan_kernel.c), compiled on first use: float32 on the CPU."""

import ctypes
from collections.abc import Mapping
from ctypes import c_int64
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.c_arguments import Argument, Signature
from common.c_library import open_library

SOURCES = [Path(__file__).with_name(name) for name in ("scan_kernel.c", "scan_path.h")]
PATHS = ("baseline", "avx2", "avx512")  # numbered as in scan_kernel.c
_SEQUENCES = ("images", "directions", "length")


def _float(name: str, *shape: str) -> Argument:
    return Argument(name, (torch.float32,), shape)


def _kept(sizes: Mapping[str, int]) -> int:
    """Floats of the states that one sequence keeps for its gradients."""
    return sizes["keep"] * load_library().scan_starts(*(c_int64(sizes[name]) for name in ("length", "channels", "states")))


_FORWARD = Signature(
    "selective scan in C",
    (
        _float("inputs", *_SEQUENCES, "channels"),
        _float("step", *_SEQUENCES, "channels"),
        _float("state_matrix", "directions", "channels", "states"),
        _float("input_matrix", *_SEQUENCES, "states"),
        _float("output_matrix", *_SEQUENCES, "states"),
        _float("skip", "directions", "channels"),
    ),
    made=(("sequences", "kept"),),
    derived={"sequences": lambda sizes: sizes["images"] * sizes["directions"], "kept": _kept},
    may_be_zero=frozenset({"keep", "kept"}),
)
_BACKWARD = replace(
    _FORWARD,
    operator="gradients of the selective scan in C",
    arguments=(*_FORWARD.arguments, _float("starts", "sequences", "kept"), _float("gradient", *_SEQUENCES, "channels")),
    made=(("images", "directions", "channels", "states"), ("at_once", "blocks", 2, "length", "states")),
    derived={
        **_FORWARD.derived,
        "blocks": lambda sizes: load_library().scan_blocks(c_int64(sizes["channels"])),
        "at_once": lambda sizes: min(sizes["sequences"], -(-sizes["threads"] // sizes["blocks"])),  # all threads are busy
    },
)


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


def _in_c(sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[name] for name in ("sequences", "directions", "length", "channels", "states"))


def _dense(values: Tensor) -> Tensor:
    return values.resolve_neg().contiguous()  # a conjugate's imaginary part is negated only when it is read


def _scratch(like: Tensor, threads: int, states: int) -> Tensor:
    return like.new_empty(threads, load_library().scan_scratch(c_int64(states)))


class CompiledScan(torch.autograd.Function):
    """`selective_scan` of six tensors after `keep`: whether gradients will be asked for."""

    @staticmethod
    def forward(ctx, keep: bool, *tensors: Tensor) -> Tensor:
        sizes, threads = _FORWARD.check(*tensors, keep=int(keep)), _threads()
        tensors = [_dense(values) for values in tensors]
        outputs = torch.empty_like(tensors[0])
        starts = outputs.new_empty(sizes["sequences"], sizes["kept"]) if keep else None
        scratch = _scratch(outputs, threads, sizes["states"])
        _call("scan_forward", threads, _in_c(sizes), *tensors, starts, scratch, outputs)
        if keep:
            ctx.save_for_backward(*tensors, starts)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts = ctx.saved_tensors
        inputs, step, state_matrix, input_matrix, output_matrix, skip = tensors
        threads = _threads()
        sizes = _BACKWARD.check(*tensors, starts, out_gradient, keep=1, threads=threads)
        at_once, scratch, dense = sizes["at_once"], _scratch(inputs, threads, sizes["states"]), _dense(out_gradient)
        shares = inputs.new_empty(at_once, 2, sizes["blocks"], *input_matrix.shape[2:])
        per_image = [values.new_empty(len(inputs), *values.shape) for values in (state_matrix, skip)]
        gradients = [torch.empty_like(values) for values in (inputs, step, input_matrix, output_matrix)]
        of_inputs, of_step, of_input_matrix, of_output_matrix = gradients
        results = [of_inputs, of_step, per_image[0], of_input_matrix, of_output_matrix, per_image[1]]
        _call("scan_backward", threads, _in_c(sizes), *tensors, starts, scratch, dense, shares, at_once, *results)
        return None, of_inputs, of_step, per_image[0].sum(0), of_input_matrix, of_output_matrix, per_image[1].sum(0)
