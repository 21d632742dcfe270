"""`--config FILE.yaml`: defaults by flag name."""

import argparse
import difflib
from pathlib import Path

import yaml

from common.errors import UserError


def config_tokens(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The settings of a YAML file as command-line words, so that argparse checks them as it checks typed ones.

    Raises:
        UserError: no readable YAML, no settings, an unknown one (with the nearest name), or a value of another kind.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {str(path)!r} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--config {str(path)!r} is empty or no list of `flag: value` lines")
    host = parser.get_default("host")
    if host and content.get("host", host) != host:
        raise UserError(
            f"--config {str(path)!r} is of a run on {content['host']}, this script trains {host}; give a file of that host"
        )
    flags = {
        action.dest: action for action in parser._actions if action.option_strings and action.dest not in ("help", "config")
    }
    tokens = []
    for key, value in content.items():
        if key not in flags:
            near = difflib.get_close_matches(str(key), flags, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see --help"
            raise UserError(f"--config {str(path)!r}: unknown setting {key!r}; {hint}")
        if value is None:
            continue
        if value is False and "off" in (flags[key].choices or str(flags[key].metavar).split("|")):
            value = "off"  # what YAML makes of an unquoted off
        if flags[key].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"--config {str(path)!r}: {key} must be true or false, found {value!r}")
            negative = [f"--no-{key}"] if isinstance(flags[key], argparse.BooleanOptionalAction) else []
            tokens += [f"--{key}"] if value else negative
        elif isinstance(value, list) and flags[key].nargs == "+" and value:
            tokens += [f"--{key}", *map(str, value)]
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            tokens += [f"--{key}={value}"]
        else:
            raise UserError(f"--config {str(path)!r}: {key} has the unusable value {value!r}")
    return tokens
