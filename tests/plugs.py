"""Faults that are put into a command before it begins (see `tests.commands`, `plug`)."""

import utils.run_folder


def raise_unexpectedly() -> None:
    """A bug: results cannot be written, for a reason nobody thought of."""

    def write_results(*arguments):
        raise TypeError("a bug")

    utils.run_folder.write_results = write_results
