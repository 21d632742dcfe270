"""The command line: one parser for all entry scripts, with defaults from a YAML file."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from binarize.stages import STAGES
from datasets.catalog import LAYOUTS, ListingOptions
from datasets.few_shot import DEFAULT_SHOT
from datasets.images import DEFAULT_MAX_PIXELS
from datasets.transforms import Interpolation
from utils.config_file import config_tokens
from utils.converters import dataset_names, number
from utils.evaluation_arguments import add_evaluation_flags
from utils.hosts import Host
from utils.loading import default_worker_count
from utils.optim import DEFAULT_WARMUP, OPTIMIZERS, SCHEDULES
from utils.parser import OneSentenceParser, add_message_flags


def base_parser(doc: str, host: Host, settings: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that every training script shares.

    Args:
        doc: the script's docstring.
        host: host network; it brings flags and defaults of its own.
        settings: `single`, `multi` and `few` as far as the script offers them, the default first.
    """
    parser = OneSentenceParser(doc)
    parser.add_argument("--config", metavar="FILE.yaml", help="defaults by flag name; the command line wins")
    parser.add_argument("--phase", choices=["train", "test"], default="train", help="test: evaluate model.pth, train nothing")

    _add_data_flags(parser.add_argument_group("data"), settings)
    _add_model_flags(parser.add_argument_group("model"), host.encoders)
    host.add_flags(parser.add_argument_group(host.name))
    binarization = parser.add_argument_group("binarization")
    _add_binarization_flags(binarization)
    _add_training_flags(parser.add_argument_group("training"))
    add_evaluation_flags(parser.add_argument_group("evaluation"))
    _add_output_flags(parser.add_argument_group("output"), host)
    parser.add_argument("--host", choices=[host.name], default=host.name, help=argparse.SUPPRESS)  # a config.yaml names it
    parser.set_defaults(**host.defaults)
    for action in parser._actions:
        action.help = host.help.get(action.dest, action.help)
    if not host.binarizes:  # a config.yaml names them all the same
        for action in binarization._group_actions:
            action.help = argparse.SUPPRESS
    return parser


def _add_data_flags(group, settings: Sequence[str]) -> None:
    """Which images, and how they are read."""
    group.add_argument(
        "--setting",
        choices=settings,
        default=settings[0],
        help="single: a model per category; multi: one of all; few: few images",
    )
    add_data_arguments(group)
    if "few" in settings:
        add_few_shot_arguments(group)
    group.add_argument("--input_size", type=number(int, 1), default=448, help="images are resized to this square")
    group.add_argument(
        "--crop_size", type=number(int, 1), default=392, help="then cropped to this one, a multiple of the patch"
    )
    group.add_argument(
        "--interpolation",
        choices=get_args(Interpolation),
        default="bilinear",
        help="of that resize; with bicubic masks take the nearest pixel",
    )
    group.add_argument(
        "--holdout",
        type=number(float, 0, 0.5),
        default=0.0,
        metavar="SHARE",
        help="share of every category's training images, at least two, that is not trained on: thresholds and scales of maps "
        "come from them instead of from the trained ones (not for few images; of MVTec-LOCO its validation images)",
    )
    group.add_argument(
        "--skip_bad_images",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out undecodable images, list them in bad_images.csv",
    )


def _add_model_flags(group, encoders: Sequence[str]) -> None:
    """Which network."""
    group.add_argument("--encoder", choices=encoders, default="dinov2reg_vit_base_14", metavar="NAME", help=" ".join(encoders))
    group.add_argument("--encoder_weights", metavar="FILE", help=".safetensors or .pth instead of a download")
    group.add_argument("--pos_embed", choices=["paper", "timm"], default="paper", help="resampling of the position grid")


def _add_binarization_flags(group) -> None:
    """What becomes binary, and from what."""
    group.add_argument(
        "--clb_stage",
        type=int,
        choices=STAGES,
        default=1,
        help="0 float, 1 binary attention, 2 binary attention and MLP",
    )
    group.add_argument(
        "--load_checkpoint", metavar="NAME|FILE", help="model of the stage before: its save_name, or a model.pth"
    )
    group.add_argument("--act_bits", type=int, choices=[1, 32], default=1, help="32: only weights are binary")
    group.add_argument(
        "--sab",
        choices=["mixed", "binary", "off"],
        default="mixed",
        help="softmax-aware binarization of attention maps",
    )
    group.add_argument(
        "--weight_gradient", choices=["clip", "triangle"], default="clip", help="gradient of the sign of weights"
    )
    group.add_argument("--activation_gradient", choices=["clip", "triangle"], default="triangle", help="and of activations")
    group.add_argument(
        "--distill",
        type=number(float, 0),
        default=0.0,
        metavar="WEIGHT",
        help="add the distance to the float decoder's outputs",
    )
    group.add_argument(
        "--distill_teacher",
        metavar="NAME|FILE",
        help="stage-0 model to distil from (default: --load_checkpoint, if stage 0)",
    )
    group.add_argument(
        "--force_gate",
        type=number(float, 0, 1),
        metavar="0..1",
        help="test phase: replace the gates of SAB (0 float map, 1 binary map)",
    )


