"""Converters for argparse: text to checked values."""

import argparse
import difflib
import math

from datasets.catalog import LAYOUTS


def number(kind: type, low: float, high: float = math.inf):
    """A converter for argparse: text -> kind within limits."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its messages
    return convert


class InOrder(argparse.Action):
    """Several of the choices, each once, kept in the order of the choices: the order on the command line means nothing."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(set(values)) < len(values):
            parser.error(f"argument {option_string}: one is named twice; give each once")
        setattr(namespace, self.dest, sorted(values, key=list(self.choices).index))


def dataset_names(text: str) -> str:
    """A converter for argparse: one known data set, or several joined with +."""
    for name in text.split("+"):
        if name not in LAYOUTS:
            near = difflib.get_close_matches(name, LAYOUTS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {' '.join(LAYOUTS)}"
            raise argparse.ArgumentTypeError(f"{name!r} is no data set; {hint}")
    return text
