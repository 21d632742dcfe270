"""Make one file of a trained model: packed bits for this project's engine, or ONNX for other runtimes (RAAD's: integers).

python -m scripts.export --checkpoint RUN/bottle/model.pth --output bottle.binaryad
python -m scripts.export --checkpoint RUN/bottle/model.pth --output bottle.binaryad --calibration_images my_parts/good
python -m scripts.export --checkpoint RUN/bottle/model.pth --output bottle.onnx
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from datasets.images import DEFAULT_MAX_PIXELS
from utils.command import run_command
from utils.export import DEFAULT_QUANTILE, ThresholdOptions, export_graph, export_packed
from utils.packed_model import ENCODER_PRECISIONS, TRAINED_PRECISIONS, PackingOptions
from utils.parser import tool_parser
from utils.prediction import find_images

# to fields of PackingOptions
_PACKED_FLAGS = {"encoder_precision": "encoder", "trained_precision": "trained", "encoder_reference": "encoder_reference"}


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = tool_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="model.pth of a training")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.binaryad|FILE.onnx")
    parser.add_argument(
        "--encoder_weights", "--teacher_weights", metavar="FILE", help="if the file that the training was given has moved"
    )
    packed = parser.add_argument_group("packed file", "precisions are for binary models: RAAD is quantized to bits of its own")
    packed.add_argument("--encoder_precision", choices=ENCODER_PRECISIONS, help="default int8")
    packed.add_argument(
        "--trained_precision", choices=TRAINED_PRECISIONS, help="of bottleneck, extractor and a float MLP (default int8)"
    )
    packed.add_argument("--encoder_reference", action="store_true", help="store the encoder's name and hash, not its weights")
    packed.add_argument(
        "--threshold_quantile",
        type=float,
        default=DEFAULT_QUANTILE,
        metavar="0..1",
        help="of the scores of normal images",
    )
    packed.add_argument("--threshold_margin", type=float, default=1.0, help="factor on that quantile")
    packed.add_argument(
        "--calibration_images",
        type=Path,
        nargs="+",
        metavar="FOLDER|FILE",
        help="normal images for threshold and heat map scale, best not those of the training (default: its scores)",
    )
    packed.add_argument("--item", metavar="CATEGORY", help="of a model of many: threshold and heat map scale of this one")
    packed.add_argument("--max_pixels", type=int, default=DEFAULT_MAX_PIXELS, help="refuse larger images")
    return parser


def export(arguments: argparse.Namespace) -> int:
    """Write the file that the suffix of --output asks for."""
    _check_numbers(arguments)
    output, suffix = arguments.output, arguments.output.suffix
    if suffix not in (".binaryad", ".onnx"):
        raise UserError(f"--output {str(output)!r} must end with .binaryad or .onnx")
    given = arguments.calibration_images
    images = list(find_images(given)) if given else None
    threshold = ThresholdOptions(
        arguments.threshold_quantile, arguments.threshold_margin, images, arguments.max_pixels, arguments.item
    )
    if suffix == ".onnx":
        _refuse_packed_flags(arguments)
        export_graph(arguments.checkpoint, output, threshold, arguments.encoder_weights)
    else:
        given = {field: value for flag, field in _PACKED_FLAGS.items() if (value := getattr(arguments, flag))}
        options = PackingOptions(**given) if given else None
        export_packed(arguments.checkpoint, output, options, threshold, arguments.encoder_weights)
    print(f"written: {arguments.output} ({arguments.output.stat().st_size:,} bytes)")
    return 0


def _refuse_packed_flags(arguments: argparse.Namespace) -> None:
    for name in _PACKED_FLAGS:
        if getattr(arguments, name):
            raise UserError(f"--{name} is for .binaryad files; an ONNX graph is as precise as the trained model")


def _check_numbers(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.threshold_quantile <= 1:
        raise UserError(f"--threshold_quantile {arguments.threshold_quantile:g} is not between 0 and 1")
    if not 0 < arguments.threshold_margin < math.inf:
        raise UserError(f"--threshold_margin {arguments.threshold_margin:g} is no positive factor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, export)


if __name__ == "__main__":
    sys.exit(main())
