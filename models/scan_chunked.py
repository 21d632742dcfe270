"""The selective scan in plain torch, chunk by chunk: linear time and bounded memory, on every device.

Within a chunk everything but the recurrence itself is computed for all steps at once; the recurrence is one in-place operation
per step. Only the states before each chunk are kept for the backward pass, which computes those within a chunk again.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_FEWEST_STEPS, _MOST_STEPS = 8, 32  # of a chunk
_CHUNK_VALUES = 3 * 2**18  # of one buffer on the CPU: more leave its caches
_LOG2_E = 1 / math.log(2)


@contextmanager
def _own_settings(device: torch.device) -> Iterator[None]:
    """No autocast, and one thread on the CPU: waiting for others takes longer than operations as small as these."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _chunk_length(inputs: Tensor, states: int) -> int:
    """Steps of a chunk for inputs (B, K, L, D): on the CPU fewer where the state of a step is large."""
    *_, length, channels = inputs.shape
    steps = _MOST_STEPS if inputs.device.type != "cpu" else _CHUNK_VALUES // (channels * states)
    return min(max(_FEWEST_STEPS, min(_MOST_STEPS, steps)), length)


def _parts(inputs: Tensor) -> list[tuple[slice, slice]]:
    """Images and directions that are computed together: one of each on the CPU, whose caches hold no more, else all."""
    if inputs.device.type != "cpu":
        return [(slice(None), slice(None))]
    images, directions = inputs.shape[:2]
    return [(slice(b, b + 1), slice(k, k + 1)) for b in range(images) for k in range(directions)]


def _time_first(values: Tensor, part: tuple[slice, slice]) -> Tensor:
    """View of a part of values (B, K, L, n): (L, b, k, n)."""
    return values[part].permute(2, 0, 1, 3)


class _Buffer:
    """Room for the states of one chunk, `whole` (T, b, k, N, D), and for each of its steps; the views are made once."""

    def __init__(self, state: Tensor, chunk: int):
        self.whole = state.new_empty(chunk, *state.shape)
        self.steps = self.whole.unbind()


@dataclass
class _Part:
    """What is computed together, time first: inputs and step (L, b, k, D), the matrices (k, N, D) and (L, b, k, N)."""

    inputs: Tensor
    step: Tensor
    state_matrix: Tensor
    input_matrix: Tensor
    output_matrix: Tensor
    skip: Tensor  # (k, D)

    @classmethod
    def of(cls, part: tuple[slice, slice], tensors: Sequence[Tensor]) -> "_Part":
        """Views of all tensors, of which the state matrix is (K, N, D) already."""
        return cls(*(_time_first(values, part) if values.ndim == 4 else values[part[1]] for values in tensors))

    def chunks(self, length: int) -> list[slice]:
        return [slice(start, start + length) for start in range(0, len(self.inputs), length)]

    def empty_state(self) -> Tensor:
        """(b, k, N, D), zeros."""
        return torch.zeros_like(self.state_matrix.expand(self.inputs.shape[1], -1, -1, -1))

    def run(self, times: slice, before: Tensor, decays: _Buffer, states: _Buffer) -> tuple[Tensor, Tensor]:
        """Fill the buffers with exp(step A) and the states after each step; returns what of them is used."""
        step, drive = self.step[times], self.step[times] * self.inputs[times]
        count = len(step)
        used_decays, used_states = decays.whole[:count], states.whole[:count]
        # exp2 is thrice as fast as exp on the CPU
        torch.mul((step * _LOG2_E).unsqueeze(-2), self.state_matrix, out=used_decays).exp2_()
        torch.mul(drive.unsqueeze(-2), self.input_matrix[times].unsqueeze(-1), out=used_states)
        for decay, state in zip(decays.steps[:count], states.steps[:count], strict=True):
            before = state.addcmul_(decay, before)
        return used_decays, used_states


def _over_states(weights: Tensor, values: Tensor) -> Tensor:
    """Sum over N of weights (T, b, k, N) times values (T, b, k, N, D)."""
    return (weights.unsqueeze(-2) @ values).squeeze(-2)


