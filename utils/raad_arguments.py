"""RAAD on the command line: its flags, what it refuses, and the stages that one command stands for."""

import argparse
from pathlib import Path
from typing import get_args

import torch

from common.errors import UserError
from models.build import PDN_ENCODERS
from models.efficientad import MAP_NORMALISATIONS
from models.patch_description import TEACHER_CHANNELS, PatchDescriptionNetwork
from quantize.accounting import layer_sizes
from quantize.allocation import METHODS, PHIS, SHARES, AllocationOptions, allocate
from quantize.quantizers import RangeMethod
from quantize.reconstruction import FISHER
from quantize.scores import INPUTS, SCORES, TAPS
from utils.converters import number
from utils.host import Config
from utils.penalty import images_below

STAGES = ("baseline", "quantize", "finetune")
BASELINE, QUANTIZE, FINETUNE = range(3)
_IMAGE_SIZE = 256
BASELINE_ITERATIONS, _FINETUNE_ITERATIONS = 70_000, 60_000
_ROUNDINGS = ("adaround", "nearest", "lsq")
QUANTIZATION_FLAGS = (
    "allocation",
    "bits",
    "budget",
    "share_bits",
    "ends_bits",
    "hqs_score",
    "hqs_phi",
    "hqs_input",
    "hqs_tap",
    "rounding",
    "learn_steps",
    "range_init",
    "bias_correction",
    "output_bits",
    "autoencoder_bits",
    "fisher",
    "recon_iters",
    "recon_activation_iters",
    "recon_crops",
    "recon_batch_size",
    "recon_learning_rate",
    "calibration_images_count",
)
_FINETUNE_WAYS = ("ste", "float")
_FINETUNE_FLAGS = ("finetune", "finetune_iters", "finetune_learning_rate")


def _add_network_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--stage",
        choices=[*STAGES, "all"],
        default="all",
        help="baseline: float; quantize: bits by the layers' scores; finetune: trained on; all: one after the other",
    )
    group.add_argument("--image_size", type=number(int, 64), help="a multiple of 32 (default 256)")
    group.add_argument(
        "--teacher_weights",
        dest="encoder_weights",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="of the patch description network, .safetensors or .pth; random: drawn, for tests and controls",
    )
    group.add_argument(
        "--map_normalisation",
        choices=MAP_NORMALISATIONS,
        default="quantile",
        help="bring both maps to one scale by quantiles on normal images",
    )
    group.add_argument(
        "--padding",
        action="store_true",
        help="zeros around the images, so that maps reach their border; layers are then reconstructed on whole images",
    )
    group.add_argument(
        "--hard_quantile",
        type=number(float, 0, 0.999999),
        default=0.999,
        help="the student learns from errors above it; 0: from all",
    )
    group.add_argument("--jitter", type=number(float, 0, 1), default=0.2, help="of the autoencoder's images")
    group.add_argument(
        "--penalty_images",
        metavar="FOLDER",
        help="images of anything else, on which the student learns to stay silent",
    )


def _add_allocation_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allocation",
        choices=[*METHODS, "none"],
        default="hqs",
        help="which layer gets how many bits; none: no quantization, finetune goes on from the baseline (a control)",
    )
    group.add_argument(
        "--bits", nargs="+", type=number(int, 2, 8), metavar="N", help="uniform: one; manual: of each layer but the ends"
    )
    group.add_argument(
        "--budget", type=number(float, 1), metavar="N", help="effective parameters (default: of 4 bits between the ends)"
    )
    group.add_argument("--share_bits", choices=SHARES, default="pair", help="teacher and student alike, or teacher as its ends")
    group.add_argument("--ends_bits", type=number(int, 2, 8), default=8, help="of first and last layer")
    group.add_argument("--hqs_score", choices=SCORES, default="mse_relative", help="how far a layer's outputs lie apart")
    group.add_argument("--hqs_phi", choices=PHIS, default="ratio", help="from scores to bits")
    group.add_argument("--hqs_input", choices=INPUTS, default="own", help="what each layer sees: its own chain, the teacher's")
    group.add_argument("--hqs_tap", choices=TAPS, default="pre", help="outputs before or after the ReLU")


