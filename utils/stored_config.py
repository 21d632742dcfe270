"""`config.yaml` of a run folder: the settings of a training, checked against the flags that they came from."""

import argparse
from functools import cache
from pathlib import Path

from common import schema
from common.readers import Source, read_yaml
from datasets.catalog import ListingOptions
from utils.arguments import base_parser, parse
from utils.flag_checks import check_of
from utils.hosts import HOSTS, INP_FORMER

EARLIER_DEFAULTS = {  # of flags that runs from before do not name
    "host": INP_FORMER.name,
    "scoring": "reconstruction",
    "realiad_json": ListingOptions().realiad_json,
    "adam_eps": 1e-10,
    "optimizer": "stable_adamw",
    "adam_beta1": 0.9,
    "metric_size": 256,
    "smoothing_border": "zeros",
    "true_false": "off",
    "interpolation": "bilinear",
    "holdout": 0.0,
    "schedule": "cosine",
}
_ANY_TEXT = ("dataset",)  # a run on a data set that this version does not know has readable results all the same


def read_stored_config(path: Path) -> dict:
    """Settings as they stand in the file, whatever of them is there.

    Raises:
        DamagedFile: it is no YAML of settings, of an unknown host, or a setting has a value that its flag does not take.
    """
    source = Source(path, "run folder", "correct that file, or choose another --save_name")
    stored = read_yaml(source)
    host = stored.get("host", INP_FORMER.name)
    if not isinstance(host, str) or host not in HOSTS:
        raise source.damaged(f"is of a run of {host!r}; known hosts are {' '.join(HOSTS)}")
    actions = {action.dest: action for action in _parser(host)._actions}
    own = _own_flags(host)
    for name, value in stored.items():
        if name in actions and not _fits(actions[name], value, may_be_none=name in own):
            raise source.damaged(f"has {name} {value!r:.50}, which this version does not take")
    return stored


def completed_config(stored: dict) -> dict:
    """Settings with the values of flags that are newer than the run."""
    stored = {**EARLIER_DEFAULTS, **stored}
    return {**_defaults(stored["host"]), **stored}


@cache
def _parser(host: str) -> argparse.ArgumentParser:
    return base_parser("", HOSTS[host], ["single", "multi", "few"])


@cache
def _own_flags(host: str) -> set[str]:
    """Flags of one host alone, for which a stage without use for them stores None."""
    parser = argparse.ArgumentParser()
    HOSTS[host].add_flags(parser)
    return {action.dest for action in parser._actions}


@cache
def _defaults(host: str) -> dict:
    return vars(parse(base_parser("", HOSTS[host], ["single"]), []))


def _fits(action: argparse.Action, value: object, may_be_none: bool) -> bool:
    """Whether a flag can have had this value."""
    if value is None:
        return may_be_none or action.default is None
    check = schema.text if action.dest in _ANY_TEXT else check_of(action)
    if action.nargs == "+" and isinstance(value, list):
        check = schema.sequence_of(check, 1)
    try:
        check(value, action.dest)
    except ValueError:
        return False
    return True
