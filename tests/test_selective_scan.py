"""The selective scan: every backend against a plain loop over time in float64, its errors, and its choice of backend."""

import sys
from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from models import scan_chunked, scan_compiled
from models import selective_scan as module
from models.selective_scan import describe_backend, selective_scan
from scripts import benchmark_scan

IMAGES, DIRECTIONS, CHANNELS = 2, 4, 133  # more channels than the C code takes at a time, and no multiple of its vectors
NAMES = ("inputs", "step", "state_matrix", "input_matrix", "output_matrix", "skip")
LENGTHS, STATES = (1, 7, 16, 33, 100), (16, 64)
TOLERANCE = 1e-5  # of the largest value
CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(autouse=True)
def _restore_threads():
    """Leave the thread count as it was."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def compiled():
    """Skip where there is no C compiler."""
    if scan_compiled.load_library() is None:
        pytest.skip("there is no C compiler")


def example(
    length: int, states: int, channels: int = CHANNELS, images: int = IMAGES, directions: int = DIRECTIONS
) -> list[Tensor]:
    """The six tensors in float64 with values that float32 has; a few states remember all of 100 steps."""
    generator = torch.Generator().manual_seed(length * states)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    sequence = (images, directions, length)
    decay = -torch.arange(1.0, states + 1) * (0.1 + normal(directions, channels, states).abs())
    step = F.softplus(normal(*sequence, channels) - 4)
    tensors = [normal(*sequence, channels), step, decay, normal(*sequence, states), normal(*sequence, states)]
    return [values.double() for values in (*tensors, normal(directions, channels))]


def loop(inputs, step, state_matrix, input_matrix, output_matrix, skip) -> Tensor:
    """The definition, a step at a time."""
    state, outputs = torch.zeros(1), []
    for t in range(inputs.shape[2]):
        decay = torch.exp(step[:, :, t, :, None] * state_matrix)
        state = decay * state + (step * inputs)[:, :, t, :, None] * input_matrix[:, :, t, None]
        outputs.append((state * output_matrix[:, :, t, None]).sum(-1) + skip * inputs[:, :, t])
    return torch.stack(outputs, 2)


def value_and_gradients(function, tensors: list[Tensor], weights: Tensor) -> list[Tensor]:
    """y and the gradients of its weighted sum."""
    tensors = [values.detach().requires_grad_() for values in tensors]
    outputs = function(*tensors)
    return [outputs.detach(), *torch.autograd.grad(outputs, tensors, weights.to(outputs.dtype))]


@cache
def truth(length: int, states: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """The tensors, the weights of the sum, and what the loop makes of them."""
    tensors = example(length, states)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).double()
    return tensors, weights, value_and_gradients(loop, tensors, weights)


def check(function, length: int, states: int, dtype: torch.dtype = FLOAT, tolerance: float = TOLERANCE) -> None:
    """Compare value and all gradients with the loop."""
    tensors, weights, expected = truth(length, states)
    found = value_and_gradients(function, [values.to(dtype) for values in tensors], weights)
    for name, got, wanted in zip(("y", *NAMES), found, expected, strict=True):
        assert got.dtype == dtype
        assert got.shape == wanted.shape
        error = (got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)  # A has no gradient at length 1
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_torch_is_the_loop(length, states):
    check(lambda *tensors: selective_scan(*tensors, backend="torch"), length, states)
    check(lambda *tensors: selective_scan(*tensors, backend="torch"), length, states, torch.float64, 1e-12)


@pytest.mark.parametrize("length", [7, 100])
def test_torch_is_the_loop_for_all_sequences_at_once(monkeypatch, length):
    monkeypatch.setattr(scan_chunked, "_parts", lambda _: [(slice(None), slice(None))])  # as on CUDA
    check(lambda *tensors: selective_scan(*tensors, backend="torch"), length, 16)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("length", LENGTHS)
def test_c_is_the_loop_on_every_path(compiled, monkeypatch, length, states):
    for path in range(scan_compiled.best_path() + 1):
        with monkeypatch.context() as patch:
            patch.setattr(scan_compiled, "best_path", lambda path=path: path)
            check(lambda *tensors: selective_scan(*tensors, backend="compiled"), length, states)


def stand_in_for_mamba_ssm(u, delta, A, B, C, D) -> Tensor:
    """What mamba_ssm documents of selective_scan_fn: u and delta (b, d, l), A (d, n), B and C (b, g, n, l), D (d)."""
    assert all(values.stride(-1) == 1 or values.shape[-1] == 1 for values in (u, delta, A, B, C, D))
    channels, groups = u.shape[1], B.shape[1]
    outputs = []
    for channel in range(channels):
        group = channel // (channels // groups)
        state = torch.zeros(len(u), A.shape[1], dtype=torch.float64)
        for t in range(u.shape[2]):
            drive = delta[:, channel, t, None].double() * u[:, channel, t, None] * B[:, group, :, t]
            state = torch.exp(delta[:, channel, t, None].double() * A[channel]) * state + drive
            outputs.append((state * C[:, group, :, t]).sum(-1) + D[channel] * u[:, channel, t])
    return torch.stack(outputs, -1).view(len(u), channels, -1).to(u.dtype)


@pytest.mark.parametrize("length", [1, 7])
def test_the_layout_of_mamba_ssm(monkeypatch, length):
    monkeypatch.setattr(module, "_mamba_ssm", lambda: SimpleNamespace(selective_scan_fn=stand_in_for_mamba_ssm))
    monkeypatch.setattr(module, "_chosen", lambda *_: "mamba_ssm")
    tensors = example(length, 3, channels=5)
    weights = torch.randn(tensors[0].shape)
    expected = value_and_gradients(loop, tensors, weights)
    found = value_and_gradients(selective_scan, [values.float() for values in tensors], weights)
    for name, got, wanted in zip(("y", *NAMES), found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_gradients_of_the_torch_form(monkeypatch):
    monkeypatch.setattr(scan_chunked, "_FEWEST_STEPS", 2)
    monkeypatch.setattr(scan_chunked, "_MOST_STEPS", 2)
    tensors = [values.requires_grad_() for values in example(5, 2, channels=3, directions=2)]
    assert torch.autograd.gradcheck(lambda *values: selective_scan(*values, backend="torch"), tensors)


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_strides_do_not_matter(compiled, kind):
    tensors = [values.float() for values in example(33, 16)]
    strided = [torch.stack([values, values], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for values in tensors]
    weights = torch.ones(()).expand(tensors[0].shape)  # as `sum` hands it back
    expected = value_and_gradients(lambda *values: selective_scan(*values, backend=kind), tensors, weights.contiguous())
    found = value_and_gradients(lambda *values: selective_scan(*values, backend=kind), strided, weights)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_threads_and_repetition_change_no_bit(compiled, kind):
    tensors, weights, _ = truth(100, 16)
    tensors = [values.float() for values in tensors]
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(value_and_gradients(lambda *values: selective_scan(*values, backend=kind), tensors, weights))
        assert torch.get_num_threads() == threads
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_without_gradients_the_values_are_the_same_and_nothing_is_kept(compiled, kind):
    tensors = [values.float().requires_grad_() for values in example(33, 16)]
    with torch.no_grad():
        alone = selective_scan(*tensors, backend=kind)
    assert not alone.requires_grad
    assert torch.equal(alone, selective_scan(*tensors, backend=kind))


@pytest.mark.parametrize("kind", ["torch", "compiled"])
def test_under_autocast_float32_computes(compiled, kind):
    tensors = [values.float() for values in example(33, 16)]
    half = [values.bfloat16() if name != "state_matrix" else values for name, values in zip(NAMES, tensors, strict=True)]
    weights = torch.randn(tensors[0].shape)
    expected = value_and_gradients(lambda *v: selective_scan(*v, backend=kind), [v.float() for v in half], weights)
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradients(lambda *v: selective_scan(*v, backend=kind), half, weights)
    assert found[0].dtype == torch.float32
    assert torch.equal(found[0], expected[0])
    for got, wanted, source in zip(found[1:], expected[1:], half, strict=True):
        assert torch.equal(got, wanted.to(source.dtype))


def test_states_that_vanish_and_steps_that_are_not_numbers(compiled):
    tensors = [values.float() for values in example(33, 16)]
    tensors[2] *= 1e6
    for kind in ("torch", "compiled"):
        outputs = selective_scan(*tensors, backend=kind)
        inputs, step, _, input_matrix, output_matrix, skip = tensors
        memoryless = step * inputs * (input_matrix * output_matrix).sum(-1, keepdim=True) + skip[:, None] * inputs
        torch.testing.assert_close(outputs, memoryless, rtol=1e-4, atol=1e-5)
    tensors[1][0, 0, 7, 3] = torch.nan
    for kind in ("torch", "compiled"):
        missing = selective_scan(*tensors, backend=kind).isnan()
        assert missing[0, 0, 7:, 3].all()
        assert missing.sum() == 33 - 7


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("inputs", (2, 4, 5)),
        ("step", (2, 4, 5, 4)),
        ("state_matrix", (4, 2, 6)),
        ("state_matrix", (3, 6)),
        ("input_matrix", (2, 4, 6, 6)),
        ("output_matrix", (1, 4, 5, 6)),
        ("skip", (3,)),
    ],
)
def test_shapes_that_do_not_fit_are_named(name, shape):
    tensors = dict(zip(NAMES, example(5, 6, channels=3), strict=True))
    tensors[name] = torch.ones(shape).double()
    with pytest.raises(ValueError, match=f"{name} \\({', '.join(map(str, shape))},?\\)"):
        selective_scan(**tensors)


def test_nothing_to_scan():
    with pytest.raises(ValueError, match=r"nothing to scan: inputs \(2, 4, 0, 3\)"):
        selective_scan(*example(0, 6, channels=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64])
def test_types_that_do_not_fit_are_named(dtype):
    tensors = [values.float() for values in example(5, 6, channels=3)]
    tensors[3] = tensors[3].to(dtype)
    with pytest.raises(ValueError, match=f"float32.*input_matrix {dtype}"):
        selective_scan(*tensors)


def test_a_backend_that_is_named_but_cannot_compute_says_why(monkeypatch):
    tensors = example(5, 6, channels=3)
    with pytest.raises(UserError, match="'numba' is unknown; choose from auto torch compiled mamba_ssm"):
        selective_scan(*tensors, backend="numba")
    with pytest.raises(UserError, match="'compiled' computes float32 on cpu, not float64 on cpu; choose auto or torch"):
        selective_scan(*tensors, backend="compiled")
    single = [values.float() for values in tensors]
    with pytest.raises(UserError, match="'mamba_ssm' computes float32 on cuda, not float32 on cpu"):
        selective_scan(*single, backend="mamba_ssm")
    monkeypatch.setattr(scan_compiled, "load_library", lambda: None)
    with pytest.raises(UserError, match="'compiled' needs a C compiler that works: install gcc or set CC"):
        selective_scan(*single, backend="compiled")


def test_auto_takes_c_on_the_cpu_and_torch_where_it_cannot(compiled, monkeypatch):
    assert module._chosen("auto", CPU, FLOAT, 16) == "compiled"
    assert module._chosen("auto", CPU, torch.float64, 16) == "torch"
    assert describe_backend(CPU) == f"C, {scan_compiled.PATHS[scan_compiled.best_path()]}"
    monkeypatch.setattr(scan_compiled, "load_library", lambda: None)
    assert module._chosen("auto", CPU, FLOAT, 16) == "torch"
    assert describe_backend(CPU) == "plain torch"


@pytest.mark.parametrize("kernel", [None, object()])
def test_mamba_ssm_is_used_on_cuda_only_with_its_kernel(monkeypatch, kernel):
    interface = SimpleNamespace(selective_scan_cuda=kernel)
    monkeypatch.setitem(sys.modules, "mamba_ssm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", SimpleNamespace(selective_scan_interface=interface))
    module._mamba_ssm.cache_clear()
    try:
        cuda = torch.device("cuda")
        assert module._chosen("auto", cuda, FLOAT, 256) == ("torch" if kernel is None else "mamba_ssm")
        assert module._chosen("auto", cuda, FLOAT, 257) == "torch"
        assert module._chosen("auto", cuda, torch.float64, 16) == "torch"
        if kernel is None:
            with pytest.raises(UserError, match="needs the package mamba-ssm built with its CUDA kernel"):
                module._chosen("mamba_ssm", cuda, FLOAT, 16)
    finally:
        module._mamba_ssm.cache_clear()


def test_without_mamba_ssm_torch_computes_on_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    module._mamba_ssm.cache_clear()
    assert describe_backend(torch.device("cuda")) == "plain torch"
    module._mamba_ssm.cache_clear()


def test_memory_stays_bounded_at_full_length():
    assert benchmark_scan.peak_megabytes("torch", benchmark_scan.LENGTH, benchmark_scan.CHANNELS, 16) < 300


def test_the_benchmark_prints_a_row_for_each_backend(compiled, monkeypatch, capsys):
    monkeypatch.setattr(benchmark_scan, "peak_megabytes", lambda *_: 17.0)
    assert benchmark_scan.main(["--length", "40", "--channels", "20", "--states", "4", "--runs", "1"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.split()[1:2] == ["4"]] == ["torch", "compiled"]
    assert printed.count("  17") == 2
