"""Every argument of every operator in C: of another type, dimension, size, memory layout, empty or enormous.

Whatever does not fit is refused by the operator's name before C is entered. Wrong shapes by hand are in test_kernels.py.
"""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from binarize.kernels import engine
from binarize.kernels.argument_types import SIGNATURES
from binarize.kernels.library import load_library
from common.c_arguments import MOST_ELEMENTS, Argument, Signature
from common.errors import UserError
from models import scan_compiled
from models.scan_compiled import CompiledScan
from models.selective_scan import selective_scan
from tests.test_kernels import HEADS, INPUTS, OPERATORS, ROWS, TOKENS, operator, plain_results, results, spread
from tests.test_kernels import example as example_of_kernel
from tests.test_selective_scan import example as example_of_scan

REPOSITORY = Path(__file__).resolve().parent.parent
FORWARD, BACKWARD = "selective scan in C", "gradients of the selective scan in C"
ALL = [*OPERATORS, FORWARD, BACKWARD]
FLOATS = (torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int64)
ANY_FLOAT = {("pack", "x"), ("layer_norm_pack", "x"), ("linear", "residual"), ("project_and_transform", "residual")}
IN_BITS = {"bits", "panels", "low", "span", "proj panels", "fc1 panels", "fc1 low", "fc1 span", "fc2 panels"}
FREE = {  # no other argument has these dimensions
    *(("pack", "x", 0), ("layer_norm_pack", "x", 0), ("layer_norm_quantize", "x", 0), ("quantize", "x", 0)),
    *(("quantize", "x", 1), ("linear_to_bits", "bits", 0)),
    *(("prototype_attention", "query", 1), ("prototype_attention", "projected", 1)),
}
IN_IMAGES = {("linear_attention", "projected", 0), ("project_and_attend", "bits", 0)}  # as many as there are, or none
HUGE = 2**31


@pytest.fixture
def kernels():
    """Skip where there is no C compiler."""
    if load_library() is None:
        pytest.skip("there is no C compiler")


@pytest.fixture(params=[True, False], ids=["C", "torch"])
def with_and_without_c(request):
    """The operators in C and in plain torch; the choice is restored."""
    before = list(engine._kernels)
    if not request.param:
        engine.use_kernels(None)
    yield
    engine._kernels[:] = before


@pytest.fixture
def no_c(kernels, monkeypatch):
    """C must not be entered."""

    def entered(*_) -> None:
        raise AssertionError("C was entered")

    monkeypatch.setattr(engine.Kernels, "call", entered)
    monkeypatch.setattr(scan_compiled, "_call", entered)


def signature(name: str) -> Signature:
    return {**SIGNATURES, FORWARD: scan_compiled._FORWARD, BACKWARD: scan_compiled._BACKWARD}[name]


def subject(name: str) -> tuple[list[Tensor], Callable[[list[Tensor | None]], object]]:
    """Fitting tensors in the order of the signature, and what calls the operator with others."""
    if name in OPERATORS:
        values, structure = tree_flatten(example_of_kernel(name))
        places = [place for place, value in enumerate(values) if isinstance(value, Tensor)]

        def call(tensors: list[Tensor | None]) -> tuple[Tensor, ...]:
            replaced = list(values)
            for place, value in zip(places, tensors, strict=True):
                replaced[place] = value
            return results(name, tree_unflatten(replaced, structure))

        return [values[place] for place in places], call
    tensors = [values.float() for values in example_of_scan(33, 16)]
    if name == FORWARD:
        return tensors, lambda values: (CompiledScan.apply(True, *values),)
    images, directions, length, channels = tensors[0].shape
    states = scan_compiled.load_library().scan_starts(*map(scan_compiled.c_int64, (length, channels, 16)))
    starts, gradient = torch.zeros(images * directions, states), torch.ones_like(tensors[0])
    return [*tensors, starts, gradient], lambda values: CompiledScan.backward(
        SimpleNamespace(saved_tensors=tuple(values[:-1])), values[-1]
    )


def arguments_of(name: str) -> list[tuple[int, Argument]]:
    return list(enumerate(signature(name).arguments))


def arguments() -> list:
    """Operator and place of every argument."""
    return [
        pytest.param(name, place, id=f"{name}-{argument.name}".replace(" ", "_"))
        for name in ALL
        for place, argument in arguments_of(name)
    ]


