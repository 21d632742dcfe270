"""The C kernels, their plain torch form, the operators that choose between them, and how the library is made and found."""

import ctypes
import logging
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from binarize.kernels import block_operations, engine, int8_operations, library, operations, oracle
from binarize.kernels.library import (
    CompilationError,
    available_paths,
    chosen_path,
    compile_library,
    find_compiler,
    load_library,
)
from common.errors import UserError
from tests import kernel_cases
from tests.conftest import REPOSITORY

OPERATORS = [
    "pack",
    "layer_norm_pack",
    "linear",
    "linear_to_bits",
    "prototype_attention",
    "linear_attention",
    "project_and_attend",
    "project_and_transform",
    "quantize",
    "layer_norm_quantize",
    "gelu_quantize",
    "rescale",
    "softmax_attention",
]
ROWS, INPUTS, OUTPUTS, HEADS, TOKENS = 70, 65, 33, 5, 35
FEWER_SIZES = {  # the operators' own part is small, and plain torch is slow
    "ROWS": (0, 2, 9),
    "INPUTS": (1, 33, 65, 384),
    "OUTPUTS": (1, 33, 96),
    "PROTOTYPES": (1, 17),
    "BLOCK_WIDTHS": ((1, 1), (33, 132), (160, 640)),
    "SOFTMAX_TOKENS": (1, 17, 100),
}
UNOPTIMISED = ["-O0"]  # compiles ten times faster


@pytest.fixture(scope="module")
def kernels(compiler):
    """The compiled kernels as users get them."""
    return load_library()


@pytest.fixture(autouse=True)
def _restore():
    """Leave path and thread count as they were."""
    threads, chosen = torch.get_num_threads(), list(engine._kernels)
    yield
    torch.set_num_threads(threads)
    engine._kernels[:] = chosen


@pytest.fixture
def forget():
    """Let the library be compiled or found anew in this test, and as usual afterwards."""

    def forget_all() -> None:
        load_library.cache_clear()
        engine._kernels.clear()

    forget_all()
    yield forget_all
    forget_all()


def operator(name: str) -> Callable:
    """An operator by its name."""
    return next(getattr(part, name) for part in (operations, block_operations, int8_operations) if hasattr(part, name))


def tensor_of_array(value):
    """An array as a tensor, anything else as it is."""
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


class TorchKernels:
    """The operators as the cases call them, with arrays."""

    has_softmax_attention = True

    def __getattr__(self, name: str):
        def call(*arguments):
            found = operator(name)(*tree_map(tensor_of_array, arguments))
            return tuple(part.numpy() for part in found) if isinstance(found, tuple) else found.numpy()

        return call


