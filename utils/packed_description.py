"""What the description of a `*.binaryad` file must hold, whoever wrote it: its hash only says that it is as it was written."""

from collections.abc import Mapping

from common import schema
from common.schema import Check
from models.build import ENCODERS, PDN_ENCODERS
from utils.host import Host
from utils.hosts import HOSTS
from utils.network_config import LARGEST_SIDE, network_flags, protocol

ENCODER_PRECISIONS = ("fp32", "bf16", "int8")
TRAINED_PRECISIONS = ("fp32", "fp16", "int8")
_PRECISION = schema.fields(
    {
        "encoder": schema.one_of(*ENCODER_PRECISIONS),
        "trained": schema.one_of(*TRAINED_PRECISIONS),
        "encoder_reference": schema.one_of(False, True),
    }
)
_SIDE = schema.whole(1, LARGEST_SIDE)
_CALIBRATION = schema.fields({"map_median": schema.real(), "map_limit": schema.real()})
_COUNT = schema.whole(0, 10**12)


def printable(value: object, name: str) -> None:
    """One line of text that terminals and logs show as it is."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > 1000:
        raise schema.expected(name, "a line of text", value)


_DECISION = schema.fields(
    {
        "threshold": schema.real(),
        "quantile": schema.real(0, 1),
        "margin": schema.real(0),
        "images": _COUNT,
        "source": printable,
    }
)
_BITS = schema.sequence_of(schema.one_of(*range(2, 9), 32), 1, 100)
_COLOURS = schema.sequence_of(schema.real(), 3, 3)


def check_description(description: Mapping[str, object]) -> None:
    """Raise ValueError, with the place and what was expected there, unless a description is complete and within limits."""
    schema.fields({"host": schema.one_of(*HOSTS)}, unknown=True)(description, "")
    host = HOSTS[description["host"]]
    schema.fields(_description_of(host))(description, "")
    sizes, config = description["preprocessing"], description["config"]
    if sizes["crop_size"] > sizes["input_size"]:
        raise schema.expected("preprocessing.crop_size", f"at most input_size, {sizes['input_size']}", sizes["crop_size"])
    for name in ("input_size", "crop_size"):
        if config[name] != sizes[name]:
            raise schema.expected(f"config.{name}", f"{sizes[name]} as in preprocessing", config[name])


def _description_of(host: Host) -> dict[str, Check]:
    encoder = {"name": schema.one_of(*ENCODERS, *PDN_ENCODERS), "source": printable, "sha256": schema.sha256}
    if host.binarizes:
        further = {"precision": _PRECISION}
        encoder |= {
            "published_parameters": _COUNT,
            "taps": schema.sequence_of(schema.whole(0, 1000), 1, 1000),
            "heads": schema.whole(1, 1000),
        }
    else:
        further = {"bits": schema.fields(dict.fromkeys(("teacher", "student", "autoencoder"), _BITS))}
    return {
        "sha256": schema.sha256,
        "host": schema.one_of(host.name),
        "item": schema.text,
        "stage": schema.one_of(0, 1, 2),
        "encoder": schema.fields(encoder),
        "config": schema.fields(network_flags(host)),
        "preprocessing": schema.fields(
            {"input_size": _SIDE, "crop_size": _SIDE, "mean": _COLOURS, "std": _COLOURS}, {"interpolation": schema.text}
        ),
        "protocol": protocol(host),
        "calibration": _CALIBRATION,
        "decision": _DECISION,
        **further,
    }