def _add_training_flags(group) -> None:
    """How it is trained, and where."""
    group.add_argument("--total_epochs", type=number(int, 1), default=200, help="passes over the training images")
    group.add_argument("--total_iters", type=number(int, 0), help="iterations instead of epochs")
    group.add_argument("--batch_size", type=number(int, 1), default=16)
    group.add_argument("--learning_rate", type=number(float, 0), default=1e-3, help="after the warm-up")
    group.add_argument("--final_learning_rate", type=number(float, 0), default=1e-4, help="at the end of the schedule")
    group.add_argument(
        "--schedule", choices=SCHEDULES, default="cosine", help="step: the final rate in the last 5 %% of the iterations"
    )
    group.add_argument("--warmup_iters", type=number(int, 0), help=f"default {DEFAULT_WARMUP}, at most a fifth of the run")
    group.add_argument("--weight_decay", type=number(float, 0), default=1e-4)
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="stable_adamw")
    group.add_argument("--adam_beta1", type=number(float, 0, 0.9999), default=0.9, help="decay of its first moment")
    group.add_argument("--adam_eps", type=number(float, 1e-30), default=1e-10, help="added to its denominator")
    group.add_argument("--gradient_clip", type=number(float, 0), default=0.1, help="largest global gradient norm; 0: any")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1)
    group.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    group.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    group.add_argument("--num_workers", type=number(int, 0), default=default_worker_count(), help="loader processes")
    group.add_argument(
        "--cache_features", choices=["auto", "off", "ram", "disk"], default="auto", help="encode every image only once"
    )
    group.add_argument("--cache_images", choices=["off", "disk"], default="off", help="decode and resize every image only once")


def _add_output_flags(group, host: Host) -> None:
    """Where results go, and what is done with those that are there."""
    group.add_argument("--save_dir", default="./saved_results")
    group.add_argument("--save_name", help=f"default {host.name} and the setting, with -FP for stage 0 and -CLB2 for stage 2")
    group.add_argument("--resume", action="store_true", help="skip finished categories, go on from last.pth")
    group.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in this run folder")
    group.add_argument("--save_every", type=number(int, 1), default=500, metavar="ITERATIONS", help="between two last.pth")
    add_message_flags(group)


def add_data_arguments(group) -> None:
    """The flags that say which images; also used by the tools that only look at data."""
    group.add_argument(
        "--dataset",
        type=dataset_names,
        default="MVTec-AD",
        metavar="NAME",
        help=f"{' '.join(LAYOUTS)}, or several joined with +",
    )
    group.add_argument(
        "--data_path", nargs="+", metavar="FOLDER", help="root of each data set (ELPV: default is the installed package)"
    )
    group.add_argument("--item", nargs="+", metavar="CATEGORY", help="default: all categories of the data set")
    group.add_argument(
        "--realiad_json", default=ListingOptions().realiad_json, metavar="NAME", help="json folder of Real-IAD: its split"
    )
    group.add_argument("--max_pixels", type=number(int, 1), default=DEFAULT_MAX_PIXELS, help="refuse larger images")
    group.add_argument(
        "--allow_missing_masks",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="pixel metrics on the images that have masks",
    )


def add_few_shot_arguments(group) -> None:
    """The flags of the few-shot setting."""
    group.add_argument(
        "--shot",
        type=number(int, 1),
        default=DEFAULT_SHOT,
        metavar="K",
        help=f"training images per category (default {DEFAULT_SHOT})",
    )
    group.add_argument(
        "--per_category",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="few-shot: a model per category instead of one for all",
    )


def listing_options(arguments: argparse.Namespace) -> ListingOptions:
    """How to read the data set, from the flags of `add_data_arguments`."""
    return ListingOptions(arguments.allow_missing_masks, arguments.realiad_json)


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line over the defaults of `--config`; argparse ends the process with code 2 on a wrong flag."""
    first = OneSentenceParser(add_help=False)
    first.add_argument("--config")
    given, rest = first.parse_known_args(argv)
    tokens = config_tokens(parser, Path(given.config)) if given.config else []
    parser.config = given.config
    arguments = parser.parse_args([*tokens, *rest])
    arguments.config = given.config
    return arguments