def example(name: str) -> list:
    """Arguments of an operator, several blocks of odd size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width = 32 * HEADS

    def panels_of(outputs: int, inputs: int) -> Tensor:
        return oracle.panels_of(oracle.pack(normal(outputs, inputs), torch.zeros(inputs)))

    def layer(outputs: int, inputs: int) -> list[Tensor]:
        return [panels_of(outputs, inputs), normal(outputs) / inputs**0.5, normal(outputs)]

    bits, panels = oracle.pack(normal(ROWS, INPUTS), normal(INPUTS)), panels_of(OUTPUTS, INPUTS)
    low = torch.randint(20, 35, (OUTPUTS,), generator=generator, dtype=torch.int32)
    span = torch.randint(0, 20, (OUTPUTS,), generator=generator, dtype=torch.int32)
    gates = [torch.rand(HEADS, generator=generator) for _ in range(3)]
    return {
        "pack": [normal(ROWS, INPUTS), normal(INPUTS)],
        "layer_norm_pack": [normal(ROWS, INPUTS), normal(INPUTS), normal(INPUTS), 1e-6, normal(INPUTS)],
        "linear": [bits, panels, INPUTS, normal(OUTPUTS), normal(OUTPUTS), normal(ROWS, OUTPUTS)],
        "linear_to_bits": [bits, panels, INPUTS, low, span],
        "prototype_attention": [normal(2, TOKENS, width), normal(2, 6, 2 * width), normal(HEADS), *gates, normal(width)],
        "linear_attention": [normal(ROWS, 3 * width), TOKENS, HEADS, normal(width) / 10],
        "project_and_attend": [
            oracle.pack(*normal(2, ROWS, width)),
            *layer(3 * width, width),
            TOKENS,
            HEADS,
            normal(width) / 10,
        ],
        "project_and_transform": [
            *(bits, layer(INPUTS, INPUTS), normal(ROWS, INPUTS), list(normal(3, INPUTS)), 1e-6),
            *([panels, low, span], layer(INPUTS, OUTPUTS)),
        ],
        "quantize": [normal(ROWS, INPUTS)],
        "layer_norm_quantize": [normal(ROWS, INPUTS), normal(INPUTS), normal(INPUTS), 1e-6],
        "gelu_quantize": [normal(ROWS, INPUTS), normal(ROWS), normal(INPUTS)],
        "rescale": [normal(ROWS, INPUTS), normal(ROWS), normal(INPUTS), normal(INPUTS), normal(ROWS, INPUTS)],
        "softmax_attention": [normal(ROWS, 3 * width), normal(ROWS), normal(3 * width), TOKENS, HEADS],
    }[name]


def results(name: str, arguments: list) -> tuple[Tensor, ...]:
    """What an operator returns, always as a tuple."""
    found = operator(name)(*arguments)
    return found if isinstance(found, tuple) else (found,)


def plain_results(name: str, arguments: list) -> tuple[Tensor, ...]:
    """The same from oracle.py."""
    found = PLAIN.get(name, getattr(oracle, name, None))(*arguments)
    return found if isinstance(found, tuple) else (found,)


def plain_softmax_attention(sums: Tensor, row_scales: Tensor, bias: Tensor, tokens: int, heads: int) -> Tensor:
    return oracle.softmax_attention(oracle.rescale(sums, row_scales, bias, None, None), tokens, heads)


def plain_project_and_attend(bits, panels, scale, bias, tokens, heads, threshold) -> Tensor:
    projected = oracle.linear(bits, panels, len(threshold), scale, bias, None)
    return oracle.linear_attention(projected, tokens, heads, threshold)


def plain_project_and_transform(bits, proj, residual, norm, eps, fc1, fc2) -> Tensor:
    weight, bias, threshold = norm
    width, hidden = len(weight), len(fc1[1])
    x = oracle.linear(bits, proj[0], width, *proj[1:], residual)
    inner = oracle.linear_to_bits(oracle.layer_norm_pack(x, weight, bias, eps, threshold), fc1[0], width, *fc1[1:])
    return oracle.linear(inner, fc2[0], hidden, *fc2[1:], x)


PLAIN = {  # of those that are more than one function of oracle.py
    "softmax_attention": plain_softmax_attention,
    "project_and_attend": plain_project_and_attend,
    "project_and_transform": plain_project_and_transform,
}


def spread(tensor: Tensor) -> Tensor:
    """An equal tensor with gaps in memory."""
    gaps = torch.full((*tensor.shape, 2), 77, dtype=tensor.dtype)
    gaps[..., 0] = tensor
    return gaps[..., 0]


def test_paths_have_the_numbers_of_the_library():
    assert kernel_cases.PATHS == library.PATHS
    for best, names in kernel_cases.PATHS_OF_BEST.items():
        assert library.PATHS[names[0]] == best
        assert library._INCLUDES[names[0]] == names


@pytest.mark.parametrize("case", kernel_cases.CASES_FOR_C, ids=lambda case: case.__name__)
@pytest.mark.parametrize("path", library.PATHS)
def test_c_is_the_plain_formula(kernels, path, case):
    if path not in available_paths(kernels):
        pytest.skip(f"this CPU has no {path}")
    for threads in kernel_cases.THREADS:
        on_path = kernel_cases.CKernels(kernels, path, threads)
        if case.__name__.startswith("softmax") and not on_path.has_softmax_attention:
            pytest.skip(f"{path} has no softmax attention here")
        case(on_path)


@pytest.mark.parametrize("case", kernel_cases.CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("with_c", [True, False], ids=["C", "torch"])
def test_operators_are_the_plain_formula(monkeypatch, with_c, case):
    if not with_c:
        engine.use_kernels(None)
    for name, few in FEWER_SIZES.items():
        monkeypatch.setattr(kernel_cases, name, few)
    case(TorchKernels())


def check_agreement(name: str) -> None:
    """That an operator returns what oracle.py does: equal bits, bytes that differ by at most one, floats up to rounding."""
    arguments = example(name)
    for found, expected in zip(results(name, arguments), plain_results(name, arguments), strict=True):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        if found.dtype == torch.int32:
            assert torch.equal(found, expected)
        elif found.dtype == torch.uint8:
            assert (found.int() - expected.int()).abs().max() <= 1
        else:
            tolerance = 0.05 if name == "softmax_attention" else 1e-5  # its products may be bfloat16
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_with_plain_torch(kernels, name):
    check_agreement(name)


@pytest.mark.parametrize("name", OPERATORS)
def test_without_c_operators_are_plain_torch(name):
    engine.use_kernels(None)
    assert engine.describe_path() == "plain torch (no C compiler)"
    arguments = example(name)
    for found, expected in zip(results(name, arguments), plain_results(name, arguments), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        *(("linear", (5,)), ("rescale", (3, 4)), ("rescale", (4,))),
        *(("prototype_attention", (3, 4, 5)), ("linear_attention", (3,)), ("project_and_transform", (2,))),
    ],
)
def test_arguments_that_may_be_absent(kernels, name, absent):
    arguments = [None if index in absent else value for index, value in enumerate(example(name))]
    for found, expected in zip(results(name, arguments), plain_results(name, arguments), strict=True):
        torch.testing.assert_close(found, expected)


WRONG_SHAPES = {  # by place in the arguments, those of lists counted singly
    "pack": {0: [(ROWS, INPUTS - 1), (ROWS, 1), (INPUTS,), (2, ROWS, INPUTS)], 1: [(INPUTS + 1,), (1,), (1, INPUTS)]},
    "layer_norm_pack": {0: [(ROWS, INPUTS - 1), (INPUTS,)], **{index: [(INPUTS - 1,), (1,)] for index in (1, 2, 4)}},
    "linear": {
        0: [(ROWS, 3), (ROWS, 2), (4,)],
        1: [(1, 4, 32), (3, 4, 32), (2, 3, 32), (2, 4, 16), (2, 4)],
        3: [(OUTPUTS - 1,), (1, OUTPUTS)],
        4: [(OUTPUTS - 1,), (1,)],
        5: [(ROWS - 1, OUTPUTS), (OUTPUTS,), (1, OUTPUTS)],
    },
    "linear_to_bits": {0: [(ROWS, 3)], 1: [(1, 4, 32)], 3: [(OUTPUTS - 1,), (1,)], 4: [(OUTPUTS - 1,), (1,)]},
    "prototype_attention": {
        0: [(2, TOKENS, 159), (1, TOKENS, 160), (TOKENS, 160)],
        1: [(2, 6, 160), (1, 6, 320), (6, 320)],
        2: [(HEADS + 1,), (HEADS - 1,), (HEADS, 1, 1)],
        **{index: [(HEADS + 1,), (1,), (HEADS, 1, 1)] for index in (3, 4, 5)},
        6: [(159,), (1,), (1, 160)],
    },
    "linear_attention": {0: [(ROWS, 479), (ROWS - 1, 480), (480,), (2, 35, 480), (ROWS, 0)], 3: [(159,), (1,), (1, 160)]},
    "project_and_attend": {
        0: [(ROWS, 5), (ROWS, 4), (ROWS - 1, 6), (6,)],
        1: [(14, 6, 32), (15, 5, 32), (15, 6, 16), (5, 6, 32), (15, 6)],
        **{index: [(479,), (160,), (1, 480)] for index in (2, 3)},
        6: [(159,), (1,), (0,), (1, 160), (160, 2)],
    },
    "project_and_transform": {
        0: [(ROWS, 3), (ROWS, 2), (4,)],
        1: [(2, 4, 32), (3, 3, 32), (3, 4, 16), (3, 4)],
        **{index: [(INPUTS - 1,), (1,), (1, INPUTS)] for index in (2, 3, 5, 6, 7, 12, 13)},
        4: [(ROWS - 1, INPUTS), (ROWS, 1), (INPUTS,), (1, INPUTS)],
        9: [(1, 4, 32), (3, 4, 32), (2, 2, 32), (2, 4)],
        **{index: [(OUTPUTS - 1,), (1,), (1, OUTPUTS), (65,)] for index in (10, 11)},
    },
    "quantize": {0: [(INPUTS,), (2, ROWS, INPUTS)]},
    "layer_norm_quantize": {0: [(ROWS, INPUTS - 1), (INPUTS,)], 1: [(INPUTS + 1,), (1,)], 2: [(INPUTS + 1,), (1,)]},
    "gelu_quantize": {0: [(ROWS, INPUTS - 1), (INPUTS,)], 1: [(ROWS - 1,), (1,), (ROWS, 1)], 2: [(INPUTS - 1,), (1,)]},
    "rescale": {
        0: [(ROWS, INPUTS - 1), (INPUTS,)],
        1: [(ROWS - 1,), (1,), (ROWS, 1)],
        2: [(INPUTS - 1,), (1,)],
        3: [(INPUTS - 1,), (1,)],
        4: [(ROWS - 1, INPUTS), (INPUTS,)],
    },
    "softmax_attention": {0: [(ROWS, 479), (ROWS - 1, 480), (480,)], 1: [(ROWS - 1,), (1,)], 2: [(479,), (160,)]},
}


@pytest.mark.parametrize("with_c", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize(
    ("name", "index", "shape"),
    [(name, index, shape) for name in OPERATORS for index, shapes in WRONG_SHAPES[name].items() for shape in shapes],
)
def test_wrong_shapes_are_refused(name, index, shape, with_c):
    if not with_c:
        engine.use_kernels(None)
    values, structure = tree_flatten(example(name))
    values[index] = torch.zeros(shape, dtype=values[index].dtype)
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        results(name, tree_unflatten(values, structure))


@pytest.mark.parametrize(("tokens", "heads"), [(TOKENS - 1, HEADS), (TOKENS, HEADS + 2), (0, HEADS), (TOKENS, 0)])
@pytest.mark.parametrize(("name", "place"), [("softmax_attention", 3), ("linear_attention", 1), ("project_and_attend", 4)])
def test_attention_refuses_numbers_that_do_not_divide(name, place, tokens, heads):
    arguments = example(name)
    arguments[place : place + 2] = tokens, heads
    with pytest.raises(ValueError, match=f"{tokens} tokens|{heads} heads"):
        results(name, arguments)


@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_with_gaps_in_memory(kernels, name):
    arguments = example(name)
    dense = results(name, arguments)
    values, structure = tree_flatten(arguments)
    for index, value in enumerate(values):
        if isinstance(value, Tensor):
            for apart in (spread(value), value.T.contiguous().T if value.ndim == 2 else spread(value)):
                found = results(name, tree_unflatten([*values[:index], apart, *values[index + 1 :]], structure))
                assert all(map(torch.equal, found, dense)), index


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_register_with_torch(name):
    torch.library.opcheck(getattr(torch.ops.binaryad, name).default, tuple(example(name)))


class EveryOperator(nn.Module):
    """Calls each operator once."""

    def forward(self, arguments: list[list]) -> list[tuple[Tensor, ...]]:
        return [results(name, values) for name, values in zip(OPERATORS, arguments, strict=True)]


def operator_nodes(graph: torch.fx.Graph) -> list[str]:
    """Names of all operators in a graph but those that only take tuples apart."""
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    return [target for target in targets if "getitem" not in target]


def test_each_operator_is_one_node_of_an_exported_program():
    arguments = [example(name) for name in OPERATORS]
    program = torch.export.export(EveryOperator(), (arguments,))
    assert operator_nodes(program.graph) == [f"binaryad.{name}.default" for name in OPERATORS]
    for found, expected in zip(program.module()(arguments), EveryOperator()(arguments), strict=True):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_each_operator_is_one_node_of_a_trace(mode):
    graph = make_fx(EveryOperator(), tracing_mode=mode)([example(name) for name in OPERATORS]).graph
    found = operator_nodes(graph)
    assert [target for target in found if "binaryad" in target] == [f"binaryad.{name}.default" for name in OPERATORS]
    assert {target.split(".")[0] for target in found} <= {"binaryad", "aten"}


@pytest.mark.parametrize("name", OPERATORS)
def test_threads_change_nothing(kernels, name):
    arguments = example(name)
    torch.set_num_threads(1)
    alone = results(name, arguments)
    torch.set_num_threads(2)
    assert all(map(torch.equal, results(name, arguments), alone))


@pytest.mark.parametrize(("compiled_with_threads", "threads"), [(True, 2), (False, 1)])
def test_c_gets_path_and_threads_first(compiled_with_threads, threads):
    calls = []
    fake = SimpleNamespace(
        binaryad_has_threads=lambda: compiled_with_threads, binaryad_any=lambda *arguments: calls.append(arguments)
    )
    torch.set_num_threads(2)
    engine.Kernels(fake, "scalar").call("any", None)
    assert calls == [(library.PATHS["scalar"], threads, None)]


@pytest.mark.parametrize("wrong", [torch.float64, torch.float16, torch.int64])
def test_c_gets_no_type_that_it_does_not_know(kernels, wrong):
    with pytest.raises(TypeError, match=str(wrong)):
        int8_operations.quantize(torch.ones(3, 4, dtype=wrong))


def script(path: Path, text: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


def test_a_library_is_compiled_once(compiler, tmp_path):
    folder = tmp_path / "new" / "cache"
    first = compile_library(compiler, folder, UNOPTIMISED)
    before = first.stat()
    assert compile_library(compiler, folder, UNOPTIMISED) == first
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert list(folder.iterdir()) == [first]
    assert ctypes.CDLL(str(first)).binaryad_best_isa() in library.PATHS.values()


def test_other_flags_compilers_and_sources_are_other_libraries(compiler, tmp_path, monkeypatch):
    log = tmp_path / "log"
    text = f'[ "$1" = --version ] || echo run >> {log}\nexec {compiler} "$@" -O0'
    another = script(tmp_path / "another", text.replace("exec", '[ "$1" != --version ] || echo another version\nexec'))
    folder, wrapped = tmp_path / "cache", script(tmp_path / "compiler", text)
    changed = [tmp_path / source.name for source in library.SOURCES]
    for source, copy in zip(library.SOURCES, changed, strict=True):
        copy.write_bytes(source.read_bytes())
    changed[-1].write_text(changed[-1].read_text() + "/* changed */")
    found = {compile_library(wrapped, folder), compile_library(wrapped, folder, ["-DX"]), compile_library(another, folder)}
    found.add(compile_library(wrapped, folder, libraries=["-lc"]))
    monkeypatch.setattr(library, "SOURCES", changed)
    found.add(compile_library(wrapped, folder))
    assert found == set(folder.iterdir())
    assert len(found) == len(log.read_text().split()) == 5


def test_two_processes_may_compile_at_once(compiler, tmp_path):
    barrier, cache = tmp_path / "barrier", tmp_path / "cache"
    barrier.mkdir()
    waiting = f"""
