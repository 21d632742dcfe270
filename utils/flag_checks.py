"""What a flag of the command line takes, as a check of the value that a file stores for it."""

import argparse

from common import schema
from common.errors import UserError
from common.schema import Check


def check_of(action: argparse.Action, largest: int = 2**63) -> Check:
    """The rule of a flag for one value that was parsed and stored; whole numbers up to `largest`."""
    if action.nargs == 0:
        return schema.one_of(False, True)
    if action.choices is not None:
        return schema.one_of(*action.choices)

    def check(value: object, name: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise schema.expected(name, "a number or text", value)
        if isinstance(value, float):
            schema.real()(value, name)
        try:
            fits = action.type is None or action.type(str(value)) == value
        except (argparse.ArgumentTypeError, ValueError, UserError) as error:
            raise schema.expected(name, f"what --{action.dest} takes", value) from error
        if not fits or (isinstance(value, int) and value > largest):
            raise schema.expected(name, f"what --{action.dest} takes", value)

    return check
