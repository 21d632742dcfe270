"""Fused stretches of decoder blocks: the same bits and bytes as the single operators, on every path, of every size.

The comparison with plain float64 formulas, also under a sanitizer, is in kernel_cases.py; refusals are in test_kernels.py.
"""

import itertools
from functools import cache

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from binarize.kernels import block_operations, engine, operations, oracle
from binarize.kernels.block_operations import project_and_attend, project_and_transform
from binarize.kernels.library import PATHS, available_paths, load_library
from common.errors import NumericError
from models.dinomaly import Dinomaly, DinomalyOptions
from models.encoder import FrozenEncoder
from models.inp_former import INPFormer
from tests.test_packed import trained_like
from utils.agreement import compare_on_bits, packed_copy
from utils.packed_model import PackingOptions

EPS = 0.25  # so much that it turns bits
ROWS = (0, 1, 5, 16, 17, 31, 32, 33, 261)
WIDTHS = (1, 32, 33, 64, 96, 100, 160, 384, 768)
SIZES = [(1, 1), (1, 5), (2, 16), (3, 17), (1, 31), (2, 32), (1, 33), (2, 261)]  # images, tokens
HEADS = [(1, 32), (3, 32), (2, 64), (12, 64), (1, 96), (4, 96), (3, 16), (5, 7)]  # heads, channels of each
FUSED = ["project_and_attend", "project_and_transform"]


@pytest.fixture(autouse=True)
def _restore():
    """Leave path and thread count as they were."""
    before, threads = engine.kernels(), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    engine.use_kernels(before)


@pytest.fixture(params=["torch", *PATHS])
def path(request):
    """Every way to compute that this machine has."""
    library = load_library()
    if request.param != "torch" and (library is None or request.param not in available_paths(library)):
        pytest.skip(f"the path {request.param} does not run here")
    engine.use_kernels(None if request.param == "torch" else engine.Kernels(library, request.param))
    return request.param


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """Names of the C functions that get called."""
    names, call = [], engine.Kernels.call

    def noted(kernels, name, *arguments):
        names.append(name)
        return call(kernels, name, *arguments)

    monkeypatch.setattr(engine.Kernels, "call", noted)
    return names


def random_bits(rows: int, features: int, generator: torch.Generator) -> Tensor:
    return oracle.pack_signs(torch.rand(rows, features, generator=generator) < 0.5)


def layer(outputs: int, inputs: int, generator: torch.Generator) -> list[Tensor]:
    """Panels, scale and bias of a binary layer whose outputs are about 1."""
    scale, bias = torch.randn(2, outputs, generator=generator)
    return [oracle.panels_of(random_bits(outputs, inputs, generator)), scale / inputs**0.5, bias]


