"""Fused linear attention at its limits: hand-computed values, inputs that underflow, NaN, threads, images and wide layers.

The comparison with the slow formula over many sizes, also under a sanitizer, is in kernel_cases.py.
"""

import math

import pytest
import torch
from torch import Tensor

from binarize.kernels import engine, oracle
from binarize.kernels.library import PATHS, available_paths, load_library
from binarize.kernels.operations import linear_attention

HEADS, WIDTHS = 3, (64, 16, 7)
SIZES = [(1, 1), (2, 5), (1, 261), (3, 789)]  # images, tokens


@pytest.fixture(params=["torch", *PATHS])
def path(request):
    """Every way to compute that this machine has; path and thread count are restored."""
    before, threads, library = engine.kernels(), torch.get_num_threads(), load_library()
    if request.param != "torch" and (library is None or request.param not in available_paths(library)):
        pytest.skip(f"the path {request.param} does not run here")
    engine.use_kernels(None if request.param == "torch" else engine.Kernels(library, request.param))
    yield request.param
    torch.set_num_threads(threads)
    engine.use_kernels(before)


def parts(rows: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (rows, channels) each."""
    return torch.randn(3, rows, channels, generator=torch.Generator().manual_seed(rows + channels)).unbind()


def attend(
    query: Tensor, key: Tensor, value: Tensor, tokens: int, heads: int = HEADS, threshold: Tensor | None = None
) -> Tensor:
    return linear_attention(torch.cat([query, key, value], dim=1), tokens, heads, threshold)


@pytest.mark.parametrize(("images", "tokens"), SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_constant_queries_and_keys_average_the_values(path, images, tokens, width):
    *_, value = parts(images * tokens, HEADS * width)
    mean = value.double().unflatten(0, (images, tokens)).mean(dim=1, keepdim=True).expand(-1, tokens, -1).flatten(0, 1)
    for query, key in ((0.0, 0.0), (50.0, 50.0), (-3.0, 0.25), (0.0, 1e6)):
        found = attend(torch.full_like(value, query), torch.full_like(value, key), value, tokens)
        torch.testing.assert_close(found, mean.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("query", "key"), [(-100.0, -100.0), (-100.0, 50.0), (50.0, -100.0), (-1e30, 0.0), (-torch.inf, 3.0)])
@pytest.mark.parametrize("width", WIDTHS)
def test_features_that_underflow_give_zeros(path, query, key, width):
    *_, value = parts(2 * 17, HEADS * width)
    found = attend(torch.full_like(value, query), torch.full_like(value, key), value, 17)
    assert found.abs().max() < 1e-20  # also false for NaN
    threshold = torch.where(torch.arange(HEADS * width) % 2 == 0, 0.5, -0.5)
    bits = attend(torch.full_like(value, query), torch.full_like(value, key), value, 17, threshold=threshold)
    assert torch.equal(bits, oracle.pack_signs((threshold < 0).expand(len(value), -1)))


def test_the_denominator_has_its_constant(path):
    # phi(q) phi(k) = 1e-4 * 1e-4 = 1e-8, so that half of the value is left
    small = torch.full((1, 1), math.log(1e-4))
    found = attend(small, small, torch.full((1, 1), 3.0), tokens=1, heads=1)
    torch.testing.assert_close(found.item(), 1.5, rtol=1e-5, atol=0)


def test_two_tokens_by_hand(path):
    query = torch.tensor([[0.0, math.log(0.5)], [2.0, 0.0]])  # features (1, 1/2), (3, 1)
    key = torch.tensor([[1.0, math.log(0.25)], [0.0, 3.0]])  # features (2, 1/4), (1, 4)
    value = torch.tensor([[1.0, 0.0], [-1.0, 2.0]])
    # weights of the tokens' values: 2.125 and 3 for the first query, 6.25 and 7 for the second
    expected = torch.tensor([[-0.875 / 5.125, 6 / 5.125], [-0.75 / 13.25, 14 / 13.25]])
    torch.testing.assert_close(attend(query, key, value, tokens=2, heads=1), expected, rtol=1e-6, atol=1e-7)


def test_nan_is_not_hidden(path):
    for which, rows in ((0, [4]), (1, range(17)), (2, range(17))):  # of a query its own row, of key and value its whole image
        inputs = parts(2 * 17, HEADS * 16)
        inputs[which][4, 20] = torch.nan  # a channel of the second of three heads
        spoilt = torch.zeros(2 * 17, HEADS, 16, dtype=torch.bool)
        spoilt[list(rows), 1, ... if which < 2 else 4] = True
        assert torch.equal(attend(*inputs, 17).isnan(), spoilt.flatten(1))


@pytest.mark.parametrize(("images", "tokens"), SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_bits_are_the_comparison_of_the_floats(path, images, tokens, width):
    inputs = parts(images * tokens, HEADS * width)
    floats = attend(*inputs, tokens)
    threshold = floats[len(floats) // 2]  # some are equal
    assert torch.equal(attend(*inputs, tokens, threshold=threshold), oracle.pack_signs(floats >= threshold))


@pytest.mark.parametrize(("images", "tokens"), SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_neither_threads_nor_other_images_change_a_byte(path, images, tokens, width):
    if path == "torch":
        pytest.skip("torch chooses its matrix product by size and threads")
    inputs = parts(images * tokens, HEADS * width)
    for threshold in (None, torch.full((HEADS * width,), 0.01)):
        torch.set_num_threads(1)
        alone = attend(*inputs, tokens, threshold=threshold)
        last = attend(*(part[-tokens:] for part in inputs), tokens, threshold=threshold)
        assert torch.equal(last, alone[-tokens:])
        torch.set_num_threads(2)
        assert torch.equal(attend(*inputs, tokens, threshold=threshold), alone)


def test_no_images_give_no_rows(path):
    inputs = parts(0, 48)
    assert attend(*inputs, 5).shape == (0, 48)
    assert attend(*inputs, 5, threshold=torch.zeros(48)).shape == (0, 2)


def test_layers_too_wide_for_c_run_in_torch(path):
    inputs = parts(6, 41 * 100)
    assert torch.equal(attend(*inputs, 3, heads=41), oracle.linear_attention(torch.cat(inputs, dim=1), 3, 41, None))
