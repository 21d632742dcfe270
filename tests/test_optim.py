"""StableAdamW against a plain float64 loop, and pinned values of the learning rate schedule."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

from common.errors import UserError
from utils.optim import StableAdamW, build_optimizer, learning_rate, load_optimizer, warmup_length

SHAPES = [(3, 4), (5,), ()]


def gradients_of(steps: int, kind: str) -> list[list[np.ndarray]]:
    """Per step, one gradient per shape. "growing" makes the clipping act, "shrinking" the running maximum."""
    generator = np.random.default_rng(0)
    factor = {"even": lambda step: 1.0, "growing": lambda step: 4.0**step, "shrinking": lambda step: 0.2**step}[kind]
    return [[factor(step) * generator.normal(0, 1, shape) for shape in SHAPES] for step in range(steps)]


def starting_values() -> list[np.ndarray]:
    return [np.random.default_rng(1).normal(0, 1, shape) for shape in SHAPES]


def slow_stable_adamw(
    value: np.ndarray,
    gradients: list[np.ndarray],
    rates: list[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-10,
    weight_decay: float = 1e-4,
    clip_threshold: float = 1.0,
) -> tuple[np.ndarray, list[float]]:
    """One tensor, element by element; returns the final value and the factor r of every step."""
    beta1, beta2 = betas
    flat = value.astype(np.float64).ravel().tolist()
    first, second, maximum = ([0.0] * len(flat) for _ in range(3))
    factors = []
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        slopes = gradient.ravel().tolist()
        denominators = []
        for index, slope in enumerate(slopes):
            flat[index] *= 1 - rate * weight_decay
            first[index] = beta1 * first[index] + (1 - beta1) * slope
            second[index] = beta2 * second[index] + (1 - beta2) * slope * slope
            maximum[index] = max(maximum[index], second[index])
            denominators.append(math.sqrt(maximum[index]) / math.sqrt(1 - beta2**step) + eps)
        squares = [(slope / denominator) ** 2 for slope, denominator in zip(slopes, denominators, strict=True)]
        factors.append(max(1.0, math.sqrt(sum(squares) / len(squares)) / clip_threshold))
        for index, denominator in enumerate(denominators):
            flat[index] -= rate / (1 - beta1**step) / factors[-1] * first[index] / denominator
    return np.array(flat).reshape(value.shape), factors


def torch_result(gradients: list[list[np.ndarray]], rates: list[float], optimizer=StableAdamW, **options):
    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in starting_values()]
    optimizer = optimizer(parameters, **options)
    for step, rate in zip(gradients, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.5},
        {"clip_threshold": 0.3},
        {"betas": (0.5, 0.9), "eps": 1e-2},
    ],
    ids=["defaults", "decay", "clipping", "betas"],
)
@pytest.mark.parametrize("kind", ["even", "growing", "shrinking"])
def test_stable_adamw_equals_a_plain_loop(kind, options):
    gradients, rates = gradients_of(8, kind), [0.0, 0.01, 0.1, 0.1, 0.05, 0.02, 0.3, 0.01]
    results = torch_result(gradients, rates, **options)
    for index, (value, result) in enumerate(zip(starting_values(), results, strict=True)):
        expected, factors = slow_stable_adamw(value, [step[index] for step in gradients], rates, **options)
        np.testing.assert_allclose(result, expected, rtol=1e-10, atol=1e-12)
        if kind == "growing" or options.get("clip_threshold"):
            assert max(factors) > 1.05  # the case does exercise the clipping


def test_without_clipping_it_is_adamw_with_amsgrad():
    gradients, rates = gradients_of(6, "shrinking"), [0.1, 0.05, 0.2, 0.1, 0.1, 0.01]
    shared = {"betas": (0.9, 0.999), "eps": 1e-10, "weight_decay": 0.1}
    expected = torch_result(gradients, rates, torch.optim.AdamW, amsgrad=True, **shared)
    result = torch_result(gradients, rates, clip_threshold=1e9, **shared)
    for ours, theirs in zip(result, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_a_sudden_large_gradient_moves_the_tensor_less_than_adamw():
    """After steps of 0.001 a gradient of 1 is many times its second moment; RMS scaling takes that factor back."""
    gradients = [[np.full(shape, size) for shape in SHAPES] for size in (0.001, 0.001, 0.001, 1.0)]
    rates = [0.0, 0.0, 0.0, 0.1]
    moved, by_adamw = (
        [abs(after - before).max() for after, before in zip(result, starting_values(), strict=True)]
        for result in (
            torch_result(gradients, rates, weight_decay=0.0),
            torch_result(gradients, rates, torch.optim.AdamW, amsgrad=True, weight_decay=0.0),
        )
    )
    ratio = 1 / math.sqrt((1e-3 + 1e-9) / (1 - 0.999**4))  # gradient over the root of its corrected second moment
    for ours, theirs in zip(moved, by_adamw, strict=True):
        assert theirs / ours == pytest.approx(ratio, rel=1e-3)


def test_the_defaults_are_the_papers():
    optimizer = StableAdamW([torch.nn.Parameter(torch.zeros(1))])
    (group,) = optimizer.param_groups
    expected = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-10, "weight_decay": 1e-4, "clip_threshold": 1.0}
    assert {name: group[name] for name in expected} == expected


def test_clipping_is_per_tensor():
    """A wild tensor does not slow down a calm one."""
    calm = gradients_of(4, "even")
    wild = [[calm[step][0], 1000.0**step * calm[step][1], calm[step][2]] for step in range(4)]
    first, second = torch_result(calm, [0.1] * 4), torch_result(wild, [0.1] * 4)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[2], second[2])
    assert (first[1] != second[1]).all()


def test_parameters_without_gradient_stay():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    used.grad = torch.ones(3)
    StableAdamW([used, unused], lr=0.1).step()
    assert unused.tolist() == [1, 1, 1]
    assert (used < 1).all()


def test_a_zero_gradient_changes_nothing_but_the_decay():
    parameter = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameter.grad = torch.zeros(3, dtype=torch.float64)
    StableAdamW([parameter], lr=0.1, weight_decay=0.5).step()
    assert parameter.tolist() == pytest.approx([0.95] * 3)


def test_groups_keep_their_own_decay():
    decayed, kept = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    decayed.grad, kept.grad = (torch.zeros(2, dtype=torch.float64) for _ in range(2))
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [kept], "weight_decay": 0.0}]
    StableAdamW(groups, lr=0.1).step()
    assert decayed.tolist() == pytest.approx([0.95] * 2)
    assert kept.tolist() == [1, 1]


def test_a_restored_optimizer_goes_on_as_if_never_stopped():
    gradients, rates = gradients_of(6, "growing"), [0.1] * 6
    whole = torch_result(gradients, rates)

    parameters = [torch.nn.Parameter(torch.tensor(value)) for value in starting_values()]
    optimizer = StableAdamW(parameters, lr=0.1)
    for number, step in enumerate(gradients):
        if number == 3:
            state = optimizer.state_dict()
            parameters = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
            optimizer = StableAdamW(parameters, lr=0.5)
            optimizer.load_state_dict(state)
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
    for parameter, expected in zip(parameters, whole, strict=True):
        np.testing.assert_array_equal(parameter.detach().numpy(), expected)


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        StableAdamW([torch.nn.Parameter(torch.zeros(1))]).step(lambda: 0.0)


PEAK, FINAL, WARMUP, TOTAL = 1e-3, 1e-4, 100, 1100
PINNED = {
    0: 0.0,
    1: PEAK / 99,
    50: PEAK * 50 / 99,
    99: PEAK,  # last of the warm-up
    100: PEAK,  # first of the cosine
    350: FINAL + 0.9e-3 * (1 + math.sqrt(0.5)) / 2,  # a quarter of the way
    600: 5.5e-4,  # half
    850: FINAL + 0.9e-3 * (1 - math.sqrt(0.5)) / 2,
    1099: FINAL + 0.45e-3 * (1 + math.cos(math.pi * 0.999)),
    1100: FINAL,
}


@pytest.mark.parametrize(("iteration", "expected"), PINNED.items())
def test_schedule_values(iteration, expected):
    assert learning_rate(iteration, TOTAL, WARMUP, PEAK, FINAL) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("total", "warmup"), [(1100, 100), (500, 100), (37, 7), (12, 1), (9, 0)])
def test_schedule_equals_the_arrays_of_the_host_models(total, warmup):
    steps = np.arange(total - warmup)
    cosine = FINAL + 0.5 * (PEAK - FINAL) * (1 + np.cos(np.pi * steps / len(steps)))
    expected = np.concatenate([np.linspace(0, PEAK, warmup), cosine])
    rates = [learning_rate(iteration, total, warmup, PEAK, FINAL) for iteration in range(total)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=1e-18)


def test_schedule_of_nothing_but_warmup_stays_finite():
    rates = [learning_rate(iteration, 5, 5, PEAK, FINAL) for iteration in range(6)]
    assert rates == pytest.approx([0, PEAK / 4, PEAK / 2, PEAK * 3 / 4, PEAK, PEAK])


@pytest.mark.parametrize(
    ("total", "expected"), [(45200, 100), (600, 100), (500, 100), (499, 99), (50, 10), (5, 1), (4, 0), (1, 0)]
)
def test_warmup_is_a_hundred_but_at_most_a_fifth(total, expected):
    assert warmup_length(total) == expected


def test_warmup_of_another_wish():
    assert warmup_length(1000, wanted=30) == 30
    assert warmup_length(100, wanted=30) == 20


def _state_of_two_steps() -> tuple[Optimizer, dict]:
    """A fresh optimizer and the state that another had after two steps."""
    optimizers = []
    for steps in (0, 2):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (2,), ())]
        optimizer = build_optimizer("stable_adamw", [{"params": parameters, "weight_decay": 0.1}], 1e-3, (0.9, 0.999), 1e-10)
        for _ in range(steps):
            sum((parameter**2).sum() for parameter in parameters).backward()
            optimizer.step()
        optimizers.append(optimizer)
    return optimizers[0], optimizers[1].state_dict()


def test_a_state_is_loaded_into_an_optimizer_of_the_same_numbers():
    fresh, state = _state_of_two_steps()
    load_optimizer(fresh, state, Path("last.pth"))
    assert {key: value["step"] for key, value in fresh.state_dict()["state"].items()} == {0: 2, 1: 2, 2: 2}


def test_a_setting_that_is_newer_than_the_state_keeps_its_value():
    fresh, state = _state_of_two_steps()
    fresh.param_groups[0]["new"] = True
    load_optimizer(fresh, state, Path("last.pth"))
    assert fresh.param_groups[0]["new"] is True


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("state"), r"'optimizer.state' is missing"),
        (lambda state: state.update(param_groups=[]), r"0 groups of parameters instead of 1"),
        (lambda state: state["param_groups"][0].update(params=[0]), r"another number of parameters than 3"),
        (lambda state: state["param_groups"][0].update(eps=1.0), r"eps should be 1e-10, found 1.0"),
        (lambda state: state["param_groups"][0].update(lr=float("inf")), r"lr should be a finite number"),
        (lambda state: state["state"].update({7: {}}), r"a state for 7, which is no parameter"),
        (
            lambda state: state["state"][0].update(first_moment=torch.zeros(2, 3)),
            r"first_moment has shape \(2, 3\)",
        ),
        (lambda state: state["state"][2]["first_moment"].fill_(math.nan), r"first_moment has values that are not finite"),
        (lambda state: state["state"][1].update(step=-1), r"step should be a finite number"),
        (lambda state: state["state"][1].update(step="2"), r"step should be a finite number"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(change, said):
    fresh, state = _state_of_two_steps()
    change(state)
    with pytest.raises(UserError, match=rf"'last.pth' does not fit \(.*{said}.*--overwrite"):
        load_optimizer(fresh, state, Path("last.pth"))
