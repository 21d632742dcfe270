"""Check plain values from files against what they should be, and say in words where they differ."""

import math
import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor

Check = Callable[[object, str], None]  # value, its name for messages -> ValueError if the value is another
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST = 60  # characters of a value in a message


def expected(name: str, wanted: str, value: object) -> ValueError:
    """The error of a value that is another than wanted."""
    found = repr(value)
    found = found if len(found) <= _LONGEST else f"{found[:_LONGEST]}..."
    return ValueError(f"{name or 'all of it'} should be {wanted}, found {found}")


def whole(low: int, high: int) -> Check:
    """An integer within limits; true and false are none."""

    def check(value: object, name: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise expected(name, f"an integer from {low} to {high}", value)

    return check


def real(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number within limits."""

    def check(value: object, name: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high or abs(value) == math.inf:
            limits = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
            raise expected(name, f"a finite number{limits}", value)

    return check


def one_of(*choices: object) -> Check:
    """One of some values, of the same type."""

    def check(value: object, name: str) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise expected(name, " or ".join(map(repr, choices)), value)

    return check


def text(value: object, name: str) -> None:
    """A string that can be written: of surrogates only those that stand for bytes of a file's name."""
    if not isinstance(value, str):
        raise expected(name, "text", value)
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise expected(name, "text", ascii(value)) from None


def sha256(value: object, name: str) -> None:
    """64 hexadecimal digits."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise expected(name, "64 hexadecimal digits", value)


def tensor(value: object, name: str) -> None:
    """Any tensor."""
    if not isinstance(value, Tensor):
        raise expected(name, "a tensor", value)


def no_tensors(value: object, name: str) -> None:
    """Anything without a tensor in it, so that it can be compared and printed."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name} should be no tensor")
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ():
        no_tensors(part, f"{name}[{key!r:.{_LONGEST}}]")


def mapping(value: object, name: str) -> None:
    """Any mapping from text."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise expected(name, "a mapping from names", value)


count = whole(0, 2**63 - 1)  # what 64 bits hold
number = real(-1e300, 1e300)  # finite also once it is multiplied


def optional(check: Check) -> Check:
    """None, or what `check` wants."""
    return lambda value, name: None if value is None else check(value, name)


def sequence_of(check: Check, least: int = 0, most: int = 100_000) -> Check:
    """A list or tuple of so many values that `check` wants."""

    def check_all(value: object, name: str) -> None:
        if not isinstance(value, list | tuple) or not least <= len(value) <= most:
            raise expected(name, f"a list of {least}" + (f" to {most} values" if most != least else " values"), value)
        for index, part in enumerate(value):
            check(part, f"{name}[{index}]")

    return check_all


def mapping_to(check: Check) -> Check:
    """A mapping from names to what `check` wants."""

    def check_all(value: object, name: str) -> None:
        mapping(value, name)
        for key, part in value.items():
            check(part, f"{name}[{key!r}]")

    return check_all


def fields(required: Mapping[str, Check], others: Mapping[str, Check] | None = None, unknown: bool = False) -> Check:
    """A mapping with all required keys, perhaps others; further ones only with `unknown`."""
    known = {**required, **(others or {})}

    def check(value: object, name: str) -> None:
        mapping(value, name)
        prefix = f"{name}." if name else ""
        missing = [key for key in required if key not in value]
        if missing:
            raise ValueError(f"{_listed(prefix, missing)} missing")
        surplus = [] if unknown else [key for key in value if key not in known]
        if surplus:
            raise ValueError(f"{_listed(prefix, surplus)} unknown")
        for key, part in value.items():
            if key in known:
                known[key](part, f"{prefix}{key}")

    return check


def _listed(prefix: str, keys: Collection[str]) -> str:
    names = [repr(f"{prefix}{key}"[:_LONGEST]) for key in list(keys)[:3]]
    return ", ".join(names) + (f" and {len(keys) - 3} more are" if len(keys) > 3 else " are" if len(keys) > 1 else " is")
