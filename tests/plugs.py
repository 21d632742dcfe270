"""Faults that are put into a command before it begins (see `tests.commands`, `plug`)."""

from pathlib import Path

import utils.run_folder


def raise_unexpectedly() -> None:
    """A bug: results cannot be written, for a reason nobody thought of."""

    def write_results(*arguments):
        raise TypeError("a bug")

    utils.run_folder.write_results = write_results


def keep_training_state() -> None:
    """A finished training leaves its last.pth, as one that ends before its last evaluation does."""
    unlink = Path.unlink

    def unlink_others(path: Path, *arguments, **options) -> None:
        if path.name != "last.pth":
            unlink(path, *arguments, **options)

    Path.unlink = unlink_others
