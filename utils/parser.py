"""Parsers of all commands: errors of one sentence, the nearest name for an unknown flag, --quiet and --debug."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn


class OneSentenceParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one sentence, without the usage before it; flags are not abbreviated."""

    config: str | None = None

    def __init__(self, description: str | None = None, **options):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )

    def parse_args(self, args: Sequence[str], namespace: argparse.Namespace | None = None) -> argparse.Namespace:
        """As argparse, which would speak of missing flags before it speaks of a misspelt one."""
        for word in args:
            name = word.split("=")[0]
            if word == "--":
                break
            if name.startswith("--") and " " not in word and name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unknown flag {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the process with code 2 and one sentence."""
        source = f" (on the command line or in --config {self.config!r})" if self.config else ""
        self.exit(2, f"error: {' '.join(message.split())}{source}; see --help\n")


def tool_parser(doc: str) -> OneSentenceParser:
    """The parser of a command of `scripts`, with the flags that all have."""
    parser = OneSentenceParser(doc)
    add_message_flags(parser)
    return parser


def add_message_flags(group) -> None:
    """The flags that say how much a command tells."""
    group.add_argument("--quiet", action="store_true", help="warnings and results only")
    group.add_argument("--debug", action="store_true", help="show tracebacks")
