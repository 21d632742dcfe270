"""The selective scan of a state-space model behind one function, and what computes it.

    h_t = exp(step_t A) h_{t-1} + (step_t u_t) B_t,    y_t = h_t C_t + skip u_t,    h_0 = 0

per image b, direction k and channel, with N states (Mamba, arXiv 2312.00752, with B discretised by Euler as its code does).
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from common.c_arguments import PLAIN_TENSORS
from common.errors import UserError
from models import scan_compiled
from models.scan_chunked import ChunkedScan
from models.scan_compiled import CompiledScan

BACKENDS = ("auto", "torch", "compiled", "mamba_ssm")
_MOST_STATES_OF_MAMBA_SSM = 256


def selective_scan(
    inputs: Tensor,
    step: Tensor,
    state_matrix: Tensor,
    input_matrix: Tensor,
    output_matrix: Tensor,
    skip: Tensor,
    backend: str = "auto",
) -> Tensor:
    """y (B, K, L, D) of inputs u and positive step (B, K, L, D), A (K, D, N), B and C (B, K, L, N) and skip (K, D).

    All tensors are float32 or all float64; under autocast they may be of any floating type, and the result is float32. `auto`
    takes mamba_ssm on CUDA and the compiled scan on the CPU where they can be had and fit, else plain torch.

    Raises:
        ValueError: shapes or types that do not fit.
        UserError: the named backend cannot compute this here.
    """
    tensors = (inputs, step, state_matrix, input_matrix, output_matrix, skip)
    if torch.is_autocast_enabled(inputs.device.type):
        tensors = tuple(values.float() for values in tensors)
    _check(tensors)
    chosen = _chosen(backend, inputs.device, tensors[0].dtype, state_matrix.shape[-1])
    if chosen == "compiled" and backend == "auto" and not all(type(values) in PLAIN_TENSORS for values in tensors):
        chosen = "torch"
    keep = torch.is_grad_enabled() and any(values.requires_grad for values in tensors)
    with torch.autocast(inputs.device.type, enabled=False):
        if chosen == "mamba_ssm":
            return _mamba_ssm_scan(*tensors)
        if chosen == "compiled":
            return CompiledScan.apply(keep, *tensors)
        return ChunkedScan.apply(keep, *tensors)


def _check(tensors: tuple[Tensor, ...]) -> None:
    inputs, step, state_matrix, input_matrix, output_matrix, skip = tensors
    named = {"inputs": inputs, "step": step, "state_matrix": state_matrix}
    named |= {"input_matrix": input_matrix, "output_matrix": output_matrix, "skip": skip}
    if inputs.ndim != 4 or state_matrix.ndim != 3:
        raise ValueError(f"inputs (B, K, L, D) and state_matrix (K, D, N) expected, got {_shapes(named)}")
    images, directions, length, channels = inputs.shape
    states = state_matrix.shape[-1]
    expected = {"inputs": inputs.shape, "step": inputs.shape, "state_matrix": (directions, channels, states)}
    expected |= dict.fromkeys(("input_matrix", "output_matrix"), (images, directions, length, states))
    expected["skip"] = (directions, channels)
    wrong = {name: values for name, values in named.items() if values.shape != expected[name]}
    if wrong:
        fitting = ", ".join(f"{name} {tuple(expected[name])}" for name in wrong)
        raise ValueError(f"{_shapes(wrong)} do not fit inputs {tuple(inputs.shape)} with {states} states: expected {fitting}")
    if not inputs.numel() or not states:
        raise ValueError(f"nothing to scan: {_shapes(named)}")
    kinds = {(values.dtype, values.device) for values in tensors}
    if len(kinds) > 1 or inputs.dtype not in (torch.float32, torch.float64):
        got = ", ".join(f"{name} {values.dtype} on {values.device}" for name, values in named.items())
        raise ValueError(f"all tensors must be float32 or all float64, on one device, got {got}")


def _shapes(named: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(values.shape)}" for name, values in named.items())


def _chosen(backend: str, device: torch.device, dtype: torch.dtype, states: int) -> str:
    """The backend that computes; raises UserError if it was named and cannot."""
    if backend == "auto":
        fast = "compiled" if device.type == "cpu" else "mamba_ssm"
        return "torch" if _obstacle(fast, device, dtype, states) else fast
    if backend not in BACKENDS:
        raise UserError(f"scan backend {backend!r} is unknown; choose from {' '.join(BACKENDS)}")
    obstacle = _obstacle(backend, device, dtype, states)
    if obstacle:
        raise UserError(f"scan backend {backend!r} {obstacle}; choose auto or torch")
    return backend


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype, states: int) -> str | None:
    """Why the backend cannot compute this here, as the rest of a sentence."""
    if backend == "torch":
        return None
    wanted = {"compiled": "cpu", "mamba_ssm": "cuda"}[backend]
    if device.type != wanted or dtype != torch.float32:
        return f"computes float32 on {wanted}, not {str(dtype).removeprefix('torch.')} on {device.type}"
    if backend == "compiled":
        return "needs a C compiler that works: install gcc or set CC" if scan_compiled.load_library() is None else None
    if states > _MOST_STATES_OF_MAMBA_SSM:
        return f"holds at most {_MOST_STATES_OF_MAMBA_SSM} states per channel, not {states}"
    if _mamba_ssm() is None:
        return "needs the package mamba-ssm built with its CUDA kernel (MAMBA_KEEP_CUDA_BUILD=TRUE): install it"
    return None


@cache
def _mamba_ssm() -> ModuleType | None:
    """The module with mamba_ssm's scan, if its CUDA kernel is there: the package can be imported without it."""
    try:
        from mamba_ssm.ops import selective_scan_interface
    except (ImportError, OSError, RuntimeError):  # a package built for another torch fails in all these ways
        return None
    return None if getattr(selective_scan_interface, "selective_scan_cuda", None) is None else selective_scan_interface


def _mamba_ssm_scan(
    inputs: Tensor, step: Tensor, state_matrix: Tensor, input_matrix: Tensor, output_matrix: Tensor, skip: Tensor
) -> Tensor:
    """mamba_ssm keeps time last and takes the directions as groups of channels: u (B, K*D, L), A (K*D, N), B (B, K, N, L)."""
    images, directions, length, channels = inputs.shape
    outputs = _mamba_ssm().selective_scan_fn(
        inputs.transpose(-1, -2).reshape(images, directions * channels, length),
        step.transpose(-1, -2).reshape(images, directions * channels, length),
        state_matrix.flatten(0, 1).contiguous(),
        input_matrix.transpose(-1, -2).contiguous(),
        output_matrix.transpose(-1, -2).contiguous(),
        skip.flatten().contiguous(),
    )
    return outputs.view(images, directions, channels, length).transpose(-1, -2)


def describe_backend(device: torch.device, backend: str = "auto", states: int = 1) -> str:
    """What computes float32 scans on the device, for logs; raises UserError if it was named and cannot."""
    chosen = _chosen(backend, device, torch.float32, states)
    if chosen == "compiled":
        return f"C, {scan_compiled.PATHS[scan_compiled.best_path()]}"
    return {"torch": "plain torch", "mamba_ssm": "mamba_ssm"}[chosen]
