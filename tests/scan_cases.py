"""The selective scan in C and its gradients against the recurrence in float64, with numpy alone, for runs under a sanitizer."""

import ctypes
import itertools
from ctypes import c_float, c_int64

import numpy as np

from tests.kernel_cases import Mismatch, c_value, garbage, normal, own_memory

PATHS = {"baseline": 0, "avx2": 1, "avx512": 2}
NAMES = ("y", "inputs", "step", "state_matrix", "input_matrix", "output_matrix", "skip")
THREADS = (1, 3)
# images, directions, length, channels, states: around the chunks of 16 steps, blocks of 128 channels and vectors of 4, 8 and 16
LENGTHS, CHANNELS, STATES = (1, 15, 16, 17, 40), (1, 4, 7, 16, 33, 128, 129, 133, 300), (1, 16, 17)
SIZES = [
    *((1, 1, length, channels, 3) for length, channels in itertools.product(LENGTHS, CHANNELS)),
    *((2, 4, length, 133, states) for length, states in itertools.product(LENGTHS, STATES)),
    *((3, 1, 33, 12, 64), (1, 4, 33, 260, 5)),
]
TOLERANCE = 2e-5  # of the largest value
ALIGNMENT = 64
_LIBC = ctypes.CDLL(None)
_LIBC.aligned_alloc.restype = ctypes.c_void_p


