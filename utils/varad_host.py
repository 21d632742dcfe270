"""VarAD on the command line: its flags, what it refuses, and the numbers of the authors' release."""

import argparse
import logging
from dataclasses import fields
from functools import partial

from common.errors import UserError
from models.build import ENCODERS, build_encoder, build_varad
from models.detector import Detector
from models.selective_scan import BACKENDS, describe_backend
from models.state_space import DIRECTIONS, PRESETS
from models.varad import ADAPTERS, HIERARCHIES, LOSSES, VarADOptions, VarADTraining
from utils.converters import InOrder, number
from utils.distributed import started_processes
from utils.host import Config, Host, fields_of

logger = logging.getLogger(__name__)

VARAD_MODELS = {  # names of the authors, and of further encoders in their manner
    **{f"dinov2_vit{size[0]}14": f"dinov2_vit_{size}_14" for size in ("small", "base", "large")},
    "vit_b_16": "vit_base_16",
    "clip_vit_b_16": "clip_vit_base_16",
    "mae_vit_b_16": "mae_vit_base_16",
    **{f"dinov2_vit{size[0]}14_reg": f"dinov2reg_vit_{size}_14" for size in ("small", "base", "large")},
}
_SCORES = {"max": 0.0, "top1%": 0.01}
_IMAGE_SIZE = 512
_ROWS = 4.0  # of --m


def _add_varad_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", choices=list(VARAD_MODELS), help="the authors' names of encoders (default dinov2_vits14)")
    group.add_argument(
        "--image_size",
        type=number(int, 1),
        help="images are resized to the largest multiple of the patch in it (default 512)",
    )
    group.add_argument("--preset", choices=list(PRESETS), default="released", help="form of the state-space block")
    group.add_argument(
        "--directions",
        nargs="+",
        action=InOrder,
        choices=DIRECTIONS,
        default=list(DIRECTIONS),
        metavar="NAME",
        help=" ".join(DIRECTIONS),
    )
    group.add_argument(
        "--hierarchies",
        nargs="+",
        action=InOrder,
        type=int,
        choices=HIERARCHIES,
        default=list(HIERARCHIES),
        help="thirds of the encoder",
    )
    group.add_argument("--adapter", choices=ADAPTERS, default="linear", help="trained layer on the encoder's tokens")
    group.add_argument(
        "--zero_init_adapter",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start the linear adapter as the identity",
    )
    group.add_argument(
        "--m",
        type=number(float, 0, 1000),
        default=_ROWS,
        help="rows between a token and the last one it is predicted from",
    )
    group.add_argument("--pred_next_n", type=number(int, 1), help="instead in tokens, halved per hierarchy (the release's 256)")
    group.add_argument("--d_state", type=number(int, 1, 256), help="states per channel (default: the preset's)")
    group.add_argument("--learn_start", action=argparse.BooleanOptionalAction, default=False, help="train the start tokens")
    group.add_argument(
        "--standardise",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="maps relative to the usual error at each position (one for all categories of a model); --holdout 0.1 with it",
    )
    group.add_argument("--loss", choices=LOSSES, default="released")
    group.add_argument(
        "--detach_target", action=argparse.BooleanOptionalAction, default=False, help="train no adapter to be predictable"
    )
    group.add_argument("--variance_floor", type=number(float, 0, 1), default=0.0, help="of target tokens; less is penalised")
    group.add_argument("--ssm", choices=BACKENDS, default="auto", help="what computes the scan in training")
    group.add_argument(
        "--score",
        dest="max_ratio",
        type=_score,
        default=argparse.SUPPRESS,
        metavar="|".join(_SCORES),
        help="image score, another name of --max_ratio 0 (default) and 0.01",
    )


def _score(text: str) -> float:
    if text not in _SCORES:
        raise argparse.ArgumentTypeError(f"{text!r} is not {' or '.join(_SCORES)}")
    return _SCORES[text]


