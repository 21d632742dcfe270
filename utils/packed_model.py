"""From a trained detector to a packed model file and back: which part is stored in which precision, and what is said of it."""

import logging
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from binarize.int8 import to_int8
from binarize.packed import read_file, to_bytes
from binarize.packed_blocks import pack_modules
from binarize.runtime import prepare_modules
from common.errors import UserError
from models.build import ENCODERS, build_encoder_without_weights
from models.detector import Detector
from utils.host import BINARY_KEYS
from utils.hosts import HOSTS
from utils.packed_description import ENCODER_PRECISIONS, TRAINED_PRECISIONS, check_description
from utils.raad_packed import skeleton, state_of

logger = logging.getLogger(__name__)

# of a training's configuration: what determines the network; the rest may name files of the machine that trained it
_NETWORK_KEYS = ("pos_embed", "input_size", "crop_size", *BINARY_KEYS)
_WEIGHTS_OF_SCANS = ("x_proj", "step_weight", "start")
_VECTORS_OF_TWO_DIMENSIONS = ("prototype_token", "step_bias", "skip", "usual_error", "error_deviation")
_FLOAT_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float16}


@dataclass(frozen=True)
class PackingOptions:
    """Precision of the encoder (`fp32` `bf16` `int8`) and of what is trained but not binary (`fp32` `fp16` `int8`).

    `encoder_reference`: store the encoder's name and hash instead of its weights.
    """

    encoder: str = "int8"
    trained: str = "int8"
    encoder_reference: bool = False

    def __post_init__(self):
        if self.encoder not in ENCODER_PRECISIONS or self.trained not in TRAINED_PRECISIONS:
            raise ValueError(f"unknown precision {self.encoder!r} or {self.trained!r}")


def pack_detector(detector: Detector, options: PackingOptions) -> None:
    """Bring a trained detector into the form that its file will have, in place; it then computes as the loaded file does."""
    _replace_modules(detector, options)
    _round(_tensors(detector), options)
    prepare_modules(detector.eval().requires_grad_(False))