class CScan:
    """One path of the compiled library. Every array that C sees has exactly the size it needs, outputs hold NaN before."""

    def __init__(self, library: ctypes.CDLL, path: str, threads: int):
        self.library, self.path, self.threads = library, path, threads if library.scan_has_threads() else 1
        for name in ("scan_blocks", "scan_scratch", "scan_starts"):
            getattr(library, name).restype = c_int64

    def value_and_gradients(self, tensors: list[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
        """y, the same without what is kept for gradients, and the gradients of the weighted sum of y."""
        images, directions, length, channels = tensors[0].shape
        states, sequences = tensors[2].shape[-1], images * directions
        sizes = (sequences, directions, length, channels, states)
        starts = garbage((sequences, self.library.scan_starts(*map(c_int64, sizes[2:]))), np.float32)
        alone, outputs = (garbage(tensors[0].shape, np.float32) for _ in range(2))
        self._call("scan_forward", states, sizes, *tensors, None, self._scratch, alone)
        self._call("scan_forward", states, sizes, *tensors, starts, self._scratch, outputs)
        if not np.array_equal(alone, outputs):
            raise Mismatch(f"{self._where(sizes)}: another result when states are kept")
        blocks = self.library.scan_blocks(c_int64(channels))
        at_once = min(sequences, -(-self.threads // blocks))
        shares = garbage((at_once, 2, blocks, length, states), np.float32)
        gradients = [garbage(values.shape, np.float32) for values in tensors]
        for place in (2, 5):  # one for each image
            gradients[place] = garbage((images, *tensors[place].shape), np.float32)
        kept = (*tensors, starts, self._scratch, weights, shares, at_once)
        self._call("scan_backward", states, sizes, *kept, *gradients)
        for place in (2, 5):
            gradients[place] = gradients[place].astype(np.float64).sum(axis=0)
        return [outputs, *gradients]

    _scratch = object()  # stands for scratch memory in the arguments

    def _call(self, name: str, states: int, sizes: tuple[int, ...], *values: np.ndarray | int | object | None) -> None:
        count = self.threads * self.library.scan_scratch(c_int64(states))
        scratch = _LIBC.aligned_alloc(ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(4 * count))  # C takes whole vectors there
        np.ctypeslib.as_array((c_float * count).from_address(scratch))[:] = np.nan
        whole = [own_memory(value) if isinstance(value, np.ndarray) else value for value in values]
        arguments = [ctypes.c_void_p(scratch) if value is self._scratch else c_value(value) for value in whole]
        getattr(self.library, name)(PATHS[self.path], self.threads, *map(c_int64, sizes), *arguments)
        _LIBC.free(ctypes.c_void_p(scratch))

    def _where(self, sizes: tuple[int, ...]) -> str:
        return "scan of {} sequences, {} directions, {} steps, {} channels, {} states".format(*sizes)


def problem(random: np.random.Generator, images: int, directions: int, length: int, channels: int, states: int) -> tuple:
    """The six tensors and the weights of the sum whose gradients are taken; a few states remember all steps."""
    sequence = (images, directions, length)
    decay = -np.arange(1, states + 1, dtype=np.float32) * (0.1 + np.abs(normal(random, directions, channels, states)))
    step = np.log1p(np.exp(normal(random, *sequence, channels) - 4))
    tensors = [normal(random, *sequence, channels), step, decay.astype(np.float32)]
    tensors += [normal(random, *sequence, states), normal(random, *sequence, states), normal(random, directions, channels)]
    return tensors, normal(random, *sequence, channels)


def truth(tensors: list[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    """y and the gradients of its weighted sum in float64, a step at a time: forwards, then the adjoint backwards."""
    inputs, step, state_matrix, input_matrix, output_matrix, skip = (values.astype(np.float64) for values in tensors)
    weights, length = weights.astype(np.float64), inputs.shape[2]
    states, state = [], np.zeros((*inputs.shape[:2], *state_matrix.shape[1:]))  # before each step, (B, K, D, N)
    decays = np.exp(step[..., None] * state_matrix[:, None])
    drive = step * inputs
    outputs = skip[:, None] * inputs
    for t in range(length):
        states.append(state)
        state = decays[:, :, t] * state + drive[:, :, t, :, None] * input_matrix[:, :, t, None]
        outputs[:, :, t] += (state * output_matrix[:, :, t, None]).sum(axis=-1)
    states.append(state)
    of_inputs, of_step = skip[:, None] * weights, np.zeros_like(step)
    of_matrix, of_input, of_output = np.zeros_like(state_matrix), np.zeros_like(input_matrix), np.zeros_like(output_matrix)
    carried = np.zeros_like(state)
    for t in reversed(range(length)):
        of_output[:, :, t] = (states[t + 1] * weights[:, :, t, :, None]).sum(axis=2)
        adjoint = carried + weights[:, :, t, :, None] * output_matrix[:, :, t, None]
        of_drive = (adjoint * input_matrix[:, :, t, None]).sum(axis=-1)
        of_input[:, :, t] = (adjoint * drive[:, :, t, :, None]).sum(axis=2)
        carried = adjoint * decays[:, :, t]
        of_exponent = carried * states[t]
        of_inputs[:, :, t] += of_drive * step[:, :, t]
        of_step[:, :, t] = of_drive * inputs[:, :, t] + (of_exponent * state_matrix).sum(axis=-1)
        of_matrix += (of_exponent * step[:, :, t, :, None]).sum(axis=0)
    return [outputs, of_inputs, of_step, of_matrix, of_input, of_output, (weights * inputs).sum(axis=(0, 2))]


def check(scan: CScan, random: np.random.Generator, sizes: tuple[int, int, int, int, int]) -> None:
    """Raise Mismatch if y or a gradient is not the recurrence's."""
    tensors, weights = problem(random, *sizes)
    found = scan.value_and_gradients(tensors, weights)
    for name, got, expected in zip(NAMES, found, truth(tensors, weights), strict=True):
        error = np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-12)
        if got.shape != expected.shape or not error < TOLERANCE:
            images, directions, length, channels, states = sizes
            where = f"{images} images, {directions} directions, {length} steps, {channels} channels, {states} states"
            raise Mismatch(f"scan, {where}: {name} is off by {error:.1e} of the largest value")


def paths(library: ctypes.CDLL) -> list[str]:
    """Those that run on this CPU, the fastest first."""
    return [name for name, number in sorted(PATHS.items(), key=lambda item: -item[1]) if number <= library.scan_best_path()]
