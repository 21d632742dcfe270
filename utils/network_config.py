"""The flags that a file says its network and its protocol were made with, checked as the command line checks them."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import cache

from common import schema
from common.schema import Check
from utils.arguments import base_parser
from utils.flag_checks import check_of
from utils.host import BINARY_KEYS, Host
from utils.hosts import HOSTS
from utils.protocol import EvaluationOptions
from utils.settings import PROTOCOL_KEYS

LARGEST_SIDE = 8192  # of images, in pixels: far beyond what any network here can do
_LARGEST_NUMBER = 100_000  # of anything else that is counted
_SIDE = schema.whole(1, LARGEST_SIDE)
_LARGEST_KERNEL = 1023
_LATER = ("scoring", "metric_size", "smoothing_border", "true_false")  # of the protocol, that older files do not have


def _odd_or_zero(value: object, name: str) -> None:
    schema.whole(0, _LARGEST_KERNEL)(value, name)
    if value and not value % 2:
        raise schema.expected(name, "odd or 0", value)


_LIMITED: Mapping[str, Check] = {
    "input_size": _SIDE,
    "crop_size": _SIDE,
    "metric_size": schema.whole(0, LARGEST_SIDE),
    "smoothing_kernel": _odd_or_zero,
}


def flags_of(host: Host, names: Iterable[str]) -> dict[str, Check]:
    """What these flags of a host's script may be, by name."""
    return {name: _LIMITED.get(name) or _check_of(_actions(host.name)[name]) for name in names}


def network_flags(host: Host) -> dict[str, Check]:
    """What determines a host's network beside its stage."""
    of_kind = ("pos_embed", *BINARY_KEYS) if host.binarizes else ("output_bits",)
    return flags_of(host, ("input_size", "crop_size", *of_kind, *host.network_flags))


def check_network(config: Mapping[str, object], host: Host) -> None:
    """Raise ValueError unless a training's configuration has all that determines the network, within limits."""
    checks = {name: schema.optional(check) if name == "output_bits" else check for name, check in network_flags(host).items()}
    schema.fields(checks, unknown=True)(config, "config")  # a float model of RAAD has no bits


def protocol(host: Host) -> Check:
    """What a protocol may be."""
    needed = [field.name for field in fields(EvaluationOptions) if field.name not in _LATER]
    return schema.fields(flags_of(host, needed), flags_of(host, {*PROTOCOL_KEYS, *_LATER} - set(needed)))


@cache
def _actions(host: str) -> dict[str, argparse.Action]:
    return {action.dest: action for action in base_parser("", HOSTS[host], ["single"])._actions}


def _check_of(action: argparse.Action) -> Check:
    check = check_of(action, _LARGEST_NUMBER)
    check = schema.sequence_of(check, 1) if action.nargs == "+" else check
    return schema.optional(check) if action.default is None else check