def _add_quantization_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rounding",
        choices=_ROUNDINGS,
        default="adaround",
        help="adaround: learned layer by layer; nearest; lsq: nearest, with --learn_steps",
    )
    group.add_argument(
        "--learn_steps", action="store_true", help="finetune trains the quantizers' steps, too, whatever the rounding"
    )
    group.add_argument(
        "--range_init", choices=get_args(RangeMethod), default="search", help="ranges of weights and activations"
    )
    group.add_argument(
        "--bias_correction", action=argparse.BooleanOptionalAction, default=True, help="keep the means of all channels"
    )
    group.add_argument(
        "--output_bits", type=number(int, 0, 8), default=8, help="after each ReLU, for integer engines; 0: float"
    )
    group.add_argument("--autoencoder_bits", type=number(int, 2, 8), help="of all its layers (default: float)")
    group.add_argument("--fisher", choices=FISHER, default="task", help="what weighs the errors of the reconstruction")
    group.add_argument("--recon_iters", type=number(int, 0), default=20_000, help="of the rounding of each layer")
    group.add_argument("--recon_activation_iters", type=number(int, 0), default=5_000, help="of its activations' steps")
    group.add_argument(
        "--recon_crops", type=number(int, 1), default=256, metavar="N", help="of 65 pixels, to reconstruct from (2 GB for 256)"
    )
    group.add_argument("--recon_batch_size", type=number(int, 1), default=32)
    group.add_argument("--recon_learning_rate", type=number(float, 0), default=1e-3)
    group.add_argument(
        "--calibration_images_count", type=number(int, 1), default=256, help="training images for ranges and reconstruction"
    )
    group.add_argument(
        "--finetune",
        choices=_FINETUNE_WAYS,
        default="ste",
        help="ste: with the quantizers on, gradients straight through; float: the student goes on from its rounded weights "
        "without them, and stays float",
    )
    group.add_argument("--finetune_iters", type=number(int, 1), default=_FINETUNE_ITERATIONS)
    group.add_argument("--finetune_learning_rate", type=number(float, 0), default=1e-5)
    group.add_argument(
        "--baseline", metavar="NAME", help="save name of the runs whose baseline is quantized (default: this one's)"
    )


def add_raad_flags(group: argparse._ArgumentGroup) -> None:
    _add_network_flags(group)
    _add_allocation_flags(group)
    _add_quantization_flags(group)


def check_raad(arguments: argparse.Namespace) -> None:
    training = arguments.phase == "train"
    if arguments.input_size != arguments.crop_size:
        raise UserError(
            f"--input_size {arguments.input_size} and --crop_size {arguments.crop_size}: RAAD sees whole images, without a "
            "crop; give --image_size alone"
        )
    if arguments.image_size not in (None, arguments.crop_size):
        raise UserError(
            f"--image_size {arguments.image_size} and --crop_size {arguments.crop_size} contradict, on the command line "
            "or with a --config; give one of them"
        )
    if arguments.total_epochs:
        raise UserError("--total_epochs: EfficientAD counts iterations; give --total_iters and --finetune_iters")
    if arguments.total_iters == 0 and arguments.clb_stage == BASELINE and training:
        raise UserError("--total_iters 0 trains no baseline; give at least 1")
    if arguments.scoring == "prototype":
        raise UserError("--scoring prototype needs prototypes and RAAD has none; leave it out")
    if arguments.sab != "off" or arguments.act_bits != 1 or arguments.distill or arguments.distill_teacher:
        raise UserError("--sab, --act_bits and --distill are for binary networks and RAAD is quantized; leave them out")
    if arguments.penalty_images and training and not any(images_below(Path(arguments.penalty_images))):
        raise UserError(f"--penalty_images {arguments.penalty_images!r} is no folder with images; give one, whatever they show")
    if arguments.allocation not in (None, "none"):
        _check_allocation(arguments)


def _check_allocation(arguments: argparse.Namespace) -> None:
    """What the allocation of bits refuses, before a baseline is trained for it."""
    method = arguments.allocation
    if arguments.bits and method not in ("uniform", "manual"):
        raise UserError(f"--bits with --allocation {method}, which finds them itself; give --allocation uniform or manual")
    of_scores = arguments.hqs_phi == "budget" and method in ("hqs", "inverted")
    if arguments.budget and not (of_scores or method in ("budget", "ompq", "hawq")):
        raise UserError(
            f"--budget with --allocation {method}, which keeps none; give --allocation budget, ompq or hawq, or "
            "--hqs_phi budget"
        )
    options, size = allocation_options(vars(arguments)), PDN_ENCODERS[arguments.encoder]
    with torch.device("meta"):  # only counted
        networks = [PatchDescriptionNetwork(size, halves * TEACHER_CHANNELS[size]) for halves in (1, 2)]
    parameters = [[layer.parameters for layer in layer_sizes(network)] for network in networks]
    layers = len(parameters[0])
    allocate(options, *parameters, scores=[1.0] * layers, perturbations=[[0.0] * len(options.choices)] * layers)


