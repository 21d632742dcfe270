"""The command line: one parser for all entry scripts, with defaults from a YAML file."""

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import yaml

from binarize.stages import STAGES
from common.errors import UserError
from datasets.catalog import LAYOUTS, ListingOptions
from datasets.images import DEFAULT_MAX_PIXELS
from models.build import ENCODERS
from utils.loading import default_worker_count
from utils.optim import DEFAULT_WARMUP
from utils.protocol import Scoring


def number(kind: type, low: float, high: float = math.inf):
    """A converter for argparse: text -> kind within limits."""

    def convert(text: str):
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    convert.__name__ = kind.__name__  # argparse names the type in its messages
    return convert


def dataset_names(text: str) -> str:
    """A converter for argparse: one known data set, or several joined with +."""
    for name in text.split("+"):
        if name not in LAYOUTS:
            near = difflib.get_close_matches(name, LAYOUTS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {' '.join(LAYOUTS)}"
            raise argparse.ArgumentTypeError(f"{name!r} is no data set; {hint}")
    return text


def base_parser(doc: str, host: str, settings: Sequence[str]) -> argparse.ArgumentParser:
    """The flags that every training script shares.

    Args:
        doc: the script's docstring.
        host: host network, for default save names.
        settings: `single`, `multi` and `few` as far as the script offers them, the default first.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="defaults by flag name; the command line wins")
    parser.add_argument("--phase", choices=["train", "test"], default="train", help="test: evaluate model.pth, train nothing")

    data = parser.add_argument_group("data")
    data.add_argument("--setting", choices=settings, default=settings[0], help="one model per category, one of all, few images")
    add_data_arguments(data)
    if "few" in settings:
        add_few_shot_arguments(data)
    data.add_argument("--input_size", type=number(int, 1), default=448, help="images are resized to this square")
    data.add_argument("--crop_size", type=number(int, 1), default=392, help="then cropped to this one, a multiple of the patch")
    data.add_argument(
        "--skip_bad_images",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="leave out undecodable images, list them in bad_images.csv",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--encoder", choices=list(ENCODERS), default="dinov2reg_vit_base_14", metavar="NAME", help=" ".join(ENCODERS)
    )
    model.add_argument("--encoder_weights", metavar="FILE", help=".safetensors or .pth instead of a download")
    model.add_argument("--pos_embed", choices=["paper", "timm"], default="paper", help="resampling of the position grid")
    model.add_argument("--INP_num", type=number(int, 1), default=6, help="intrinsic normal prototypes per image")

    binary = parser.add_argument_group("binarization")
    binary.add_argument(
        "--clb_stage",
        type=int,
        choices=STAGES,
        default=1,
        help="0 float, 1 binary attention, 2 binary attention and MLP",
    )
    binary.add_argument(
        "--load_checkpoint", metavar="NAME|FILE", help="model of the stage before: its save_name, or a model.pth"
    )
    binary.add_argument("--act_bits", type=int, choices=[1, 32], default=1, help="32: only weights are binary")
    binary.add_argument(
        "--sab",
        choices=["mixed", "binary", "off"],
        default="mixed",
        help="softmax-aware binarization of attention maps",
    )
    binary.add_argument(
        "--weight_gradient", choices=["clip", "triangle"], default="clip", help="gradient of the sign of weights"
    )
    binary.add_argument("--activation_gradient", choices=["clip", "triangle"], default="triangle", help="and of activations")
    binary.add_argument(
        "--distill",
        type=number(float, 0),
        default=0.0,
        metavar="WEIGHT",
        help="add the distance to the float decoder's outputs",
    )
    binary.add_argument(
        "--distill_teacher",
        metavar="NAME|FILE",
        help="stage-0 model to distil from (default: --load_checkpoint, if stage 0)",
    )
    binary.add_argument(
        "--force_gate",
        type=number(float, 0, 1),
        metavar="0..1",
        help="test phase: replace the gates of SAB (0 float map, 1 binary map)",
    )

    training = parser.add_argument_group("training")
    training.add_argument("--total_epochs", type=number(int, 1), default=200)
    training.add_argument("--total_iters", type=number(int, 1), help="iterations instead of epochs")
    training.add_argument("--batch_size", type=number(int, 1), default=16)
    training.add_argument("--learning_rate", type=number(float, 0), default=1e-3, help="after the warm-up")
    training.add_argument("--final_learning_rate", type=number(float, 0), default=1e-4, help="at the end of the cosine")
    training.add_argument("--warmup_iters", type=number(int, 0), help=f"default {DEFAULT_WARMUP}, at most a fifth of the run")
    training.add_argument("--weight_decay", type=number(float, 0), default=1e-4)
    training.add_argument("--gradient_clip", type=number(float, 1e-9), default=0.1, help="largest global gradient norm")
    training.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1)
    training.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]")
    training.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    training.add_argument("--num_workers", type=number(int, 0), default=default_worker_count(), help="loader processes")
    training.add_argument(
        "--cache_features", choices=["auto", "off", "ram", "disk"], default="auto", help="encode every image only once"
    )
    training.add_argument(
        "--cache_images", choices=["off", "disk"], default="off", help="decode and resize every image only once"
    )

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument(
        "--mask_threshold",
        type=number(float, 0, 1),
        default=0.5,
        help="mask > this is defect (INP-Former 0.5, Dinomaly 0)",
    )
    evaluation.add_argument("--smoothing_kernel", type=number(int, 0), default=5, help="odd side in pixels, 0 for none")
    evaluation.add_argument("--smoothing_sigma", type=number(float, 1e-3), default=4.0)
    evaluation.add_argument(
        "--max_ratio",
        type=number(float, 0, 1),
        default=0.01,
        help="share of top pixels in the image score, 0 for the maximum",
    )
    evaluation.add_argument(
        "--pro_mode", choices=["exact", "dinomaly"], default="exact", help="dinomaly: 200 thresholds, for old tables"
    )
    evaluation.add_argument(
        "--scoring",
        choices=get_args(Scoring),
        default="reconstruction",
        help="test phase: prototype scores by the distance to the image's own nearest prototype, without the decoder",
    )
    evaluation.add_argument(
        "--test_checkpoint",
        metavar="FILE",
        help="test phase: evaluate this model.pth, trained on whatever data, instead of the run's own (zero-shot)",
    )
    evaluation.add_argument(
        "--metrics_memory",
        type=number(float, 1e-3),
        metavar="GB",
        help="for a category's pixel metrics, beyond it from bins with a stated error (default: half of what is free)",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--save_dir", default="./saved_results")
    output.add_argument("--save_name", help=f"default {host} and the setting, with -FP for stage 0 and -CLB2 for stage 2")
    output.add_argument("--resume", action="store_true", help="skip finished categories, go on from last.pth")
    output.add_argument("--overwrite", action="store_true", help="delete what an earlier run left in this run folder")
    output.add_argument("--save_every", type=number(int, 1), default=500, metavar="ITERATIONS", help="between two last.pth")
    output.add_argument("--quiet", action="store_true", help="warnings only")
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(host=host)
    return parser


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
    group.add_argument("--shot", type=number(int, 1), default=4, metavar="K", help="training images per category")
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
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    given, rest = first.parse_known_args(argv)
    tokens = _config_tokens(parser, Path(given.config)) if given.config else []
    arguments = parser.parse_args([*tokens, *rest])
    arguments.config = given.config
    return arguments


def _config_tokens(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The settings of a YAML file as command-line words, so that argparse checks them as it checks typed ones."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {str(path)!r} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"--config {str(path)!r} is empty or no list of `flag: value` lines")
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
        if flags[key].nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"--config {str(path)!r}: {key} must be true or false, found {value!r}")
            tokens += [f"--{key}"] if value else []
        elif isinstance(value, list) and flags[key].nargs == "+" and value:
            tokens += [f"--{key}", *map(str, value)]
        elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
            tokens += [f"--{key}={value}"]
        else:
            raise UserError(f"--config {str(path)!r}: {key} has the unusable value {value!r}")
    return tokens