@cache
def transform_arguments(rows: int, width: int, hidden: int) -> list:
    """Arguments of `project_and_transform`; a fifth of the hidden bits are the same for all rows."""
    generator = torch.Generator().manual_seed(rows + 1000 * width + hidden)
    kind = torch.arange(hidden) % 15
    low = torch.randint(0, width + 1, (hidden,), generator=generator)
    span = torch.randint(0, width // 2 + 1, (hidden,), generator=generator)
    low[kind == 3], span[kind == 3] = width + 1, 0
    low[kind == 7], span[kind == 7] = 0, width
    low[kind == 11], span[kind == 11] = 0, 2**31 - 1
    fc1 = [oracle.panels_of(random_bits(hidden, width, generator)), low.to(torch.int32), span.to(torch.int32)]
    residual = 2 * torch.randn(rows, width, generator=generator)
    norm = list(torch.randn(3, width, generator=generator))
    proj, fc2 = layer(width, width, generator), layer(width, hidden, generator)
    return [random_bits(rows, width, generator), proj, residual, norm, EPS, fc1, fc2]


def transform_singly(bits, proj, residual, norm, eps, fc1, fc2) -> Tensor:
    """What `project_and_transform` stands for."""
    weight, bias, threshold = norm
    width, hidden = len(threshold), len(fc1[1])
    x = operations.linear(bits, proj[0], width, *proj[1:], residual)
    normal = operations.layer_norm_pack(x, weight, bias, eps, threshold)
    return operations.linear(operations.linear_to_bits(normal, fc1[0], width, *fc1[1:]), fc2[0], hidden, *fc2[1:], x)


@cache
def attend_arguments(images: int, tokens: int, heads: int, d: int) -> list:
    """Arguments of `project_and_attend`."""
    generator = torch.Generator().manual_seed(images + 10 * tokens + 10000 * heads + d)
    width = heads * d
    projection = layer(3 * width, width, generator)
    threshold = torch.randn(width, generator=generator) / tokens**0.5
    return [random_bits(images * tokens, width, generator), *projection, tokens, heads, threshold]


def attend_singly(bits, panels, scale, bias, tokens, heads, threshold) -> Tensor:
    """What `project_and_attend` stands for."""
    projected = operations.linear(bits, panels, len(threshold), scale, bias, None)
    return operations.linear_attention(projected, tokens, heads, threshold)


# ---------------------------------------------------------------------------- the same as the single operators


@pytest.mark.parametrize("width", WIDTHS)
def test_transform_is_the_single_operators(path, called, width):
    widths_of_hidden = [4 * width] if width > 384 else [4 * width, 32, 40]
    for hidden, rows in itertools.product(widths_of_hidden, ROWS):
        arguments = transform_arguments(rows, width, hidden)
        for residual in (None, arguments[2]):
            arguments = [*arguments[:2], residual, *arguments[3:]]
            expected = transform_singly(*arguments)
            called.clear()
            assert torch.equal(project_and_transform(*arguments), expected), (hidden, rows, residual is None)
            assert called == ([] if path == "torch" else ["project_and_transform"])
            assert expected.isfinite().all()


@pytest.mark.parametrize(("heads", "d"), HEADS)
def test_attention_is_the_single_operators(path, called, heads, d):
    for images, tokens in SIZES:
        arguments = attend_arguments(images, tokens, heads, d)
        expected = attend_singly(*arguments)
        called.clear()
        assert torch.equal(project_and_attend(*arguments), expected), (images, tokens)
        names = ["project_and_attend"] if d % 32 == 0 else ["linear", "linear_attention"]
        assert called == ([] if path == "torch" else names)
        assert (expected != 0).any()


@pytest.mark.parametrize("sizes", [(1, 17, 3, 32), (3, 33, 2, 64), (2, 261, 4, 96)])
def test_neither_threads_nor_other_images_change_a_bit_of_attention(path, sizes):
    arguments, tokens = attend_arguments(*sizes), sizes[1]
    torch.set_num_threads(1)
    alone = project_and_attend(*arguments)
    assert torch.equal(project_and_attend(arguments[0][-tokens:], *arguments[1:]), alone[-tokens:])
    torch.set_num_threads(2)
    assert torch.equal(project_and_attend(*arguments), alone)


@pytest.mark.parametrize("sizes", [(17, 33, 132), (65, 96, 384), (261, 160, 40)])
def test_neither_threads_nor_other_rows_change_a_byte_of_transform(path, sizes):
    bits, proj, residual, *rest = transform_arguments(*sizes)
    torch.set_num_threads(1)
    alone = project_and_transform(bits, proj, residual, *rest)
    for chosen in (slice(1, None), slice(7, 8), slice(3, 40)):
        assert torch.equal(project_and_transform(bits[chosen], proj, residual[chosen], *rest), alone[chosen])
    torch.set_num_threads(2)
    assert torch.equal(project_and_transform(bits, proj, residual, *rest), alone)


@pytest.mark.parametrize(("low", "span", "sign"), [(101, 0, 1), (2**31 - 1, 0, 1), (0, 100, -1), (0, 2**31 - 1, -1)])
def test_hidden_bits_that_are_all_the_same(path, low, span, sign):
    """Then fc2 multiplies its weights' signs with +1 or -1, whatever comes before."""
    bits, proj, residual, norm, eps, fc1, (panels, scale, bias) = transform_arguments(33, 100, 40)
    interval = [torch.full((40,), value, dtype=torch.int32) for value in (low, span)]
    x = operations.linear(bits, proj[0], 100, *proj[1:], residual)
    weights = oracle.unpack_signs(oracle.bits_of_panels(panels, 100), 40)
    found = project_and_transform(bits, proj, residual, norm, eps, [fc1[0], *interval], [panels, scale, bias])
    torch.testing.assert_close(found, x + (sign * weights.sum(dim=1) * scale + bias), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_residual_of_another_type(path, kind):
    if path == "torch":
        pytest.skip("torch has its own rules for types")
    bits, proj, residual, *rest = transform_arguments(33, 96, 384)
    expected = project_and_transform(bits, proj, residual.to(kind).float(), *rest)
    assert torch.equal(project_and_transform(bits, proj, residual.to(kind), *rest), expected)


# ---------------------------------------------------------------------------- limits


def with_another_type(name: str, place: int, index: int, kind: torch.dtype) -> list:
    """Arguments of an operator with one tensor, perhaps one of a list, of another type."""
    arguments = list(attend_arguments(1, 17, 3, 32) if name == "project_and_attend" else transform_arguments(33, 96, 384))
    value = arguments[place]
    if isinstance(value, Tensor):
        arguments[place] = value.to(kind)
    else:
        arguments[place] = [part.to(kind) if number == index else part for number, part in enumerate(value)]
    return arguments


@pytest.mark.parametrize(
    ("name", "place", "index"),
    [("project_and_attend", place, 0) for place in (2, 3, 6)]
    + [("project_and_transform", place, index) for place in (1, 5, 6) for index in (1, 2)]
    + [("project_and_transform", 3, index) for index in range(3)],
)
def test_numbers_of_a_wrong_type_are_refused(path, name, place, index):
    with pytest.raises(TypeError, match=f"{name}: .* is torch.float64, expected"):
        getattr(block_operations, name)(*with_another_type(name, place, index, torch.float64))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "place"),
    [("project_and_attend", place) for place in (0, 1)] + [("project_and_transform", place) for place in (0, 1, 5, 6)],
)
def test_bits_and_panels_of_a_wrong_type_are_refused(path, name, place, kind):
    """Bytes above all: C would write four times as many as the output has."""
    with pytest.raises(TypeError, match=f"{name}: .* is {kind}, expected int32"):
        getattr(block_operations, name)(*with_another_type(name, place, 0, kind))