def choose_raad_defaults(arguments: argparse.Namespace) -> Config:
    size = arguments.image_size or _IMAGE_SIZE
    return {
        "input_size": arguments.crop_size or size,
        "crop_size": arguments.input_size or size,
        "total_iters": None if arguments.total_epochs else BASELINE_ITERATIONS,
        "final_learning_rate": arguments.learning_rate / 10,
    }


def _check_stages(arguments: argparse.Namespace) -> None:
    """What contradicts the choice of stages, which is not to be seen any more once each is a command of its own."""
    stage, start = arguments.stage, arguments.load_checkpoint
    if arguments.allocation == "none" and stage == "quantize":
        raise UserError("--stage quantize with --allocation none has nothing to do; give an allocation, or --stage finetune")
    if arguments.allocation == "none" and (arguments.bits or arguments.budget or arguments.autoencoder_bits):
        raise UserError("--allocation none quantizes nothing; leave --bits, --budget and --autoencoder_bits out")
    if arguments.allocation == "none" and arguments.finetune == "float":
        raise UserError("--finetune float with --allocation none, where all is float; leave --finetune out")
    if stage == "all" and (start or arguments.test_checkpoint):
        flag = "--load_checkpoint" if start else "--test_checkpoint"
        raise UserError(f"{flag} is a model of one stage and --stage all means several; give that --stage with it")
    if stage == "baseline" and (arguments.bits or arguments.budget or arguments.autoencoder_bits):
        raise UserError("--stage baseline quantizes nothing; leave --bits, --budget and --autoencoder_bits out")
    if arguments.baseline and stage == "baseline":
        raise UserError("--baseline names the baseline of another run and --stage baseline trains one; give --save_name alone")
    if arguments.baseline and start not in (None, f"{arguments.baseline.removesuffix('-Baseline')}-Baseline"):
        raise UserError(f"--baseline {arguments.baseline} and --load_checkpoint {start} name two models; give one of them")


def stages_of(arguments: argparse.Namespace, default_name: str) -> list[argparse.Namespace]:
    """The commands that one command stands for, a stage each, with the save names by which they find each other.

    Flags that mean nothing to a stage are left open in it, so that its run belongs to no choice of them. Without
    quantization the finetuning goes on from the baseline; with `--baseline` the baseline is that run's.
    """
    _check_stages(arguments)
    base = (arguments.save_name or default_name).removesuffix("-Baseline").removesuffix("-Quantized")  # of a run's config.yaml
    names = (f"{(arguments.baseline or base).removesuffix('-Baseline')}-Baseline", f"{base}-Quantized", base)
    wanted = [STAGES.index(arguments.stage)] if arguments.stage != "all" else [BASELINE, QUANTIZE, FINETUNE]
    quantized = arguments.allocation != "none"
    if arguments.stage == "all" and not quantized:
        wanted.remove(QUANTIZE)
    if arguments.stage == "all" and arguments.baseline:
        wanted.remove(BASELINE)
    changes: dict[int, dict[str, object]] = {
        BASELINE: {flag: None for flag in (*QUANTIZATION_FLAGS, *_FINETUNE_FLAGS)} | {"baseline": None},
        QUANTIZE: {"total_iters": 0, "load_checkpoint": arguments.load_checkpoint or names[BASELINE]}
        | {flag: None for flag in _FINETUNE_FLAGS},
        FINETUNE: {
            "total_iters": arguments.finetune_iters,
            "learning_rate": arguments.finetune_learning_rate,
            "load_checkpoint": arguments.load_checkpoint or names[QUANTIZE if quantized else BASELINE],
        }
        | ({"baseline": None} if quantized else {flag: None for flag in QUANTIZATION_FLAGS if flag != "allocation"}),
    }
    return [
        argparse.Namespace(
            **{**vars(arguments), "stage": STAGES[stage], "clb_stage": stage, "save_name": names[stage], **changes[stage]}
        )
        for stage in wanted
    ]


def allocation_options(config: Config) -> AllocationOptions:
    return AllocationOptions(
        method=config["allocation"],
        phi=config["hqs_phi"],
        share=config["share_bits"],
        ends_bits=config["ends_bits"],
        budget=config["budget"],
        bits=tuple(config["bits"] or ()),
        seed=config["seed"],
    )
