"""Which layer of teacher and student gets how many bits: hierarchical quantization scoring, its rivals and its controls."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from common.errors import NumericError, ResourceError, UserError

METHODS = ("hqs", "ompq", "hawq", "manual", "budget", "uniform", "random", "inverted")
PHIS = ("ratio", "absolute", "rank", "budget")
SHARES = ("pair", "student_only")
_EDGES = {"ratio": (0.6, 0.9, 1.25), "absolute": (0.25, 0.5, 0.75)}  # the second for scores in (0, 1)
_MOST_COMBINATIONS = 4**8  # that are tried one by one; beyond, a solver of integer programs
_FEWEST, _MOST = 2, 8  # bits of a layer
_EFFECTIVE = 32  # bits of one effective parameter


@dataclass(frozen=True)
class AllocationOptions:
    """How scores become bits.

    Attributes:
        method: `hqs` maps scores by `phi`; `budget` is `hqs` with phi `budget`; `inverted` hands the bits of `hqs` out in the
            opposite order; `random` draws them from `choices`; `manual` and `uniform` take `bits`; `ompq` and `hawq` solve
            their own integer programs within `budget`.
        phi: `ratio` compares scores divided by their mean with `edges`, `absolute` the scores; `rank` maps ranks; `budget`
            maximises the sum of score x bits within `budget`. RAAD's paper leaves its mapping out; these are ours.
        share: `pair` gives both networks the same bits; `student_only` leaves the teacher at `ends_bits` in every layer.
        ends_bits: of first and last layer.
        choices: bits of the other layers, ascending.
        edges: ascending, one fewer than `choices`; None: those of `phi`.
        budget: effective parameters of teacher and student, ends included; None: those of 4 bits in all layers but the ends.
        bits: for `manual` one number per layer but the ends, for `uniform` one number.
        seed: of `random`.
    """

    method: str = "hqs"
    phi: str = "ratio"
    share: str = "pair"
    ends_bits: int = 8
    choices: tuple[int, ...] = (2, 3, 4, 8)
    edges: tuple[float, ...] | None = None
    budget: float | None = None
    bits: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Allocation:
    """Bits of every layer, and why: scores and, for the layers but the ends, scores divided by their mean. Plain data."""

    teacher_bits: list[int]
    student_bits: list[int]
    scores: list[float]
    relative_scores: list[float]
    method: str


def allocate(
    options: AllocationOptions,
    teacher_parameters: Sequence[int],
    student_parameters: Sequence[int],
    scores: Sequence[float] = (),
    perturbations: Sequence[Sequence[float]] = (),
) -> Allocation:
    """Bits of each layer of both networks, ends pinned.

    Args:
        teacher_parameters, student_parameters: parameters of each layer.
        scores: one per layer, more bits for a higher one; `ompq` takes its orthogonality theta, `manual`, `uniform`, `random`
            and `hawq` need none.
        perturbations: for `hawq`, Omega per layer and choice (`quantize.scores.perturbations`), of what shares bits summed.

    Raises:
        UserError: options that contradict each other or the network, or a budget too small for the fewest bits.
        NumericError: a score that is not finite.
    """
    layers = len(student_parameters)
    _check_options(options, layers)
    _check_scores(options, layers, scores, perturbations)
    fixed, free = _parameters_to_share(options, teacher_parameters, student_parameters)
    budget_bits = 4 * sum(free) if options.budget is None else _EFFECTIVE * options.budget - options.ends_bits * fixed
    best = partial(best_within_budget, parameters=free, choices=options.choices, budget_bits=budget_bits)
    bits = [options.ends_bits, *_inner_bits(options, best, scores, perturbations, layers - 2), options.ends_bits]
    return Allocation(
        teacher_bits=bits if options.share == "pair" else [options.ends_bits] * len(bits),
        student_bits=list(bits),
        scores=[float(score) for score in scores],
        relative_scores=relative_to_mean(scores[1:-1]),
        method=options.method,
    )


def _check_options(options: AllocationOptions, layers: int) -> None:
    for name, allowed in (("method", METHODS), ("phi", PHIS), ("share", SHARES)):
        if getattr(options, name) not in allowed:
            raise UserError(f"{name} {getattr(options, name)!r} of the bit allocation: choose from {', '.join(allowed)}")
    if layers < 3:
        raise UserError(f"bits are allocated between the first and the last of three or more layers, not of {layers}")
    if not all(_FEWEST <= bits <= _MOST for bits in (options.ends_bits, *options.choices, *options.bits)):
        raise UserError(f"a layer takes {_FEWEST} to {_MOST} bits: correct those of the ends, the choices or the list")
    if len(options.choices) < 2 or list(options.choices) != sorted(set(options.choices)):
        raise UserError(f"choices of bits must be two or more in ascending order, not {list(options.choices)}")
    numbers, expected = len(options.bits), {"manual": layers - 2, "uniform": 1}.get(options.method)
    if expected not in (None, numbers):
        wanted = "one number" if expected == 1 else f"{expected} numbers, one per layer between the ends"
        raise UserError(f"{options.method} allocation takes {wanted} (--bits), not {numbers}")
    edges, steps = _edges(options), len(options.choices) - 1
    if options.phi in _EDGES and options.method in ("hqs", "inverted") and (len(edges) != steps or edges != sorted(edges)):
        raise UserError(f"{steps + 1} choices of bits need {steps} ascending edges, not {edges}")


def _edges(options: AllocationOptions) -> list[float]:
    return list(_EDGES.get(options.phi, ()) if options.edges is None else options.edges)


def _check_scores(
    options: AllocationOptions, layers: int, scores: Sequence[float], perturbations: Sequence[Sequence[float]]
) -> None:
    if options.method in ("hqs", "ompq", "budget", "inverted") and len(scores) != layers:
        raise UserError(f"{options.method} allocation needs a score for each of {layers} layers, not {len(scores)}")
    if options.method == "hawq" and [len(row) for row in perturbations] != [len(options.choices)] * layers:
        raise UserError(f"hawq allocation needs Omega of {layers} layers at {len(options.choices)} choices of bits each")
    for layer, values in enumerate([*zip(scores), *perturbations]):
        if not all(map(math.isfinite, values)):
            raise NumericError(f"the score of layer {layer % layers + 1} is not finite: check the weights and the images")


def relative_to_mean(scores: Sequence[float]) -> list[float]:
    """Scores divided by their mean; all 1 where that is 0."""
    mean = sum(scores) / len(scores) if scores else 0.0
    return [score / mean if mean else 1.0 for score in scores]


def bits_by_edges(values: Sequence[float], edges: Sequence[float], choices: Sequence[int]) -> list[int]:
    """Non-decreasing steps: a value takes the next choice from each edge on, at the last edge only above it."""
    *lower, last = edges
    return [choices[sum(value >= edge for edge in lower) + (value > last)] for value in values]


def bits_by_rank(scores: Sequence[float], choices: Sequence[int]) -> list[int]:
    """The share of layers up to a layer's rank picks its choice: two layers get the second and the last of four.

    Equal scores share the mean of their ranks, and so get equal bits.
    """
    ranks = [sum(other < score for other in scores) + (sum(other == score for other in scores) + 1) / 2 for score in scores]
    return [choices[math.ceil(rank * len(choices) / len(scores)) - 1] for rank in ranks]


def inverted_bits(scores: Sequence[float], bits: Sequence[int]) -> list[int]:
    """The same bits handed out in the opposite order of the scores: the control of a rule that claims to know the order."""
    order = sorted(range(len(bits)), key=lambda layer: (scores[layer], layer))
    inverted = [0] * len(bits)
    for layer, layer_bits in zip(order, sorted(bits, reverse=True), strict=True):
        inverted[layer] = layer_bits
    return inverted


def best_within_budget(
    values: Sequence[Sequence[float]], parameters: Sequence[int], choices: Sequence[int], budget_bits: float
) -> list[int]:
    """Bits of each layer with the largest sum of values, (layers, choices), that cost at most `budget_bits` in all.

    Up to 4^8 combinations are tried one by one, of equals the smallest wins; more go to an integer program.

    Raises:
        UserError: even the fewest bits cost more.
        ResourceError: the integer program found no solution.
    """
    fewest = sum(count * choices[0] for count in parameters)
    if fewest > budget_bits:
        raise UserError(
            f"the budget leaves {budget_bits / _EFFECTIVE:,.0f} effective parameters to all layers but the ends, which need "
            f"{fewest / _EFFECTIVE:,.0f} at {choices[0]} bits: raise the budget (--budget) by "
            f"{math.ceil((fewest - budget_bits) / _EFFECTIVE):,} or more"
        )
    if len(choices) ** len(parameters) <= _MOST_COMBINATIONS:
        picks = _best_of_all(values, parameters, choices, budget_bits)
    else:
        picks = _best_of_program(values, parameters, choices, budget_bits)
    return [choices[pick] for pick in picks]


def _best_of_all(
    values: Sequence[Sequence[float]], parameters: Sequence[int], choices: Sequence[int], budget_bits: float
) -> list[int]:
    layers = len(parameters)
    picks = np.array(list(itertools.product(range(len(choices)), repeat=layers)))  # (combinations, layers)
    costs = np.asarray(choices)[picks] @ np.asarray(parameters)
    sums = np.asarray(values, dtype=float)[np.arange(layers), picks].sum(axis=1)
    sums[costs > budget_bits] = -np.inf
    return picks[np.lexsort((costs, -sums))[0]].tolist()


def _best_of_program(
    values: Sequence[Sequence[float]], parameters: Sequence[int], choices: Sequence[int], budget_bits: float
) -> list[int]:
    """One variable in {0, 1} per layer and choice; exactly one of each layer is 1."""
    table = np.asarray(values, dtype=float)
    table = table / (np.abs(table).max() or 1.0)  # the solver's tolerances are absolute
    unit = math.gcd(*parameters)
    costs = np.outer(np.asarray(parameters) // unit, choices).ravel()
    one_of_each = np.kron(np.eye(len(parameters)), np.ones(len(choices)))
    solution = milp(
        -table.ravel(),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_of_each, 1, 1), LinearConstraint(costs, -np.inf, budget_bits // unit)],
        options={"mip_rel_gap": 0.0},
    )
    if solution.x is None:
        raise ResourceError(f"no bits were found for {len(parameters)} layers: {solution.message}")
    return solution.x.reshape(table.shape).argmax(axis=1).tolist()


def _parameters_to_share(options: AllocationOptions, teacher: Sequence[int], student: Sequence[int]) -> tuple[int, list[int]]:
    """Parameters that stay at the bits of the ends, and those per layer whose bits are free."""
    if options.share == "pair":
        free = [first + second for first, second in zip(teacher, student, strict=True)][1:-1]
    else:
        free = list(student)[1:-1]
    return sum(teacher) + sum(student) - sum(free), free


def _inner_bits(
    options: AllocationOptions,
    best: Callable[[Sequence[Sequence[float]]], list[int]],
    scores: Sequence[float],
    perturbations: Sequence[Sequence[float]],
    layers: int,
) -> list[int]:
    """Bits of the layers between the ends; `best` solves for a table of values (layers, choices)."""
    choices, between = options.choices, scores[1:-1]
    if options.method == "manual":
        return list(options.bits)
    if options.method == "uniform":
        return list(options.bits) * layers
    if options.method == "random":
        generator = random.Random(options.seed)  # noqa: S311 (a control, not a secret)
        return [generator.choice(choices) for _ in range(layers)]
    if options.method == "ompq":  # the importance of a layer is the mean over it and all that follow
        return best(_times_bits([float(np.mean(scores[layer:])) for layer in range(1, layers + 1)], choices))
    if options.method == "hawq":
        return best([[-omega for omega in of_layer] for of_layer in perturbations[1:-1]])
    if options.method == "budget" or options.phi == "budget":
        bits = best(_times_bits(between, choices))
    elif options.phi == "rank":
        bits = bits_by_rank(between, choices)
    else:
        values = relative_to_mean(between) if options.phi == "ratio" else between
        bits = bits_by_edges(values, _edges(options), choices)
    return inverted_bits(between, bits) if options.method == "inverted" else bits


def _times_bits(scores: Sequence[float], choices: Sequence[int]) -> list[list[float]]:
    return [[score * bits for bits in choices] for score in scores]
