"""The compiled kernels, which path of them is used, and what all operators check their arguments with."""

import ctypes
from ctypes import c_float, c_int64
from typing import NoReturn

import torch
from torch import Tensor

from binarize.kernels.library import PATHS, chosen_path, load_library

MOST_COLUMNS = 16384
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


def for_c(tensor: Tensor) -> Kernels | None:
    """The kernels, if they can take this tensor: some keep a row on the stack."""
    return kernels() if tensor.is_cpu and tensor.shape[-1] <= MOST_COLUMNS else None


def refuse(what: str, *tensors: Tensor | None) -> NoReturn:
    raise ValueError(f"{what}: {', '.join(str(tensor if tensor is None else tuple(tensor.shape)) for tensor in tensors)}")


def refuse_uneven(operator: str, rows: Tensor, tokens: int, heads: int) -> None:
    """Raise ValueError unless `rows` are whole images of `tokens`, and queries, keys and values of so many heads."""
    whole = rows.ndim == 2 and min(tokens, heads) >= 1 and not len(rows) % tokens and not rows.shape[1] % (3 * heads)
    if not whole:
        refuse(f"{operator}: rows are not queries, keys and values for {tokens} tokens and {heads} heads", rows)