def replaced(values: list[Tensor], place: int, value: Tensor | None) -> list[Tensor | None]:
    return [*values[:place], value, *values[place + 1 :]]


def huge(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros in the memory of one number."""
    return torch.zeros((), dtype=dtype).expand(shape)


def refused(name: str, text: str, error: type[Exception] = ValueError):
    return pytest.raises(error, match=f"^{re.escape(name)}: .*{text}")


def test_every_function_in_c_has_a_signature():
    text = "".join(path.read_text() for path in (REPOSITORY / "binarize" / "kernels").glob("*.py"))
    called = set(re.findall(r'c\.call\(\s*"(\w+)"', text))
    exported = (REPOSITORY / "binarize" / "kernels" / "kernels.c").read_text()
    taking_arrays = set(re.findall(r"^(?:void|int) binaryad_(\w+)\([^)]*\*", exported, re.MULTILINE))
    registered = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "binaryad::" in name}
    assert called == taking_arrays == registered == SIGNATURES.keys() == set(OPERATORS)
    scan = (REPOSITORY / "models" / "scan_kernel.c").read_text()
    assert set(re.findall(r"^(?:void|int|int64_t) scan_(\w+)\([^)]*\*", scan, re.MULTILINE)) == {"forward", "backward"}


@pytest.mark.parametrize("name", ALL)
def test_arguments_are_checked_before_c_is_entered(kernels, monkeypatch, name):
    events, check, call, scan_call = [], Signature.check, engine.Kernels.call, scan_compiled._call

    def record_check(self, *values, **numbers):
        events.append(("checked", self.operator))
        return check(self, *values, **numbers)

    def record_call(self, function, *values):
        events.append(("C", function))
        return call(self, function, *values)

    def record_scan(function, *values):
        events.append(("C", function))
        return scan_call(function, *values)

    monkeypatch.setattr(Signature, "check", record_check)
    monkeypatch.setattr(engine.Kernels, "call", record_call)
    monkeypatch.setattr(scan_compiled, "_call", record_scan)
    values, run = subject(name)
    run(values)
    in_c = {FORWARD: "scan_forward", BACKWARD: "scan_backward"}.get(name, name)
    if name == "softmax_attention" and not engine.kernels().has_softmax_attention:
        in_c = "rescale"  # the rest is torch's
    assert events[0] == ("checked", name)
    assert events[-1] == ("C", in_c)


@pytest.mark.parametrize(("name", "place"), arguments())
def test_types_that_c_does_not_read(no_c, with_and_without_c, name, place):
    values, run = subject(name)
    argument = signature(name).arguments[place].name
    other = torch.float32 if argument in IN_BITS else torch.int32
    for dtype in (other, *(() if (name, argument) in ANY_FLOAT else FLOATS), *INTEGERS):
        with refused(name, f"{argument} is {dtype}, expected", TypeError):
            run(replaced(values, place, torch.zeros(values[place].shape, dtype=dtype)))


@pytest.mark.parametrize(("name", "place"), arguments())
def test_other_dimensions(no_c, name, place):
    values, run = subject(name)
    value, argument = values[place], signature(name).arguments[place].name
    for wrong in (value[None], value[..., None], value[0], value.flatten() if value.ndim > 1 else value[None, None]):
        with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(str(tuple(wrong.shape)))}") as caught:
            run(replaced(values, place, wrong))
        assert argument in str(caught.value) or "rows are not queries" in str(caught.value)


@pytest.mark.parametrize(("name", "place"), arguments())
def test_other_sizes(no_c, name, place):
    values, run = subject(name)
    value, argument = values[place], signature(name).arguments[place].name
    for dimension, size in enumerate(value.shape):
        if (name, argument, dimension) in FREE:
            continue
        whole = () if (name, argument, dimension) in IN_IMAGES else (0, 2 * size)
        for other in (size - 1, size + 1, *whole):
            shape = (*value.shape[:dimension], other, *value.shape[dimension + 1 :])
            with refused(name, re.escape(str(shape))):
                run(replaced(values, place, torch.zeros(shape, dtype=value.dtype)))


@pytest.mark.parametrize(("name", "argument", "dimension"), sorted(FREE))
def test_sizes_that_are_free(kernels, name, argument, dimension):
    values, run = subject(name)
    place = [part.name for part in signature(name).arguments].index(argument)
    shorter = values[place].narrow(dimension, 0, values[place].shape[dimension] - 1)
    for found in run(replaced(values, place, shorter)):
        assert not found.is_floating_point() or not found.isnan().any()


@pytest.mark.parametrize(("name", "place"), arguments())
def test_any_place_in_memory(kernels, name, place):
    values, run = subject(name)
    value = values[place]
    number = value.flatten()[0]
    values = replaced(values, place, number.expand(value.shape).contiguous())
    dense = run(values)
    same = values[place]
    others = {"one number": number.expand(value.shape), "gaps": spread(same), "negated": torch._neg_view(-same)}
    for what, other in others.items():
        assert not other.is_contiguous() or other.is_neg()
        if name == BACKWARD and place < len(values) - 1:
            continue  # kept by the forward pass, dense
        for found, expected in zip(run(replaced(values, place, other)), dense, strict=True):
            assert found is expected is None or torch.equal(found, expected), what


@pytest.mark.parametrize(("name", "place"), arguments())
def test_tensors_without_memory_of_their_own(no_c, name, place):
    values, run = subject(name)
    argument = signature(name).arguments[place].name
    with refused(name, f"{argument} is sparse, or of a class that may have no numbers in memory"):
        run(replaced(values, place, values[place].to_sparse()))


@pytest.mark.parametrize(("name", "place"), arguments())
def test_enormous_arguments(no_c, name, place):
    values, run = subject(name)
    value = values[place]
    for dimension in range(value.ndim):
        shape = (*value.shape[:dimension], HUGE, *value.shape[dimension + 1 :])
        with refused(name, str(HUGE)):
            run(replaced(values, place, huge(*shape, dtype=value.dtype)))


def words(rows: int, count: int) -> Tensor:
    return huge(rows, count, dtype=torch.int32)


def panels(count: int, number_of_words: int) -> Tensor:
    return huge(count, number_of_words, 32, dtype=torch.int32)


MANY = 2**25
TOO_LARGE = {  # sizes that fit together, but some array has 2^31 elements
    "pack": [(huge(MANY, 64), huge(64)), (huge(HUGE, 1), huge(1))],
    "layer_norm_pack": [(huge(MANY, 64), huge(64), huge(64), 1e-6, huge(64))],
    "linear": [
        (words(MANY, 2), panels(2, 2), 64, huge(64), huge(64), None),
        (words(1, 2**17), panels(2**12, 2**17), 2**22, huge(2**17), huge(2**17), None),
    ],
    "linear_to_bits": [(words(2**30, 2), panels(1, 2), 64, *(huge(32, dtype=torch.int32) for _ in range(2)))],
    "prototype_attention": [
        (huge(2**20, 1, 128), huge(2**20, 17, 256), huge(1), None, None, None, huge(128)),
        (huge(2**20, 64, 64), huge(2**20, 1, 128), huge(1), None, None, None, huge(64)),
        (huge(2**19, 1, 128), huge(2**19, 17, 256), huge(1), None, None, None, huge(128)),  # keys alone are too many
    ],
    "linear_attention": [(huge(MANY, 96), 64, 1, None), (huge(2**14, 3 * 4096), 1, 1, None)],  # the sums alone
    "project_and_attend": [(words(MANY, 2), panels(3, 2), huge(96), huge(96), 64, 1, huge(32))],
    "project_and_transform": [
        (
            *(words(MANY, 2), [panels(2, 2), huge(64), huge(64)], None, [huge(64)] * 3, 1e-6),
            *([panels(1, 2), *[huge(32, dtype=torch.int32)] * 2], [panels(2, 2), huge(64), huge(64)]),
        )
    ],
    "quantize": [(huge(MANY, 64),)],
    "layer_norm_quantize": [(huge(MANY, 64), huge(64), huge(64), 1e-6)],
    "gelu_quantize": [(huge(MANY, 64), huge(MANY), huge(64))],
    "rescale": [(huge(MANY, 64), huge(MANY), huge(64), None, None)],
    "softmax_attention": [(huge(MANY, 96), huge(MANY), huge(96), 1, 1)],
}


@pytest.mark.parametrize(("name", "number"), [(name, number) for name in OPERATORS for number in range(len(TOO_LARGE[name]))])
def test_sizes_that_fit_but_are_too_many(no_c, with_and_without_c, name, number):
    with refused(name, f"at most {MOST_ELEMENTS} are possible"):
        results(name, list(TOO_LARGE[name][number]))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("length", "channels", "states"), [(2**20, 512, 16), (2**20, 32, 512), (2**20, 17, 256)])
def test_scans_that_are_too_long(no_c, monkeypatch, length, channels, states, keep):
    sequence = (1, 4, length)
    monkeypatch.setattr(torch, "empty_like", lambda values: values)
    shapes = [(*sequence, channels)] * 2 + [(4, channels, states)] + [(*sequence, states)] * 2 + [(4, channels)]
    monkeypatch.setattr(Tensor, "contiguous", lambda self: self)  # needs the memory
    if states == 256 and not keep:
        with pytest.raises(AssertionError, match="C was entered"):  # only the states kept for gradients are too many
            CompiledScan.apply(keep, *(huge(*shape) for shape in shapes))
    else:
        with refused(FORWARD, f"at most {MOST_ELEMENTS} are possible"):
            CompiledScan.apply(keep, *(huge(*shape) for shape in shapes))


def test_the_limit_itself_is_possible():
    rows = Signature("rows", (Argument("x", (torch.uint8,), ("rows", "columns")),), made=(("rows", "columns", 1),))
    assert rows.check(huge(MOST_ELEMENTS, 1, dtype=torch.uint8)) == {"rows": MOST_ELEMENTS, "columns": 1}
    with refused("rows", f"x has {HUGE} elements"):
        rows.check(huge(HUGE, 1, dtype=torch.uint8))


def test_devices_and_absent_arguments():
    pack = SIGNATURES["pack"]
    with refused("pack", "all must be on one device, but x on cpu, threshold on meta"):
        pack.check(torch.ones(3, 4), torch.ones(4, device="meta"))
    with refused("pack", "threshold is missing", TypeError):
        pack.check(torch.ones(3, 4), None)
    assert pack.check(torch.ones(3, 4, device="meta").half(), torch.ones(4, device="meta").half())["words"] == 2


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "prototype_attention"])
def test_no_rows_give_no_rows(kernels, with_and_without_c, name):
    values, structure = tree_flatten(example_of_kernel(name))
    by_row = {place for place, value in enumerate(values) if isinstance(value, Tensor) and len(value) == ROWS}
    values = [value[:0] if place in by_row else value for place, value in enumerate(values)]
    empty = tree_unflatten(values, structure)
    for found, expected in zip(results(name, empty), plain_results(name, empty), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert found.shape[0] == 0


@pytest.mark.parametrize("dimension", [0, 1])
def test_attention_without_images_or_tokens(kernels, with_and_without_c, dimension):
    query, projected, *rest = example_of_kernel("prototype_attention")
    query = query.narrow(dimension, 0, 0)
    projected = projected[:0] if dimension == 0 else projected
    assert operator("prototype_attention")(query, projected, *rest).shape == (0, 6)


NOTHING = {  # all sizes fit together, but there are no columns, outputs, prototypes, heads or channels
    "pack": [(huge(3, 0), huge(0))],
    "layer_norm_pack": [(huge(3, 0), huge(0), huge(0), 1e-6, huge(0))],
    "linear": [
        (words(3, 0), panels(1, 0), 0, huge(5), huge(5), None),
        (words(3, 0), panels(1, 0), -5, huge(5), huge(5), None),
        (words(3, 2), panels(0, 2), 5, huge(0), huge(0), None),
    ],
    "linear_to_bits": [(words(3, 2), panels(0, 2), 5, *(huge(0, dtype=torch.int32) for _ in range(2)))],
    "prototype_attention": [
        (huge(2, 3, 8), huge(2, 0, 16), huge(2), None, None, None, huge(8)),
        (huge(2, 3, 8), huge(2, 4, 16), huge(0), None, None, None, huge(8)),
        (huge(2, 3, 0), huge(2, 4, 0), huge(2), None, None, None, huge(0)),
    ],
    "linear_attention": [(huge(6, 0), 3, 2, None)],
    "project_and_attend": [(words(6, 0), panels(0, 0), huge(0), huge(0), 3, 2, huge(0))],
    "project_and_transform": [
        (
            *(words(3, 2), [panels(1, 2), huge(5), huge(5)], None, [huge(5)] * 3, 1e-6),
            *([panels(0, 2), *[huge(0, dtype=torch.int32)] * 2], [panels(1, 0), huge(5), huge(5)]),
        )
    ],
    "quantize": [(huge(3, 0),)],
    "layer_norm_quantize": [(huge(3, 0), huge(0), huge(0), 1e-6)],
    "gelu_quantize": [(huge(3, 0), huge(3), huge(0))],
    "rescale": [(huge(3, 0), huge(3), huge(0), None, None)],
    "softmax_attention": [(huge(6, 0), huge(6), huge(0), 3, 2)],
}


@pytest.mark.parametrize(("name", "number"), [(name, number) for name in OPERATORS for number in range(len(NOTHING[name]))])
def test_nothing_to_compute_from_is_refused(no_c, with_and_without_c, name, number):
    with refused(name, "expected at least 1"):
        results(name, list(NOTHING[name][number]))


@pytest.mark.parametrize("number", [0, -1, -TOKENS, 2**40, -(2**63)])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(("name", "first"), [("softmax_attention", 3), ("linear_attention", 1), ("project_and_attend", 4)])
def test_numbers_of_tokens_and_heads(no_c, name, first, place, number):
    values = example_of_kernel(name)
    values[first + place] = number
    with refused(name, "tokens"):
        results(name, values)


@pytest.mark.parametrize("inputs", [0, -1, -INPUTS, 64, 129, 2**32 + INPUTS, 2**62])
@pytest.mark.parametrize("name", ["linear", "linear_to_bits"])
def test_numbers_of_inputs(no_c, name, inputs):
    values = example_of_kernel(name)
    values[2] = inputs
    with refused(name, ""):
        results(name, values)


@pytest.mark.parametrize("place", [1, 3, 5, 6])
def test_layers_of_other_than_three_tensors(no_c, place):
    for count in (0, 2, 4):
        values = example_of_kernel("project_and_transform")
        values[place] = (values[place] * 2)[:count]
        with refused("project_and_transform", "three tensors"):
            results("project_and_transform", values)


def test_gates_that_lack_one_part(no_c):
    for place in (4, 5):
        values = example_of_kernel("prototype_attention")
        values[place] = None
        with refused("prototype_attention", "only one of slope and middle"):
            results("prototype_attention", values)
    values = example_of_kernel("prototype_attention")
    values[2:6] = [huge(HEADS + 2)] * 4  # 160 channels are not 7 heads
    with refused("prototype_attention", "gates are not for 160 channels"):
        results("prototype_attention", values)


@pytest.mark.parametrize("name", ["linear", "project_and_transform", "rescale", "softmax_attention"])
def test_gradients_are_refused_not_lost(kernels, with_and_without_c, name):
    values, run = subject(name)
    place = next(place for place, value in enumerate(values) if value.is_floating_point())
    outputs = run(replaced(values, place, values[place].clone().requires_grad_()))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        outputs[0].sum().backward()


def test_tensors_changed_before_their_gradients(no_c, monkeypatch):
    monkeypatch.setattr(scan_compiled, "_call", lambda *_: None)
    tensors = [values.float().requires_grad_() for values in example_of_scan(5, 6, channels=3)]
    outputs = selective_scan(*tensors, backend="compiled")
    with torch.no_grad():
        tensors[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs.sum().backward()


@pytest.mark.parametrize("place", range(6))
def test_scans_of_negated_tensors(kernels, place):
    tensors = [values.float() for values in example_of_scan(7, 16)]
    expected = selective_scan(*tensors, backend="compiled")
    negated = replaced(tensors, place, torch._neg_view(-tensors[place]))
    assert torch.equal(selective_scan(*negated, backend="compiled"), expected)


def test_scans_that_are_only_traced_run_in_torch(no_c):
    tensors = [values.float() for values in example_of_scan(7, 16)]
    with FakeTensorMode() as mode:
        traced = [mode.from_tensor(values) for values in tensors]
        assert selective_scan(*traced).shape == tensors[0].shape
        with pytest.raises((ValueError, UserError), match="selective scan in C: inputs is sparse, or of a class"):
            selective_scan(*traced, backend="compiled")


def test_c_itself_is_given_no_unknown_type(kernels):
    for value in (torch.ones(3, dtype=torch.float64), torch.ones(3, device="meta")):
        with pytest.raises(TypeError, match=f"not {value.dtype} on {value.device}"):
            engine.kernels().call("pack", value)