def _check_varad(arguments: argparse.Namespace) -> None:
    if arguments.model and VARAD_MODELS[arguments.model] != arguments.encoder:
        raise UserError(f"--model {arguments.model} and --encoder {arguments.encoder} are two encoders; give one of them")
    patch = ENCODERS[arguments.encoder].patch_size
    if arguments.image_size and max(1, arguments.image_size // patch) * patch != arguments.crop_size:
        raise UserError(
            f"--image_size {arguments.image_size} and --crop_size {arguments.crop_size} contradict, on the command line "
            "or with a --config; give one of them"
        )
    grid = arguments.crop_size // patch
    options = _varad_options(vars(arguments))
    if options.m != _ROWS and options.pred_next_n is not None:
        raise UserError("--m and --pred_next_n both say how far back predictions start; give one of them")
    if options.standardise and not arguments.holdout:
        raise UserError(
            "--standardise with --holdout 0 would take what is usual from images that were trained on; give --holdout 0.1"
        )
    longest = max(options.distance(hierarchy, grid) for hierarchy in options.hierarchies)
    shortest = min(options.distance(hierarchy, grid) for hierarchy in options.hierarchies)
    if shortest < 1 or longest >= grid * grid:
        raise UserError(
            f"--m (or --pred_next_n) asks for predictions over {shortest} to {longest} tokens, and images of {grid} x {grid} "
            f"patches allow 1 to {grid * grid - 1}; change it, or raise --image_size"
        )
    if arguments.sab != "off" or arguments.distill or arguments.distill_teacher:
        raise UserError("--sab and --distill are for attention decoders and VarAD has none; leave them out")
    if arguments.clb_stage == 2 and not PRESETS[arguments.preset].mlp:
        raise UserError(f"--clb_stage 2 binarizes the MLP and --preset {arguments.preset} has none; stage 1 is all there is")
    if arguments.total_epochs and arguments.total_iters:
        raise UserError("--total_epochs and --total_iters both say how long to train; give one of them")
    if arguments.zero_init_adapter and "linear" not in arguments.adapter:
        raise UserError(f"--zero_init_adapter is for the linear adapter, not for {arguments.adapter}; leave it out")
    if arguments.adapter == "none" and (arguments.detach_target or arguments.variance_floor):
        raise UserError("--detach_target and --variance_floor need something that changes the target; give an --adapter")
    if arguments.adapter.endswith("resblock") and arguments.phase == "train" and started_processes() > 1:
        raise UserError("--adapter resblock has batch norms, which several processes do not share; train it in one process")
    if "lora" in arguments.adapter and arguments.cache_features in ("ram", "disk"):
        raise UserError("--adapter lora changes the encoder, so nothing of it can be cached; leave --cache_features out")
    if arguments.scoring == "prototype":
        raise UserError("--scoring prototype needs prototypes and VarAD has none; leave it out")


def _choose_varad_defaults(arguments: argparse.Namespace) -> Config:
    """The release's numbers; it rounds image sizes down to whole patches."""
    encoder = arguments.encoder or VARAD_MODELS[arguments.model or "dinov2_vits14"]
    patch = ENCODERS[encoder].patch_size
    size = max(1, (arguments.image_size or _IMAGE_SIZE) // patch) * patch
    return {
        "encoder": encoder,
        "input_size": arguments.crop_size or size,
        "crop_size": arguments.input_size // patch * patch if arguments.input_size else size,
        "total_epochs": None if arguments.total_iters else 10,
        "max_ratio": _SCORES["max"],
        "final_learning_rate": arguments.learning_rate,
        "holdout": 0.1 if arguments.standardise else 0.0,
    }


def _varad_options(config: Config) -> VarADOptions:
    flags = fields_of(VarADOptions, config)
    return VarADOptions(**{name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()})


def _prepare_varad(detector: Detector, config: Config) -> None:
    detector.train_with(VarADTraining(**fields_of(VarADTraining, config)))
    detector.scan_backend = config["ssm"]
    states = detector.decoder[0].states
    logger.info("scan: %s (--ssm %s)", describe_backend(detector.device, config["ssm"], states), config["ssm"])


VARAD = Host(
    name="VarAD",
    network_flags=tuple(field.name for field in fields(VarADOptions)),
    training_flags=tuple(field.name for field in fields(VarADTraining)),
    folder_flags=(),
    add_flags=_add_varad_flags,
    defaults={
        "encoder": None,
        "input_size": None,
        "crop_size": None,
        "interpolation": "bicubic",
        "holdout": None,
        "clb_stage": 0,
        "sab": "off",
        "total_epochs": None,
        "batch_size": 2,
        "optimizer": "adamw",
        "adam_beta1": 0.5,
        "adam_eps": 1e-8,
        "learning_rate": 5e-4,
        "final_learning_rate": None,
        "warmup_iters": 0,
        "weight_decay": 0.01,
        "gradient_clip": 0.0,
        "metric_size": 0,
        "smoothing_kernel": 33,
        "smoothing_border": "reflect",
        "max_ratio": None,
    },
    help={
        "clb_stage": "0 float, 1 binary projections around the scan, 2 these and the MLP",
        "encoder": "default: that of --model",
        "input_size": "default: from --image_size",
        "crop_size": "default: from --image_size",
        "total_epochs": "passes over the training images (default 10)",
        "final_learning_rate": "at the end of a cosine (default: as --learning_rate, which then stays)",
        "warmup_iters": "default 0",
        "save_name": "default VarAD and the setting, with -CLB1 and -CLB2 for stages 1 and 2",
        "setting": "single: a model per category; multi: one of all",
        "sab": "only off",
        "scoring": "only reconstruction",
    },
    check=_check_varad,
    choose_defaults=_choose_varad_defaults,
    build=lambda encoder, config: build_varad(encoder, _varad_options(config)),
    prepare_training=_prepare_varad,
    build_encoder=partial(build_encoder, taps="thirds"),
    taps="thirds",
    stage_suffixes=("", "-CLB1", "-CLB2"),
    exports_float=True,
    exports_graph=False,
)
