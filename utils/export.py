"""Make a packed file from a checkpoint: its decision threshold, its proof, its size."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from binarize.stages import scale_parameters
from common.errors import NumericError, UserError
from datasets.layouts import LAYOUTS
from datasets.records import ImageDataset, Record
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, interpolation_entry
from models.detector import Detector
from models.efficientad import EfficientAD
from quantize.layers import quantized_layers
from utils.agreement import compare_on_bits, packed_copy
from utils.checkpoint import atomic_write, check_writable
from utils.detectors import load_detector, read_described
from utils.evaluation import SCALE_SIDE, calibrate_scale, evaluate
from utils.host import Config
from utils.hosts import HOSTS
from utils.network_config import protocol
from utils.onnx_export import export_onnx
from utils.packed_model import PackingOptions, describe, packed_bytes
from utils.protocol import EvaluationOptions
from utils.raad_export import describe_efficientad, export_codes, export_integers
from utils.tables import format_rows

logger = logging.getLogger(__name__)

DEFAULT_QUANTILE = 0.99
_CHECKED_IMAGES = 2
_LARGEST_SHARE_DIFFERING = 0.01  # rounding turns a few in a million; a wrong kernel or packing turns every other


@dataclass(frozen=True)
class ThresholdOptions:
    """Decision threshold: a quantile of the scores of normal images, times a margin.

    `images`: normal images to score with the exported model; None for the scores that training stored, of the category
    `item` alone if a model of many categories is meant for one.
    """

    quantile: float = DEFAULT_QUANTILE
    margin: float = 1.0
    images: list[Path] | None = None
    max_pixels: int = 0
    item: str | None = None


def check_exportable(content: dict, path: Path) -> None:
    """Raise UserError for a model that has no packed form, or as `check_complete` does."""
    host = HOSTS[content["host"]]
    if not host.binarizes and not _is_quantized(content):
        raise UserError(
            f"nothing to pack: {str(path)!r} is a float model of {content['host']}; export that of --stage quantize or "
            "finetune, or this one as it is with --output FILE.onnx"
        )
    if content["stage"] == 0 and not host.exports_float:
        raise UserError(
            f"nothing to pack: {str(path)!r} is a float model (CLB stage 0); train --clb_stage 1 and 2 from it, or export it "
            "as it is with --output FILE.onnx"
        )
    check_complete(content, path)


def _is_quantized(content: dict) -> bool:
    return any(".weight_quantizer." in name for name in content["model"])


def check_complete(content: dict, path: Path) -> None:
    """Raise UserError for a checkpoint without the scores that a threshold comes from, or with a protocol that is none."""
    missing = [key for key in ("protocol", "calibration") if key not in content]
    if missing or "scores" not in content["calibration"]:
        raise UserError(
            f"checkpoint incomplete: {str(path)!r} lacks the scores of normal images (it is a last.pth, or of an older "
            "version); export the model.pth of a finished training"
        )
    try:
        protocol(HOSTS[content["host"]])(content["protocol"], "protocol")
    except ValueError as error:
        raise UserError(f"checkpoint unusable: in {str(path)!r} {error}; train that model again") from error


def transform_of(content: dict) -> dict:
    """The pre-processing of a checkpoint's model in plain types."""
    config = content["config"]
    return {
        "input_size": config["input_size"],
        "crop_size": config["crop_size"],
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        **interpolation_entry(config.get("interpolation", "bilinear")),  # absent from older checkpoints
    }


def for_category(content: dict, item: str | None, path: Path) -> dict:
    """A checkpoint's content as if its model were trained for one of its categories; None for all of them.

    Raises:
        UserError: the model knows no such category.
    """
    if item is None or item == content["item"]:
        return content
    known = content.get("calibrations", {})
    if item not in known:
        raise UserError(
            f"--item {item!r}: {str(path)!r} was trained on {' '.join(known or [content['item']])}; choose from these"
        )
    return {**content, "item": item, "calibration": known[item]}


def export_packed(
    checkpoint: Path, output: Path, options: PackingOptions | None, threshold: ThresholdOptions, encoder_weights: str | None
) -> None:
    """Write the packed file of a `model.pth` and log what was proved and what it weighs.

    Args:
        options: None for the default, and for a quantized model, which has no choice.

    Raises:
        UserError: see `load_detector` and `check_exportable`; nothing is written then.
    """
    content = read_described(checkpoint)
    check_exportable(content, checkpoint)
    if options and _is_quantized(content):
        raise UserError(
            f"{str(checkpoint)!r} is quantized to the bits of its training, and what is float in it stays float32; leave out "
            "--encoder_precision, --trained_precision and --encoder_reference"
        )
    check_writable(output)
    detector, content = load_detector(checkpoint, encoder_weights)
    content = for_category(content, threshold.item, checkpoint)
    if quantized_layers(detector):
        _export_quantized(detector, content, output, threshold)
        return
    options = options or PackingOptions()
    if detector.trains_encoder and (options.encoder != "fp32" or options.encoder_reference):
        raise UserError(
            f"--encoder_precision {options.encoder}: {str(checkpoint)!r} changes its encoder (--adapter lora), which must then "
            "be in the file as it is; give --encoder_precision fp32 without --encoder_reference"
        )
    if content["config"]["act_bits"] == 1 and content["stage"] > 0:
        _prove(detector, content, checkpoint)
    packed = packed_copy(detector, options)
    decision, scale = _decision(packed, content, threshold)
    content = _with_scale(content, scale)
    file = packed_bytes(packed, options, describe(packed, content, decision, transform_of(content)))
    atomic_write(output, lambda stream: stream.write(file))
    logger.info("threshold: %.4f, from %s", decision["threshold"], decision["source"])
    logger.info("%s", _sizes(detector, packed, options, file))