def _round(tensors: dict[str, Tensor], options: PackingOptions) -> None:
    """Give tensors the values that they have, or would have, in a file."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(_stored_type(name, tensor, options)).to(_working_type(name, options))


def _replace_modules(detector: Detector, options: PackingOptions) -> None:
    pack_modules(detector)
    if options.trained == "int8":
        for name, part in detector.named_children():
            if name != "encoder":
                to_int8(part)
    if options.encoder == "int8":
        to_int8(detector.encoder)
    elif options.encoder == "bf16" and _computes_bfloat16():
        detector.encoder.to(torch.bfloat16)


def _tensors(detector: nn.Module) -> dict[str, Tensor]:
    """All that is stored: parameters and buffers, also those that a ViT keeps out of its state dict."""
    return {**dict(detector.named_parameters()), **dict(detector.named_buffers())}


def _stored_type(name: str, tensor: Tensor, options: PackingOptions) -> torch.dtype:
    """Scales, thresholds, biases, norms and prototypes stay float32: rounding them would change binary decisions."""
    if name.startswith("encoder."):
        return _FLOAT_TYPES[options.encoder]
    leaf = name.rpartition(".")[2]
    # a head's scales and gates have three dimensions
    is_weight = leaf in _WEIGHTS_OF_SCANS if tensor.ndim != 2 else leaf not in _VECTORS_OF_TWO_DIMENSIONS
    return _FLOAT_TYPES[options.trained] if is_weight else torch.float32


def _working_type(name: str, options: PackingOptions) -> torch.dtype:
    is_bfloat16 = name.startswith("encoder.") and options.encoder == "bf16" and _computes_bfloat16()
    return torch.bfloat16 if is_bfloat16 else torch.float32


@cache
def _computes_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it is four times slower than float32 (said once)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    has_instructions = any(value for name, value in capabilities.items() if name.endswith("bf16"))
    if has_instructions and torch.backends.cpu.get_cpu_capability() != "AVX2":
        return True
    logger.warning("the bfloat16 encoder runs in float32: this CPU has no bfloat16 arithmetic")
    return False


def packed_bytes(detector: Detector, options: PackingOptions, description: dict) -> bytes:
    """Content of the file of a packed detector; `description` comes from `describe`."""
    stored = {}
    for name, tensor in _tensors(detector).items():
        if name.startswith("encoder.") and options.encoder_reference:
            continue
        if tensor.is_floating_point():
            tensor = tensor.to(_stored_type(name, tensor, options))
        elif tensor.dtype == torch.int32:  # intervals of mismatch counts, at most a row's length
            tensor = tensor.to(torch.int16)
        stored[name] = tensor.detach().cpu()
    return to_bytes(stored, {**description, "precision": asdict(options)})


def describe(detector: Detector, content: dict, threshold: dict, transform: dict) -> dict:
    """What the file says of its model: all that is needed to build, feed and judge it, in plain types.

    Args:
        content: of the `model.pth` it comes from.
        threshold: decision threshold and its origin.
        transform: sizes, mean and standard deviation of the pre-processing.
    """
    encoder = detector.encoder
    return {
        "host": content["host"],
        "item": content["item"],
        "stage": content["stage"],
        "encoder": {
            "name": encoder.name,
            "source": encoder.source,
            "sha256": encoder.weights_sha256,
            "published_parameters": encoder.published_parameters,
            "taps": encoder.taps,
            "heads": ENCODERS[encoder.name].num_heads,
        },
        "config": {key: content["config"][key] for key in (*_NETWORK_KEYS, *HOSTS[content["host"]].network_flags)},
        "preprocessing": transform,
        "protocol": content["protocol"],
        "calibration": {key: content["calibration"][key] for key in ("map_median", "map_limit")},
        "decision": threshold,
    }


def load_packed(path: Path, device: torch.device | str = "cpu", encoder_weights: str | None = None) -> tuple[Detector, dict]:
    """The packed detector of a `*.binaryad` file, ready to run, and the file's description.

    Args:
        encoder_weights: for a file that only names its encoder; by default they are looked for as in training.

    Raises:
        UserError: no such file, damaged, foreign, too new, or its encoder cannot be had.
    """
    tensors, description = read_file(path)
    detector = restore_packed(tensors, description, str(path), encoder_weights)
    prepare_modules(detector.to(device))
    return detector, description


def restore_packed(tensors: dict[str, Tensor], description: dict, name: str, encoder_weights: str | None = None) -> Detector:
    """The detector that a file's tensors and description are of, on the CPU; its modules are not prepared yet.

    Raises:
        UserError: they are of no model this program knows, with the file's `name`; or as `load_packed` does.
    """
    try:
        check_description(description)
        if HOSTS[description["host"]].binarizes:
            options = PackingOptions(**description["precision"])
            detector = _skeleton(description, options, encoder_weights)
        else:
            options, detector = PackingOptions("fp32", "fp32"), skeleton(description)
            tensors = state_of(detector, tensors)
        _fill(detector, tensors, options)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"model unusable: {name!r} does not describe a model this program knows ({error}); export it again"
        ) from error
    return detector.eval()


def _skeleton(description: dict, options: PackingOptions, encoder_weights: str | None) -> Detector:
    """The network of a description, without values, but for an encoder that is only referred to."""
    config, named = description["config"], description["encoder"]
    host = HOSTS[description["host"]]
    with torch.device("meta"):
        encoder = build_encoder_without_weights(
            named["name"], config["crop_size"], named["source"], named["sha256"], named["published_parameters"], host.taps
        )
        detector = host.build(encoder, config)
        host.convert(detector, description["stage"], config, {})
    if options.encoder_reference:
        detector.encoder = host.build_encoder(named["name"], config["crop_size"], encoder_weights, config["pos_embed"])
        if detector.encoder.weights_sha256 != named["sha256"]:
            raise UserError(
                f"wrong encoder: the model was trained on {named['name']} from {named['source']} of sha256 "
                f"{named['sha256'][:16]}, {detector.encoder.source} has {detector.encoder.weights_sha256[:16]}; give "
                "--encoder_weights FILE with the weights of the training"
            )
    _replace_modules(detector, options)
    _round({name: tensor for name, tensor in _tensors(detector).items() if tensor.device.type != "meta"}, options)
    return detector


def _fill(detector: Detector, tensors: dict[str, Tensor], options: PackingOptions) -> None:
    """Put a file's tensors into a skeleton; raises ValueError if names or shapes differ."""
    places = {
        name: (module, leaf)
        for prefix, module in detector.named_modules()
        for leaf in [*module._parameters, *module._buffers]
        if getattr(module, leaf) is not None and getattr(module, leaf).device.type == "meta"
        for name in [f"{prefix}.{leaf}" if prefix else leaf]
    }
    if places.keys() != tensors.keys():
        raise ValueError(f"tensors {sorted(places.keys() ^ tensors.keys())[:3]} are missing or surplus")
    for name, (module, leaf) in places.items():
        expected, value = getattr(module, leaf), tensors[name]
        if value.shape != expected.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")
        if expected.is_floating_point() and value.is_floating_point():
            value = value.to(_working_type(name, options))
        elif expected.dtype == torch.int32 and value.dtype == torch.int16:
            value = value.to(torch.int32)
        elif value.dtype != expected.dtype:
            raise ValueError(f"{name} has type {value.dtype}, expected {expected.dtype}")
        parameters = module._parameters if leaf in module._parameters else module._buffers
        parameters[leaf] = nn.Parameter(value, requires_grad=False) if leaf in module._parameters else value
