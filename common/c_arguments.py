"""What a function in C may be given: types, dimensions and sizes of its arrays, checked before C reads memory by them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

MOST_ELEMENTS = 2**31 - 1
PLAIN_TENSORS = (Tensor, Parameter)  # others may be traced only, and have no numbers in memory


@dataclass(frozen=True)
class Argument:
    """An array. Its dimensions are names of sizes, which are the same in all arrays of an operator, or numbers."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[str | int, ...]
    optional: bool = False


class _Kind(NamedTuple):
    """All of a tensor that decides whether it fits."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    has_numbers: bool


@dataclass(frozen=True, eq=False)
class Signature:
    """What an operator takes, and the shapes of what it makes: results and scratch memory.

    `derived` are sizes that follow from others. Only those in `may_be_zero` may be 0; then the result is empty. An argument may
    have gaps in memory: whoever calls C makes dense copies, after the check.
    """

    operator: str
    arguments: tuple[Argument, ...]
    made: tuple[tuple[str | int, ...], ...]
    derived: Mapping[str, Callable[[Mapping[str, int]], int]] = field(default_factory=dict)
    may_be_zero: frozenset[str] = frozenset({"rows"})

    def check(self, *values: Tensor | None, **numbers: int) -> Mapping[str, int]:
        """Sizes by their names, `numbers` among them.

        Types matter on the CPU only: elsewhere torch computes, in whatever it is given.

        Raises:
            TypeError: an array is missing or of a type that C does not read.
            ValueError: dimensions, sizes, devices or places in memory do not fit, or an array would have 2^31 elements or more.
        """
        kinds = [
            None
            if value is None
            else _Kind(value.shape, value.dtype, value.device, value.layout is torch.strided and type(value) in PLAIN_TENSORS)
            for value in values
        ]
        return _checked_sizes(self, tuple(kinds), tuple(numbers.items()))

    @cached_property
    def sources(self) -> dict[str, tuple[int, int]]:
        """The argument and the dimension that a size comes from which is neither given nor derived."""
        found: dict[str, tuple[int, int]] = {}
        for place, argument in enumerate(self.arguments):
            for dimension, size in enumerate(argument.shape):
                if isinstance(size, str) and size not in self.derived and not argument.optional:
                    found.setdefault(size, (place, dimension))
        return found


@lru_cache(maxsize=1024)  # a network calls with few shapes, many times
def _checked_sizes(
    signature: Signature, kinds: tuple[_Kind | None, ...], numbers: tuple[tuple[str, int], ...]
) -> dict[str, int]:
    named = list(zip(signature.arguments, kinds, strict=True))
    got = ", ".join(f"{argument.name} {kind if kind is None else tuple(kind.shape)}" for argument, kind in named)

    def refuse(what: str, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"{signature.operator}: {what}; got {got}")

    def check_least(sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            if size < 1 and (size < 0 or name not in signature.may_be_zero):
                refuse(f"{name} is {size}, expected at least 1")

    for argument, kind in named:
        if kind is not None:
            _check_kind(argument, kind, refuse)
        elif not argument.optional:
            refuse(f"{argument.name} is missing", TypeError)
    present = [(argument, kind) for argument, kind in named if kind is not None]
    devices = {kind.device for _, kind in present}
    if len(devices) > 1:
        where = ", ".join(f"{argument.name} on {kind.device}" for argument, kind in present)
        refuse(f"all must be on one device, but {where}")
    sizes = {name: kinds[place].shape[dimension] for name, (place, dimension) in signature.sources.items()} | dict(numbers)
    check_least(sizes)
    derived: dict[str, int] = {}
    for name, derive in signature.derived.items():
        derived[name] = derive(sizes | derived)
    check_least(derived)
    sizes |= derived
    for argument, kind in present:
        expected = tuple(sizes.get(size, size) for size in argument.shape)
        if kind.shape != expected:
            refuse(f"{argument.name} is not {_named(argument.shape)} = {expected}")
    for shape in signature.made:
        elements = math.prod(sizes.get(size, size) for size in shape)
        if elements > MOST_ELEMENTS:
            refuse(f"{_named(shape)} = {elements} elements would be made, at most {MOST_ELEMENTS} are possible")
    return sizes


def _check_kind(argument: Argument, kind: _Kind, refuse: Callable[..., NoReturn]) -> None:
    """Type, number of dimensions, memory layout and number of elements."""
    if kind.device.type == "cpu" and kind.dtype not in argument.dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in argument.dtypes)
        refuse(f"{argument.name} is {kind.dtype}, expected {wanted}", TypeError)
    if len(kind.shape) != len(argument.shape):
        refuse(f"{argument.name} has {len(kind.shape)} dimensions, expected {_named(argument.shape)}")
    if not kind.has_numbers:
        refuse(f"{argument.name} is sparse, or of a class that may have no numbers in memory")
    elements = math.prod(kind.shape)
    if elements > MOST_ELEMENTS:
        refuse(f"{argument.name} has {elements} elements, at most {MOST_ELEMENTS} are possible")


def _named(shape: tuple[str | int, ...]) -> str:
    return f"({', '.join(map(str, shape))})"
