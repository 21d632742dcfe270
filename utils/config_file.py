"""`--config FILE.yaml`: defaults by flag name."""

import argparse
import difflib
from pathlib import Path

from common.errors import UserError
from common.readers import Source, read_yaml


def config_tokens(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The settings of a YAML file as command-line words, so that argparse checks them as it checks typed ones.

    Raises:
        UserError: no readable YAML, no settings, an unknown one (with the nearest name), or a value of another kind.
    """
    source = Source(path, "settings", "correct it, or give another file as --config")
    content = read_yaml(source)
    host = parser.get_default("host")
    if host and content.get("host", host) != host:
        raise UserError(
            f"--config {str(path)!r} is of a run on {content['host']!r:.50}, this script trains {host}; give one of that host"
        )
    flags = {
        action.dest: action for action in parser._actions if action.option_strings and action.dest not in ("help", "config")
    }
    tokens = []
    for key, value in content.items():
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see --help"
            raise UserError(f"--config {str(path)!r}: unknown setting {key!r:.50}; {hint}")
        if value is None:
            continue
        if value is False and "off" in (flags[key].choices or str(flags[key].metavar).split("|")):
            value = "off"  # what YAML makes of an unquoted off
        if flags[key].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"--config {str(path)!r}: {key} must be true or false, found {value!r:.50}")
            negative = [f"--no-{key}"] if isinstance(flags[key], argparse.BooleanOptionalAction) else []
            tokens += [f"--{key}"] if value else negative
        elif isinstance(value, list) and flags[key].nargs == "+" and value and all(map(_is_plain, value)):
            tokens += [f"--{key}", *map(str, value)]
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            tokens += [f"--{key}={value}"]
        else:
            raise UserError(f"--config {str(path)!r}: {key} has the unusable value {value!r:.50}")
    return tokens


def _is_plain(value: object) -> bool:
    """Whether an entry of a list is one word that cannot be taken for a flag."""
    return isinstance(value, (str, int, float)) and not str(value).startswith("-")