def _over_channels(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over D of values (T, b, k, N, D) times weights (T, b, k, D)."""
    # the same product as a matrix times a column takes ten times as long on the CPU
    return (weights.unsqueeze(-2) @ values.transpose(-1, -2)).squeeze(-2)


def _forward(part: _Part, chunk: int, outputs: Tensor, starts: Tensor | None) -> None:
    """Write y (L, b, k, D), and the states before each chunk if there is room for them (chunks, b, k, N, D)."""
    state = part.empty_state()
    decays, states = _Buffer(state, chunk), _Buffer(state, chunk)
    for index, times in enumerate(part.chunks(chunk)):
        if starts is not None:
            starts[index] = state
        _, after = part.run(times, state, decays, states)
        outputs[times] = torch.addcmul(_over_states(part.output_matrix[times], after), part.skip, part.inputs[times])
        state.copy_(after[-1])


def _backward(part: _Part, chunk: int, starts: Tensor, out_gradient: Tensor, gradients: _Part) -> None:
    """Write the gradients of the sequences, and add those of the parameters."""
    carried = part.empty_state()
    decays, states, adjoints = (_Buffer(carried, chunk) for _ in range(3))
    for times, start in zip(reversed(part.chunks(chunk)), reversed(starts.unbind()), strict=True):
        step, inputs, outputs = part.step[times], part.inputs[times], out_gradient[times]
        decay, after = part.run(times, start, decays, states)
        gradients.output_matrix[times] = _over_channels(after, outputs)
        adjoint = adjoints.whole[: len(step)]
        torch.mul(outputs.unsqueeze(-2), part.output_matrix[times].unsqueeze(-1), out=adjoint)
        adjoint[-1] += carried
        for i in range(len(step) - 1, 0, -1):
            adjoints.steps[i - 1].addcmul_(decays.steps[i], adjoints.steps[i])
        gradients.input_matrix[times] = _over_channels(adjoint, step * inputs)
        of_drive = _over_states(part.input_matrix[times], adjoint)
        of_exponent = decay.mul_(adjoint)
        carried.copy_(of_exponent[0])
        of_exponent[0] *= start
        of_exponent[1:] *= after[:-1]
        of_step = torch.mul(of_exponent, part.state_matrix, out=adjoint).sum(-2)
        gradients.state_matrix += torch.mul(of_exponent, step.unsqueeze(-2), out=adjoint).sum((0, 1))
        gradients.step[times] = of_step.addcmul_(of_drive, inputs)
        gradients.inputs[times] = (of_drive * step).addcmul_(part.skip, outputs)
        gradients.skip += (outputs * inputs).sum((0, 1))


class ChunkedScan(torch.autograd.Function):
    """`selective_scan` of six tensors after `keep`: whether gradients will be asked for."""

    @staticmethod
    def forward(ctx, keep: bool, *tensors: Tensor) -> Tensor:
        tensors = _with_states_first(tensors)
        inputs, states = tensors[0], tensors[2].shape[1]
        images, directions, length, channels = inputs.shape
        chunk = _chunk_length(inputs, states)
        outputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
        starts = inputs.new_empty(-(-length // chunk), images, directions, states, channels) if keep else None
        with _own_settings(inputs.device):
            for part in _parts(inputs):
                own_starts = starts[:, *part] if keep else None
                _forward(_Part.of(part, tensors), chunk, _time_first(outputs, part), own_starts)
        if keep:
            ctx.save_for_backward(*tensors, starts)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, starts = ctx.saved_tensors
        chunk = _chunk_length(tensors[0], starts.shape[-2])
        gradients = [torch.zeros_like(values, memory_format=torch.contiguous_format) for values in tensors]
        with _own_settings(out_gradient.device):
            for part in _parts(out_gradient):
                into = _Part.of(part, gradients)
                _backward(_Part.of(part, tensors), chunk, starts[:, *part], _time_first(out_gradient, part), into)
        return None, *_with_states_first(gradients)


def _with_states_first(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The state matrix transposed, (K, D, N) to (K, N, D) or back, for channels side by side."""
    return *tensors[:2], tensors[2].transpose(-1, -2).contiguous(), *tensors[3:]
