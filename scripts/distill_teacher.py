"""Make a teacher for EfficientAD from images: a small network learns to describe them as a large one does.

python -m scripts.distill_teacher --images photos/ --source efficientnet_lite0 --output teacher.safetensors
python -m scripts.distill_teacher --images imagenet/train --source wide_resnet101_2 --output weights/pdn_small.safetensors

The images need no labels; the more and the more varied, the better: the paper takes ImageNet's 1.28 million. EfficientNet-Lite0
comes from the package index; Wide-ResNet-101-2, the paper's choice, is downloaded by torchvision. --output in weights/ under
the name pdn_<size>.safetensors is where `models.teacher.build_teacher` looks first.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import UserError
from datasets.images import DEFAULT_MAX_PIXELS
from models.build import ENCODERS
from models.feature_sources import EFFICIENTNET_LITE0, WIDE_RESNET, build_feature_source
from models.patch_description import SIZES, TEACHER_CHANNELS
from scripts import fetch_teacher_source
from utils.checkpoint import check_writable
from utils.command import run_command
from utils.converters import number
from utils.devices import choose_device, seed_everything
from utils.distillation_data import DistillationOptions
from utils.distributed import world_size
from utils.loading import default_worker_count
from utils.parser import tool_parser
from utils.prediction import find_images
from utils.run_lock import run_lock
from utils.teacher_distillation import Distillation, state_file

logger = logging.getLogger(__name__)

_DEFAULTS = DistillationOptions(size="small")


def distill(arguments: argparse.Namespace) -> int:
    """Distil a teacher, or go on where that was stopped."""
    output = arguments.output
    if world_size() > 1:
        raise UserError("a distillation runs in one process; start it without torchrun")
    _check_output(output, arguments.resume)
    with run_lock(output.parent, "--output", f"{output.name}.lock"):
        return _distill(arguments, _options(arguments))


def _distill(arguments: argparse.Namespace, options: DistillationOptions) -> int:
    output = arguments.output
    device = choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    seed_everything(options.seed)
    images = find_images(arguments.images)
    if arguments.source == EFFICIENTNET_LITE0:
        fetch_teacher_source.fetch()
    source = build_feature_source(arguments.source, TEACHER_CHANNELS[options.size], 2 * options.image_size).to(device)
    logger.info("%d images; features of %s, %s", len(images), source.name, source.source)
    distillation = Distillation(source, images, options, output, device, arguments.max_pixels)
    if arguments.resume and distillation.state_file.is_file():
        distillation.restore()
    distillation.run(arguments.iterations, arguments.num_workers, arguments.save_every)
    print(f"teacher in {str(output)!r}: loss {distillation.recent_loss:.4f}")
    return 0


def _options(arguments: argparse.Namespace) -> DistillationOptions:
    return DistillationOptions(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(DistillationOptions)}
    )


def _check_output(output: Path, resume: bool) -> None:
    """Refuse a place that cannot be written, or that holds a teacher or the beginning of one."""
    state = state_file(output)
    if output.suffix != ".safetensors":
        raise UserError(f"--output {str(output)!r} must end in .safetensors; choose such a name")
    if state.is_file() and not resume:
        raise UserError(
            f"{str(state)!r} is a distillation already begun; go on with --resume, remove it, or choose another --output"
        )
    if output.is_file() and not state.is_file():
        raise UserError(f"{str(output)!r} is already there; remove it, or choose another --output")
    check_writable(output)


def _source(text: str) -> str:
    if text not in (EFFICIENTNET_LITE0, WIDE_RESNET, *ENCODERS) and not Path(text).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a file nor a known network; choose {EFFICIENTNET_LITE0}, {WIDE_RESNET}, an encoder "
            f"({' '.join(ENCODERS)}), or a file with weights of the first two"
        )
    return text


def _image_size(text: str) -> int:
    size = number(int, 64)(text)
    if size % 4:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of 4")
    return size


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--images", type=Path, required=True, nargs="+", help="folders (to any depth), images, .txt lists")
    parser.add_argument(
        "--source",
        type=_source,
        default=EFFICIENTNET_LITE0,
        metavar="NAME|FILE",
        help=f"{EFFICIENTNET_LITE0} (default), {WIDE_RESNET}, a file with weights of either, or an encoder of --encoder",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors")
    parser.add_argument("--size", choices=SIZES, default=_DEFAULTS.size, help="of the teacher; tiny is for tests")
    parser.add_argument("--iterations", type=number(int, 1), default=60_000, help="a finished run goes on with more of them")
    parser.add_argument("--batch_size", type=number(int, 1), default=_DEFAULTS.batch_size)
    parser.add_argument("--learning_rate", type=number(float, 0), default=_DEFAULTS.learning_rate)
    parser.add_argument("--weight_decay", type=number(float, 0), default=_DEFAULTS.weight_decay)
    parser.add_argument(
        "--image_size", type=_image_size, default=_DEFAULTS.image_size, help="the teacher's; the source sees twice that"
    )
    parser.add_argument(
        "--statistics_images",
        type=number(int, 1),
        default=_DEFAULTS.statistics_images,
        help="at most so many give the channels' mean and deviation",
    )
    parser.add_argument("--seed", type=number(int, 0), default=_DEFAULTS.seed)
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default=_DEFAULTS.precision, help="bf16: twice as fast where a CPU has it"
    )
    parser.add_argument("--device", default="cpu", metavar="auto|cpu|cuda[:i]")
    parser.add_argument("--threads", type=number(int, 1), help="of the CPU (default: all cores)")
    parser.add_argument("--num_workers", type=number(int, 0), default=default_worker_count(), help="that read images")
    parser.add_argument("--resume", action="store_true", help="go on from OUTPUT.state.pth, if it exists")
    parser.add_argument("--save_every", type=number(int, 1), default=1000, metavar="ITERATIONS")
    parser.add_argument("--max_pixels", type=number(int, 1), default=DEFAULT_MAX_PIXELS, help="refuse larger images")
    return run_command(parser, argv, distill)


if __name__ == "__main__":
    sys.exit(main())