def _export_quantized(detector: EfficientAD, content: dict, output: Path, threshold: ThresholdOptions) -> None:
    decision, scale = _decision(detector, content, threshold)
    metadata = describe_efficientad(detector, _with_scale(content, scale), decision, transform_of(content))
    table = export_codes(detector, metadata, output, content["config"]["crop_size"])
    logger.info("threshold: %.4f, from %s", decision["threshold"], decision["source"])
    logger.info("loaded back, the file gives the very maps of the trained model on images of noise\n%s", table)


def export_graph(checkpoint: Path, output: Path, threshold: ThresholdOptions, encoder_weights: str | None) -> None:
    """Write the ONNX graph of a `model.pth` of any stage; raises UserError as `load_detector` and `export_onnx` do."""
    check_writable(output)
    detector, content = load_detector(checkpoint, encoder_weights)
    check_complete(content, checkpoint)
    if not HOSTS[content["host"]].exports_graph:
        raise UserError(
            f"no ONNX form: {str(checkpoint)!r} is a model of {content['host']}, whose scan goes step by step; export it with "
            "--output FILE.binaryad"
        )
    content = for_category(content, threshold.item, checkpoint)
    decision, scale = _decision(detector, content, threshold)
    description = describe_efficientad if isinstance(detector, EfficientAD) else describe
    metadata = description(detector, _with_scale(content, scale), decision, transform_of(content))
    side = content["config"]["crop_size"]
    if quantized_layers(detector):
        report = export_integers(detector, metadata, output, side)
        logger.info("threshold: %.4f, from %s", decision["threshold"], decision["source"])
        logger.info("%s", report.describe())
        return
    difference = export_onnx(detector, metadata, output, side)
    logger.info("threshold: %.4f, from %s", decision["threshold"], decision["source"])
    logger.info("ONNX Runtime and torch: maps of noise differ by at most %.1e where no bit lies at its threshold", difference)


def _prove(detector: Detector, content: dict, checkpoint: Path) -> None:
    """Compare the decoder on bits with the trained one on two images of noise; raises NumericError if they are two models."""
    agreement = compare_on_bits(detector, _features_of_noise(detector, content))
    logger.info("on bits, two images of noise: %s", agreement.describe())
    if agreement.differing > _LARGEST_SHARE_DIFFERING * agreement.decisions:
        raise NumericError(
            f"the packed model is not the trained one of {str(checkpoint)!r}: {agreement.describe()}; nothing was written, "
            "please report this"
        )


@torch.no_grad()
def _features_of_noise(detector: Detector, content: dict) -> torch.Tensor:
    size = content["config"]["crop_size"]
    images = torch.randn(_CHECKED_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    return detector.encode(images)


def _scored_by_training(config: Config) -> str:
    """Which images the scores that a training stored are of."""
    if not config.get("holdout"):
        return "training images"
    has_own = any(LAYOUTS[name].validation for name in config["dataset"].split("+"))
    return "held-out normal images" if has_own else "held-out training images"


def _with_scale(content: dict, scale: dict) -> dict:
    """The content with another scale, and with the number for which `--true_false val_quantile` stands: files lack it."""
    rule = EvaluationOptions.from_config(content["protocol"]).with_threshold(scale).true_false
    protocol = {**content["protocol"], "true_false": rule} if "true_false" in content["protocol"] else content["protocol"]
    return {**content, "calibration": scale, "protocol": protocol}


def _decision(packed: Detector, content: dict, options: ThresholdOptions) -> tuple[dict, dict]:
    """Threshold with its origin, and the scale of the maps."""
    if options.images is None:
        images = _scored_by_training(content["config"])
        scale, source = content["calibration"], f"scores of {images}, stored by the training"
    else:
        records = [Record(path, 0, content["item"]) for path in options.images]
        config = content["config"]
        sizes, interpolation = (config["input_size"], config["crop_size"]), config.get("interpolation", "bilinear")
        images = ImageDataset(records, *sizes, options.max_pixels, interpolation=interpolation)
        protocol = EvaluationOptions.from_config(content["protocol"])
        scale = calibrate_scale(evaluate(packed, images, protocol, 1, 0, "fp32", "normal images", SCALE_SIDE))
        source = "scores of the given normal images by the packed model"
    value = float(np.quantile(scale["scores"], options.quantile)) * options.margin
    kind = f"quantile {options.quantile:g} of {len(scale['scores'])} {source}"
    decision = {
        "threshold": value,
        "quantile": options.quantile,
        "margin": options.margin,
        "images": len(scale["scores"]),
        "source": kind if options.margin == 1 else f"{options.margin:g} x {kind}",
    }
    return decision, scale


def _sizes(detector: Detector, packed: Detector, options: PackingOptions, file: bytes) -> str:
    """Bytes on disk of the trained part and of the whole, beside the same in float32."""
    added = {id(value) for value in scale_parameters(detector)}
    own = [value for name, value in detector.named_parameters() if not name.startswith("encoder.")]
    trained = sum(value.numel() for value in own if id(value) not in added)
    kept = trained + sum(value.numel() for value in detector.encoder.parameters())
    published = trained + detector.encoder.published_parameters
    alone = len(packed_bytes(packed, PackingOptions(options.encoder, options.trained, True), {}))
    rows = [("file", "bytes", "float32 bytes", "ratio")]
    for name, bytes_, parameters in (
        ("trained part", alone, trained),
        ("whole model", len(file), kept),
        ("whole model, float32 with unused blocks", len(file), published),
    ):
        rows.append((name, f"{bytes_:,}", f"{4 * parameters:,}", f"{4 * parameters / bytes_:.2f}x"))
    return format_rows(rows[: 2 if options.encoder_reference else None])