for word; do [ "$word" = -o ] && touch {barrier}/$$; done
for i in $(seq 600); do [ "$1" = --version ] || [ $(ls {barrier} | wc -l) -ge 2 ] && break; sleep 0.1; done
exec {compiler} "$@" -O0"""
    environment = {"CC": script(tmp_path / "compiler", waiting), "BINARYAD_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    code = """
import torch
from binarize.kernels import engine, operations

print(operations.pack(torch.ones(1, 3), torch.zeros(3)).tolist(), engine.describe_path())
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert output.startswith("[[7, 0]] C kernels")
    assert len(list(barrier.iterdir())) >= 2  # a compiler without OpenMP is called once more
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert [path.name[:8] for path in cache.iterdir()] == ["kernels-"]


def test_a_compiler_that_fails(tmp_path):
    failing = script(tmp_path / "compiler", '[ "$1" = --version ] && exit 0\necho no room for bits >&2\nexit 1')
    with pytest.raises(CompilationError, match="failed: no room for bits"):
        compile_library(failing, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("text", [None, "exit 3"])
def test_a_compiler_that_does_not_run(tmp_path, text):
    path = tmp_path / "compiler"
    if text:
        script(path, text)
    with pytest.raises(CompilationError, match=f"{path} does not run"):
        compile_library(str(path), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def result_and_warnings(caplog) -> list[str]:
    """Pack twice, check the bits, and return what was said."""
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert operations.pack(torch.tensor([[1.0, -1, 0, 2]]), torch.zeros(4)).tolist() == [[0b1101, 0]]
    return [record.getMessage() for record in caplog.records]


def test_without_a_compiler_torch_computes(forget, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert find_compiler() is None
    (warning,) = result_and_warnings(caplog)
    assert warning.startswith("no C compiler found")
    for name in OPERATORS:
        check_agreement(name)
    assert engine.describe_path() == "plain torch (no C compiler)"


def test_with_a_useless_compiler_torch_computes(forget, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CC", script(tmp_path / "compiler", "echo no room for bits >&2\n[ $1 = --version ]"))
    monkeypatch.setenv("BINARYAD_CACHE", str(tmp_path / "cache"))
    (warning,) = result_and_warnings(caplog)
    assert "cannot be used" in warning
    assert "no room for bits" in warning


def test_without_a_writable_cache_the_process_compiles_for_itself(forget, compiler, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("BINARYAD_CACHE", str(tmp_path / "file" / "cache"))
    (warning,) = [text for text in result_and_warnings(caplog) if not text.startswith("compiled without OpenMP")]
    assert "no cache for the kernels" in warning
    assert str(tmp_path / "file") in warning
    assert engine.kernels() is not None


def test_when_the_compiler_hangs_torch_computes(forget, compiler, tmp_path, monkeypatch, caplog):
    run = subprocess.run

    def run_out_of_time(command: list[str], **options):
        if "-o" in command:
            raise subprocess.TimeoutExpired(command, options["timeout"])
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", run_out_of_time)
    monkeypatch.setenv("BINARYAD_CACHE", str(tmp_path / "cache"))
    (warning,) = result_and_warnings(caplog)
    assert "timed out after 600 seconds" in warning
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_openmp_one_thread_computes(forget, compiler, tmp_path, monkeypatch, caplog):
    refusing = f'case "$*" in *-fopenmp*) echo no OpenMP here >&2; exit 1;; esac\nexec {compiler} "$@" -O0'
    monkeypatch.setenv("CC", script(tmp_path / "compiler", refusing))
    monkeypatch.setenv("BINARYAD_CACHE", str(tmp_path / "cache"))
    (warning,) = result_and_warnings(caplog)
    assert warning.startswith("compiled without OpenMP")
    assert "no OpenMP here" in warning
    assert not load_library().binaryad_has_threads()
    for name in OPERATORS:
        check_agreement(name)


def test_the_cache_is_where_the_variables_say(monkeypatch):
    monkeypatch.setenv("BINARYAD_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert library.cache_folder() == Path("/a")
    monkeypatch.delenv("BINARYAD_CACHE")
    assert library.cache_folder() == Path("/b/binaryad")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert library.cache_folder() == Path("/c/.cache/binaryad")


def test_a_path_can_be_chosen(kernels, forget, monkeypatch):
    available = available_paths(kernels)
    for path in available:
        monkeypatch.setenv("BINARYAD_ISA", path)
        forget()
        assert engine.describe_path() == f"C kernels, {path}"
    monkeypatch.setenv("BINARYAD_ISA", "")
    assert chosen_path(kernels) == available[0]


@pytest.mark.parametrize("wanted", ["sse9", "SCALAR", "neon", "avx2"])
def test_a_path_that_does_not_run_here(kernels, forget, monkeypatch, wanted):
    available = available_paths(kernels)
    if wanted in available:
        pytest.skip(f"this CPU has {wanted}")
    monkeypatch.setenv("BINARYAD_ISA", wanted)
    with pytest.raises(UserError, match=f"BINARYAD_ISA='{wanted}' does not run on this CPU; choose from {' '.join(available)}"):
        operations.pack(torch.ones(1, 3), torch.zeros(3))


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o766])
def test_a_library_that_others_may_write_is_not_trusted(compiler, tmp_path, mode):
    path = compile_library(compiler, tmp_path, UNOPTIMISED)
    path.write_bytes(b"malicious")
    path.chmod(mode)
    assert compile_library(compiler, tmp_path, UNOPTIMISED) == path
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_a_library_of_another_user_is_not_trusted(compiler, tmp_path):
    path = compile_library(compiler, tmp_path, UNOPTIMISED)
    path.write_bytes(b"malicious")
    os.chown(path, 12345, -1)
    assert compile_library(compiler, tmp_path, UNOPTIMISED) == path
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert path.stat().st_uid == 0


def test_a_permissive_file_mask_does_not_spoil_the_library(compiler, tmp_path):
    # some linkers do not write into the file they are given, but replace it by one with the mode that the mask allows
    replacing = f"""
out=; for word; do [ "$out" = next ] && out=$word; [ "$word" = -o ] && out=next; done
{compiler} "$@" -O0 || exit
[ -z "$out" ] || chmod 775 "$out\""""
    wrapped = script(tmp_path / "compiler", replacing)
    path = compile_library(wrapped, tmp_path / "cache")
    before = path.stat().st_ino
    assert compile_library(wrapped, tmp_path / "cache").stat().st_ino == before
