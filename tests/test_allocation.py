"""Scores of layers and the bits they get: against numpy's formulas, exact Hessians and cases by hand."""

import itertools
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import NumericError, UserError
from models.patch_description import PatchDescriptionNetwork
from quantize.allocation import AllocationOptions, allocate, best_within_budget, bits_by_edges, bits_by_rank, inverted_bits
from quantize.scores import SCORES, layer_outputs_of, layer_scores, mean_hessian_traces, orthogonality, perturbations

CHOICES = (2, 3, 4, 8)
TEACHER, STUDENT = [10, 100, 200, 50], [10, 100, 200, 100]
IMAGES = 5


def maps(channels: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    return torch.einsum("bchw,cd->bdhw", torch.randn(IMAGES, channels, 4, 3, generator=generator).double(), mixing) + offset


def score_of(teacher, student, score: str, sizes=(2, 3)) -> float:
    """Score of one pair of layers, its images streamed in batches of unequal size."""
    batches = zip(teacher.split(list(sizes)), student.split(list(sizes)), strict=True)
    (value,) = layer_scores(([pair] for pair in batches), score)
    return value


def patches(features: torch.Tensor) -> np.ndarray:
    return features.double().movedim(1, -1).flatten(0, -2).numpy()


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Of features (samples, channels), by Gram matrices (Kornblith et al. 2019, Eq. 1 to 3)."""
    centring = np.eye(len(first)) - 1 / len(first)
    first, second = (centring @ features @ features.T @ centring for features in (first, second))
    return np.sum(first * second) / np.sqrt(np.sum(first**2) * np.sum(second**2))


# scores of hierarchical quantization scoring


def test_errors_by_hand():
    teacher = torch.tensor([[1.0, 2.0], [3.0, 0.0]]).view(2, 1, 1, 2)  # squares: 14
    student = torch.tensor([[1.0, 0.0], [2.0, 1.0]]).view(2, 1, 1, 2)  # squared differences: 0, 4, 1, 1
    assert score_of(teacher, student, "mse_raw", (1, 1)) == 6 / 4
    assert score_of(teacher, student, "mse_relative", (1, 1)) == 6 / (6 + 14)
    assert score_of(teacher, teacher, "mse_relative", (1, 1)) == 0
    assert score_of(0 * teacher, 0 * teacher, "mse_relative", (1, 1)) == 0


def test_the_relative_error_knows_no_scale_and_stays_below_one():
    teacher, student = maps(4, 0), maps(4, 1)
    assert score_of(7 * teacher, 7 * student, "mse_relative") == pytest.approx(score_of(teacher, student, "mse_relative"))
    assert 0 < score_of(teacher, 1e3 * student, "mse_relative") < 1


def test_cka_is_the_formula_of_gram_matrices():
    teacher, student = maps(4, 0, offset=3.0), maps(6, 1, offset=-50.0)
    student[:, :4] += 0.5 * teacher
    assert score_of(teacher, student, "cka") == pytest.approx(1 - linear_cka(patches(teacher), patches(student)), abs=1e-12)


def test_cka_knows_no_order_rotation_scale_or_offset_but_a_mixing():
    teacher, student = maps(4, 0), maps(4, 1)
    rotation, _ = torch.linalg.qr(maps(4, 2)[0, :, :, 0] @ maps(4, 3)[0, :, :, 0].T + torch.eye(4))
    rotated = torch.einsum("bchw,cd->bdhw", student, rotation)
    expected = score_of(teacher, student, "cka")
    assert score_of(teacher, 5 * rotated[:, [2, 0, 3, 1]] - 100, "cka") == pytest.approx(expected, abs=1e-12)
    assert score_of(teacher, student * torch.tensor([9.0, 1, 1, 1])[:, None, None], "cka") != pytest.approx(expected, abs=1e-3)
    assert score_of(teacher, 2 * teacher + 1, "cka") == pytest.approx(0, abs=1e-12)


def test_regress_is_what_numpys_least_squares_leaves():
    teacher, student = maps(4, 0, offset=3.0), maps(6, 1, offset=-50.0)
    teacher += 0.5 * student[:, :4]
    inputs, targets = patches(student), patches(teacher)
    _, residuals, *_ = np.linalg.lstsq(np.column_stack([inputs, np.ones(len(inputs))]), targets, rcond=None)
    expected = residuals.sum() / np.sum((targets - targets.mean(0)) ** 2)
    assert score_of(teacher, student, "regress") == pytest.approx(expected, rel=1e-9)
    mixed = torch.einsum("bchw,cd->bdhw", teacher, maps(4, 2)[0, :, :, 0] @ maps(4, 3)[0, :, :, 0].T + 9 * torch.eye(4))
    assert score_of(teacher, mixed - 7, "regress") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_dead_and_equal_channels_have_a_score(score):
    teacher, student = maps(4, 0), maps(4, 1)
    student[:, 0], student[:, 1] = 0, student[:, 2]
    assert 0 < score_of(teacher, student, score) < math.inf
    assert score_of(teacher, 0 * student, score) == pytest.approx(
        {"mse_relative": 0.5, "mse_raw": teacher.square().mean().item()}.get(score, 1.0)
    )
    assert math.isfinite(score_of(0 * teacher, student, score))


@pytest.mark.parametrize("score", SCORES)
def test_how_images_are_batched_does_not_matter(score):
    teacher, student = maps(4, 0, offset=20.0), maps(4, 1)
    assert score_of(teacher, student, score, (5,)) == pytest.approx(score_of(teacher, student, score, (1, 1, 3)), rel=1e-10)


def test_unknown_scores_and_no_images_are_refused():
    with pytest.raises(ValueError, match="mse_relative"):
        layer_scores([], "mse")
    with pytest.raises(ValueError, match="without images"):
        layer_scores([])


# outputs of layers


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    return PatchDescriptionNetwork("tiny", 48).eval(), PatchDescriptionNetwork("tiny", 96).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def convolved(network, number: int, inputs: torch.Tensor) -> torch.Tensor:
    layer = getattr(network, f"conv{number}")
    return F.conv2d(inputs, layer.weight, layer.bias)


def by_hand(network, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs of the four convolutions and their outputs before the ReLU."""
    inputs, outputs = [images], []
    for number in (1, 2, 3, 4):
        outputs.append(convolved(network, number, inputs[-1]))
        rectified = outputs[-1].relu()
        inputs.append(F.avg_pool2d(rectified, 2) if number < 3 else rectified)
    return inputs[:4], outputs


@torch.no_grad()
@pytest.mark.parametrize("tap", ["pre", "post"])
@pytest.mark.parametrize("source", ["own", "teacher"])
def test_outputs_are_those_of_the_convolutions(networks, images, source, tap):
    teacher, student = networks
    (first, second) = layer_outputs_of(teacher, student, images.split([2, 1]), source, tap, lambda maps: 2 * maps + 1)
    assert [len(maps) for maps, _ in first + second] == [2] * 4 + [1] * 4
    teacher_inputs, of_teacher = by_hand(teacher, images)
    inputs = teacher_inputs if source == "teacher" else by_hand(student, images)[0]
    of_student = [convolved(student, number, inputs[number - 1]) for number in (1, 2, 3, 4)]
    if tap == "post":
        of_teacher, of_student = ([maps.relu() for maps in outputs[:3]] + outputs[3:] for outputs in (of_teacher, of_student))
    of_teacher[3], of_student[3] = 2 * of_teacher[3] + 1, of_student[3][:, :48]
    for layer in range(4):
        found_teacher, found_student = (torch.cat([first[layer][side], second[layer][side]]) for side in (0, 1))
        torch.testing.assert_close(found_teacher, of_teacher[layer])
        torch.testing.assert_close(found_student, of_student[layer])


def test_the_teachers_input_goes_where_channels_agree(images):
    """The last layer of the medium student takes 768 channels, the teacher's 384: it keeps its own input."""
    torch.manual_seed(0)
    teacher, student = PatchDescriptionNetwork("medium", 4), PatchDescriptionNetwork("medium", 8)
    (own,), (foreign,) = (
        list(layer_outputs_of(teacher, student, [images[:1, :, :36, :36]], source)) for source in ("own", "teacher")
    )
    agree = [torch.equal(first[1], second[1]) for first, second in zip(own, foreign, strict=True)]
    assert agree == [True, False, False, False, False, True]


def test_no_hook_stays_and_nothing_asks_for_gradients(networks, images):
    ((*_, (_, last)),) = layer_outputs_of(*networks, [images[:1]], "teacher")
    assert not last.requires_grad
    assert not any(convolution._forward_pre_hooks for convolution in networks[0].convolutions)
    with pytest.raises(ValueError, match="middle"):
        next(layer_outputs_of(*networks, [images], tap="middle"))


# rivals


def test_orthogonality_is_the_formula():
    layers = [maps(4, 0), maps(6, 1, offset=9.0)[:, :, :2], maps(3, 2)]
    flat = [layer.flatten(1).numpy() for layer in layers]
    sums = [sum(linear_cka(flat[i], flat[j]) for j in range(3) if j != i) for i in range(3)]
    assert orthogonality(layers, beta=2.0) == pytest.approx([math.exp(-2 * value) for value in sums], rel=1e-10)
    assert orthogonality([layers[0], layers[0]], beta=10.0) == pytest.approx([math.exp(-10)] * 2)
    assert orthogonality([layers[0], torch.ones(IMAGES, 3)]) == pytest.approx([1, 1])


def test_features_of_many_chunks_have_the_same_gram_matrix(monkeypatch):
    layers = [maps(4, 0), maps(6, 1)]
    whole = orthogonality(layers)
    monkeypatch.setattr("quantize.scores._CHUNK", 5 * IMAGES)
    assert orthogonality(layers) == pytest.approx(whole, rel=1e-12)


def test_traces_are_those_of_the_exact_hessian():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(7, 7, generator=generator, dtype=torch.float64)
    hessian = root @ root.T
    weights = [torch.randn(2, 2, generator=generator).double().requires_grad_(), torch.zeros(3).double().requires_grad_()]

    def loss():
        joined = torch.cat([weight.flatten() for weight in weights])
        return 0.5 * joined @ hessian @ joined

    exact = torch.autograd.functional.hessian(
        lambda joined: 0.5 * joined @ hessian @ joined, torch.zeros(7).double()
    ).diagonal()
    found = mean_hessian_traces(loss, weights, probes=4000, seed=1)
    assert found == pytest.approx([exact[:4].mean().item(), exact[4:].mean().item()], rel=0.05)
    hessian = hessian.diagonal().diag()  # without products across weights one probe is exact
    assert mean_hessian_traces(loss, weights, 1) == pytest.approx([exact[:4].mean().item(), exact[4:].mean().item()])


def test_omega_by_hand():
    weights = [torch.tensor([0.4, 1.6]), torch.tensor([3.2])]
    found = perturbations(weights, [2.0, -1.0], lambda weight, bits: (weight * bits).round() / bits, (1, 2))
    assert found[0] == pytest.approx([2 * (0.4**2 + 0.4**2), 2 * (0.1**2 + 0.1**2)], rel=1e-5)
    assert found[1] == [0, 0]


# scores to bits


def inner_bits(scores, **options) -> list[int]:
    allocation = allocate(AllocationOptions(**options), TEACHER, STUDENT, [0.5, *scores, 0.5])
    assert allocation.teacher_bits == allocation.student_bits
    assert allocation.student_bits[::3] == [8, 8]
    return allocation.student_bits[1:3]


@pytest.mark.parametrize(
    ("scores", "bits"),
    [
        ((0.3, 0.3), [4, 4]),  # t = 1, 1
        ((0.9, 1.1), [4, 4]),  # t = 0.9, 1.1: the edge belongs to the upper step
        ((0.75, 1.25), [3, 4]),  # the last edge belongs to the lower step
        ((1.5, 0.5), [8, 2]),
        ((0.59, 1.41), [2, 8]),
        ((0.61, 1.39), [3, 8]),
        ((0.0, 0.0), [4, 4]),
    ],
)
def test_ratio_by_hand(scores, bits):
    assert inner_bits(scores) == bits


def test_other_mappings_by_hand():
    assert inner_bits((0.1, 0.6), phi="absolute") == [2, 4]
    assert inner_bits((0.1, 0.6), phi="absolute", edges=(0.05, 0.1, 0.5)) == [4, 8]
    assert inner_bits((0.1, 0.6), phi="absolute", choices=(4, 8), edges=(0.3,)) == [4, 8]
    assert inner_bits((0.6, 0.1), phi="rank") == [8, 3]
    assert inner_bits((0.6, 0.6), phi="rank") == [4, 4]
    assert bits_by_rank((5, 1, 2, 7), CHOICES) == [4, 2, 3, 8]
    assert bits_by_rank((1,), CHOICES) == [8]


def test_every_mapping_is_monotone():
    generator = np.random.default_rng(0)
    for _ in range(200):
        scores = generator.random(5).round(1)
        for bits in (bits_by_rank(scores, CHOICES), bits_by_edges(scores, sorted(generator.random(3)), CHOICES)):
            assert all(
                first <= second for (_, first), (_, second) in itertools.pairwise(sorted(zip(scores, bits, strict=True)))
            )
            opposite = inverted_bits(scores, bits)
            assert sorted(opposite) == sorted(bits)
            ascending = [opposite[layer] for layer in np.argsort(scores, kind="stable")]
            assert ascending == sorted(bits, reverse=True)


def test_budget_by_hand():
    """Pairs have 200 and 400 parameters; the ends cost 8 x 170 / 32 = 42.5 effective parameters, a bit 6.25 and 12.5."""
    budget = 42.5 + 8 * 6.25 + 2 * 12.5
    assert inner_bits((9, 1), phi="budget", budget=budget) == [8, 2]
    assert inner_bits((1, 9), phi="budget", budget=budget) == [4, 4]  # 8 bits for the larger pair cost too much
    assert inner_bits((9, 1), method="budget", budget=budget - 0.01) == [4, 3]
    assert inner_bits((9, 1), method="budget") == [8, 2]  # what 4 bits in both cost is the same budget
    with pytest.raises(UserError, match=r"leaves 37 effective .* need 38"):
        inner_bits((9, 1), method="budget", budget=42.5 + 2 * 18.75 - 0.5)


def test_an_integer_program_finds_what_trying_all_finds(monkeypatch):
    generator = np.random.default_rng(0)
    for _ in range(30):
        parameters = generator.integers(1, 50, 5) * 16
        values = np.sort(generator.random((5, 4)), axis=1) * 1e-9  # the solver's tolerances are about 1e-6
        budget = int(parameters.sum() * generator.uniform(2, 8))
        found = []
        for most_combinations in (4**8, 0):
            monkeypatch.setattr("quantize.allocation._MOST_COMBINATIONS", most_combinations)
            bits = best_within_budget(values, parameters.tolist(), CHOICES, budget)
            assert parameters @ bits <= budget
            found.append(sum(values[layer, CHOICES.index(layer_bits)] for layer, layer_bits in enumerate(bits)))
        assert found[1] == pytest.approx(found[0], rel=1e-9)


def test_many_layers_get_bits_of_the_integer_program():
    """16 layers have 4^16 combinations. Of equal size, the eight that count tenfold get 8 bits and the others 24 in all."""
    values = [[score * bits for bits in CHOICES] for score in [1.0] * 8 + [10.0] * 8]
    bits = best_within_budget(values, [64] * 16, CHOICES, 64 * (8 * 8 + 24))
    assert bits[8:] == [8] * 8
    assert sum(bits[:8]) == 24


def test_of_equal_values_the_smallest_wins():
    assert best_within_budget([[1, 1, 1, 1], [0, 5, 5, 5]], [10, 10], CHOICES, 1000) == [2, 3]


def test_ompq_weighs_a_layer_by_itself_and_all_that_follow():
    """8 and 2 bits cost as much as 4 and 4 and win where the second weight is below twice the first: 0.3 and 0.7 / 3 are so."""
    thetas = [0.0, 0.1, 0.3, 0.3]
    assert allocate(AllocationOptions("ompq"), TEACHER, STUDENT, thetas).student_bits == [8, 8, 2, 8]
    assert allocate(AllocationOptions("budget"), TEACHER, STUDENT, thetas).student_bits == [8, 4, 4, 8]

    # layers of equal size, 12 bits for both: the last layer's theta lifts the second weight to 0.6, above the first, 0.57
    sizes, budget = [10, 100, 100, 50], (8 * 120 + 12 * 200) / 32
    allocation = allocate(AllocationOptions("ompq", budget=budget), sizes, sizes, [0.0, 0.5, 0.2, 1.0])
    assert allocation.student_bits == [8, 4, 8, 8]


def test_hawq_spends_bits_where_they_save_most():
    ends = [0.0] * 4
    omegas = [ends, [9, 4, 2, 1], [8, 6, 5, 0], ends]
    allocation = allocate(AllocationOptions("hawq"), TEACHER, STUDENT, perturbations=omegas)
    assert allocation.student_bits == [8, 4, 4, 8]
    allocation = allocate(AllocationOptions("hawq"), TEACHER, STUDENT, perturbations=[ends, [9, 4, 2, 0], [6, 6, 5, 0], ends])
    assert allocation.student_bits == [8, 8, 2, 8]


def test_controls():
    assert inner_bits((0.61, 1.39), method="inverted") == [8, 3]
    assert inner_bits((0.61, 1.39), method="manual", bits=(2, 5)) == [2, 5]
    assert inner_bits((0.61, 1.39), method="uniform", bits=(3,)) == [3, 3]
    drawn = [tuple(inner_bits((0.61, 1.39), method="random", seed=seed)) for seed in range(40)]
    assert drawn == [tuple(inner_bits((0.1, 0.1), method="random", seed=seed)) for seed in range(40)]
    assert {bits for pair in drawn for bits in pair} == set(CHOICES)
    assert len(set(drawn)) > 8


def test_a_student_alone_leaves_the_teacher_at_the_bits_of_the_ends():
    allocation = allocate(AllocationOptions(share="student_only", ends_bits=6), TEACHER, STUDENT, [1, 0.5, 1.5, 1])
    assert allocation.teacher_bits == [6] * 4
    assert allocation.student_bits == [6, 2, 8, 6]
    # 6 bits for all but the student's two layers, of 470 parameters, and what 8 and 2 bits of these two cost
    budget = AllocationOptions("budget", share="student_only", ends_bits=6, budget=(6 * 470 + 8 * 100 + 2 * 200) / 32)
    assert allocate(budget, TEACHER, STUDENT, [0, 9, 1, 0]).student_bits == [6, 8, 2, 6]


def test_an_allocation_is_plain_data():
    allocation = allocate(AllocationOptions(), TEACHER, STUDENT, [np.float64(0.5), np.float64(0.2), np.float64(0.6), 0.1])
    record = json.loads(json.dumps(asdict(allocation)))
    assert record == asdict(allocation)
    assert record["teacher_bits"] == [8, 2, 8, 8]
    assert record["scores"] == [0.5, 0.2, 0.6, 0.1]
    assert record["relative_scores"] == pytest.approx([0.5, 1.5])
    assert record["method"] == "hqs"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"method": "hsq"}, "method 'hsq'.*hqs"),
        ({"phi": "linear"}, "phi 'linear'.*ratio"),
        ({"share": "all"}, "share 'all'.*pair"),
        ({"ends_bits": 32}, "2 to 8 bits"),
        ({"choices": (8, 4)}, "ascending order"),
        ({"choices": (4, 8)}, "need 1 ascending edges"),
        ({"edges": (2, 1, 3)}, "need 3 ascending edges"),
        ({"method": "manual", "bits": (8, 4, 4, 8)}, "takes 2 numbers, .*not 4"),
        ({"method": "uniform"}, "takes one number"),
        ({"method": "hawq"}, "Omega of 4 layers at 4 choices"),
    ],
)
def test_options_that_contradict_are_refused_in_a_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        inner_bits((0.5, 0.5), **options)


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="each of 4 layers, not 2"):
        allocate(AllocationOptions(), TEACHER, STUDENT, [1, 1])
    with pytest.raises(UserError, match="three or more layers"):
        allocate(AllocationOptions(), [10, 10], [10, 10], [1, 1])
    with pytest.raises(NumericError, match="layer 2 is not finite"):
        allocate(AllocationOptions(), TEACHER, STUDENT, [1, math.nan, 1, 1])