@pytest.mark.parametrize("place", [1, 3, 5, 6])
def test_a_layer_of_more_or_fewer_tensors_is_refused(path, place):
    arguments = list(transform_arguments(33, 96, 384))
    whole = arguments[place]
    for wrong in (whole[:2], [*whole, whole[2]]):
        arguments[place] = wrong
        with pytest.raises(ValueError, match="must be three tensors each"):
            project_and_transform(*arguments)


def test_no_rows_give_no_rows(path):
    for with_residual in (False, True):
        bits, proj, residual, *rest = transform_arguments(0, 96, 40)
        assert project_and_transform(bits, proj, residual if with_residual else None, *rest).shape == (0, 96)
    found = project_and_attend(*attend_arguments(0, 17, 3, 32))
    assert (found.shape, found.dtype) == ((0, 4), torch.int32)


@pytest.mark.parametrize(("width", "hidden"), [(0, 32), (32, 0), (0, 0)])
def test_layers_without_channels_are_refused(path, width, hidden):
    def empty(outputs: int, inputs: int) -> Tensor:
        return torch.zeros(-(-outputs // 32), oracle.words_of(inputs), 32, dtype=torch.int32)

    values, counts = torch.zeros(width), torch.zeros(hidden, dtype=torch.int32)
    bits = torch.zeros(3, oracle.words_of(width), dtype=torch.int32)
    proj, fc1, fc2 = [empty(width, width), values, values], [empty(hidden, width), counts, counts], empty(width, hidden)
    with pytest.raises(ValueError, match=r"project_and_transform: (channels|hidden) is 0, expected at least 1"):
        project_and_transform(bits, proj, None, [values] * 3, EPS, fc1, [fc2, values, values])
    if width == 0:
        with pytest.raises(ValueError, match="project_and_attend: channels is 0, expected at least 1"):
            project_and_attend(bits, empty(0, 0), values, values, 3, 2, values)


@pytest.mark.parametrize(("limit", "fused"), [(383, False), (384, True)])
@pytest.mark.parametrize(("width", "hidden"), [(96, 384), (384, 96)])
def test_rows_too_long_for_the_stack_take_the_single_operators(path, called, monkeypatch, limit, fused, width, hidden):
    if path == "torch":
        pytest.skip("torch has no limit")
    monkeypatch.setattr(engine, "MOST_COLUMNS", limit)
    arguments = transform_arguments(17, width, hidden)
    found = project_and_transform(*arguments)
    assert (called == ["project_and_transform"]) == fused
    assert torch.equal(found, transform_singly(*arguments))


@pytest.mark.parametrize(("limit", "fused"), [(95, False), (96, True)])
def test_attention_too_wide_for_the_stack_takes_the_single_operators(path, called, monkeypatch, limit, fused):
    if path == "torch":
        pytest.skip("torch has no limit")
    monkeypatch.setattr(operations, "MOST_CHANNELS", limit)
    arguments = attend_arguments(2, 17, 3, 32)
    found = project_and_attend(*arguments)
    assert (called == ["project_and_attend"]) == fused
    assert torch.equal(found, attend_singly(*arguments))


def any_panels(outputs: int, inputs: int) -> Tensor:
    """Weights of a layer whose sizes are multiples of 64, quickly."""
    generator = torch.Generator().manual_seed(inputs)
    return torch.randint(-(2**31), 2**31, (outputs // 32, inputs // 32, 32), dtype=torch.int32, generator=generator)


@pytest.mark.parametrize(("heads", "d"), [(1, 4096), (128, 32)])
def test_widest_attention_has_room_on_the_stacks_of_two_threads(called, heads, d):
    if engine.kernels() is None:
        pytest.skip("there is no C compiler")
    width, tokens = operations.MOST_CHANNELS, 17
    generator = torch.Generator().manual_seed(0)
    bits, (scale, bias) = random_bits(tokens, width, generator), torch.randn(2, 3 * width, generator=generator)
    arguments = [bits, any_panels(3 * width, width), scale / 64, bias, tokens, heads, torch.zeros(width)]
    torch.set_num_threads(2)
    found = project_and_attend(*arguments)
    assert called == ["project_and_attend"]
    assert torch.equal(found, attend_singly(*arguments))


@pytest.mark.parametrize(("width", "hidden"), [(64, engine.MOST_COLUMNS), (engine.MOST_COLUMNS, engine.MOST_COLUMNS)])
def test_widest_transform_has_room_on_the_stacks_of_two_threads(called, width, hidden):
    if engine.kernels() is None:
        pytest.skip("there is no C compiler")
    generator, rows = torch.Generator().manual_seed(0), 33
    bits, values = random_bits(rows, width, generator), torch.randn(6, width, generator=generator) / width**0.5
    low, span = torch.full((2, hidden), width // 2, dtype=torch.int32)
    proj, fc2 = [any_panels(width, width), *values[:2]], [any_panels(width, hidden), *values[2:4]]
    norm = [torch.ones(width), *values[4:]]
    arguments = [bits, proj, None, norm, EPS, [any_panels(hidden, width), low, span], fc2]
    torch.set_num_threads(2)
    found = project_and_transform(*arguments)
    assert called == ["project_and_transform"]
    assert torch.equal(found, transform_singly(*arguments))


# ---------------------------------------------------------------------------- in networks


@cache
def trained(host: str, stage: int, width: int) -> nn.Module:
    """A trained-like binary network with two heads, 32 or 16 channels each."""
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=56, patch_size=14, embed_dim=width, depth=10, num_heads=2, num_classes=0)
    encoder = FrozenEncoder(vit, list(range(2, 10)), "tiny", "random weights", "", 0)
    if host == "Dinomaly":
        return trained_like(Dinomaly(encoder, 2, DinomalyOptions()), stage, sab="off")
    return trained_like(INPFormer(encoder, 2, 6), stage)


def features_of(detector: nn.Module) -> Tensor:
    return detector.encode(torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1)))


FUSED_CALLS = {("INP-Former", 1): [], ("INP-Former", 2): FUSED[1:], ("Dinomaly", 1): FUSED[:1], ("Dinomaly", 2): FUSED}


@torch.no_grad()
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize(("host", "stage"), FUSED_CALLS)
def test_fused_blocks_give_the_maps_of_single_layers(path, called, host, stage, width):
    detector = trained(host, stage, width)
    packed, features = packed_copy(detector, PackingOptions("fp32", "fp32")), features_of(detector)
    fused = packed.anomaly_map(features)
    expected = [name for name in FUSED_CALLS[host, stage] if width == 64 or name != "project_and_attend"]
    assert [name for name in called if name in FUSED] == ([] if path == "torch" else expected * 8)
    called.clear()
    for block in packed.decoder:
        block.fused = False
    assert torch.equal(packed.anomaly_map(features), fused)
    assert not set(called) & set(FUSED)
    assert fused.std() > 1e-3


def next_numbers(values: Tensor) -> Tensor:
    """The smallest change that floats can have, or one other bit in each word."""
    return values ^ 1 if values.dtype == torch.int32 else values.nextafter(torch.full_like(values, torch.inf))


@pytest.mark.parametrize(
    ("host", "stage", "name"), [(host, stage, name) for (host, stage), names in FUSED_CALLS.items() for name in names]
)
def test_comparison_notices_fused_operators_that_differ(path, monkeypatch, host, stage, name):
    detector = trained(host, stage, 64)
    compare_on_bits(detector, features_of(detector))
    operator = getattr(block_operations, name)
    monkeypatch.setattr(block_operations, name, lambda *arguments: next_numbers(operator(*arguments)))
    with pytest.raises(NumericError, match="the fused kernels and the single ones disagree"):
        compare_on_bits(detector, features_of(detector))
