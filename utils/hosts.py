"""The networks by name: how each is built, which flags are its own, and what its authors train it with."""

import argparse
from dataclasses import fields

from common.errors import UserError
from datasets.few_shot import DEFAULT_SHOT
from models.build import build_dinomaly, build_inp_former
from models.dinomaly import ATTENTIONS, MINING_WARMUP, DinomalyOptions, DinomalyTraining
from utils.converters import number
from utils.host import Config, Host, fields_of
from utils.raad_host import RAAD
from utils.varad_host import VARAD


def _add_inp_former_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--INP_num", type=number(int, 1), default=6, help="intrinsic normal prototypes per image")


INP_FORMER = Host(
    name="INP-Former",
    network_flags=("INP_num",),
    training_flags=(),
    folder_flags=("INP_num",),
    add_flags=_add_inp_former_flags,
    defaults={},
    help={},
    check=lambda arguments: None,
    choose_defaults=lambda arguments: {},
    build=lambda encoder, config: build_inp_former(encoder, config["INP_num"]),
    prepare_training=lambda detector, config: None,
)


def _add_dinomaly_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--decoder_attention", choices=list(ATTENTIONS), default="linear", help="softmax has maps for --sab")
    group.add_argument(
        "--groups", type=int, choices=[1, 2], default=2, help="means of layers that are compared: of all, or lower and upper"
    )
    group.add_argument(
        "--remove_class_token",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep class and register tokens out of the decoder",
    )
    group.add_argument(
        "--recentre",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="rebuild patches relative to the class token (Dinomaly2)",
    )
    group.add_argument(
        "--bottleneck_dropout", type=number(float, 0, 0.9), help="default 0.2, in a model of all categories of Real-IAD 0.4"
    )
    group.add_argument(
        "--mining_final", type=number(float, 0, 1), default=0.9, help="share of tokens that become easy (default 0.9)"
    )
    group.add_argument(
        "--mining_warmup",
        type=number(int, 0),
        help=f"iterations until then; default {MINING_WARMUP}, at most a fifth of the run",
    )
    group.add_argument(
        "--mining_factor", type=number(float, 0, 1), default=0.1, help="on the gradient of easy tokens (default 0.1)"
    )


def _check_dinomaly(arguments: argparse.Namespace) -> None:
    if arguments.decoder_attention == "linear" and arguments.sab != "off":
        raise UserError(
            f"--sab {arguments.sab} binarizes attention maps and linear attention has none; leave it out, or give "
            "--decoder_attention softmax"
        )
    if arguments.total_epochs and arguments.total_iters:
        raise UserError("--total_epochs and --total_iters both say how long to train; give one of them")
    if arguments.scoring == "prototype":
        raise UserError("--scoring prototype needs prototypes and Dinomaly has none; leave it out")


def _choose_dinomaly_defaults(arguments: argparse.Namespace) -> Config:
    """The numbers of the authors' seven scripts; few-shot, which is not among them, as the setting with as many models."""
    of_one = arguments.setting == "single" or (arguments.setting == "few" and arguments.per_category)
    real_iad = "Real-IAD" in arguments.dataset.split("+")
    iterations = 5_000 if of_one else 50_000 if real_iad else 10_000
    return {
        "total_iters": None if arguments.total_epochs else iterations,
        "bottleneck_dropout": 0.4 if real_iad and not of_one else 0.2,
        "adam_eps": 1e-8 if of_one and not real_iad else 1e-10,
        "shot": DEFAULT_SHOT if arguments.setting == "few" else None,
        "sab": "mixed" if arguments.decoder_attention == "softmax" else "off",
    }


DINOMALY = Host(
    name="Dinomaly",
    network_flags=tuple(field.name for field in fields(DinomalyOptions)),
    training_flags=tuple(field.name for field in fields(DinomalyTraining)),
    folder_flags=(),
    add_flags=_add_dinomaly_flags,
    defaults={
        "shot": None,
        "total_epochs": None,
        "learning_rate": 2e-3,
        "final_learning_rate": 2e-4,
        "adam_eps": None,
        "sab": None,
        "mask_threshold": 0.0,
    },
    help={
        "total_iters": "default 10000, with Real-IAD 50000, for a model per category 5000",
        "total_epochs": "passes over the training images instead of iterations",
        "adam_eps": "of StableAdamW; default 1e-10, for a model per category 1e-8 (but Real-IAD)",
        "sab": "softmax-aware binarization of attention maps; default mixed, with linear attention off",
        "scoring": "only reconstruction",
    },
    check=_check_dinomaly,
    choose_defaults=_choose_dinomaly_defaults,
    build=lambda encoder, config: build_dinomaly(encoder, DinomalyOptions(**fields_of(DinomalyOptions, config))),
    prepare_training=lambda detector, config: detector.train_with(DinomalyTraining(**fields_of(DinomalyTraining, config))),
)


HOSTS = {host.name: host for host in (INP_FORMER, DINOMALY, VARAD, RAAD)}


def network_defaults(host: Host) -> dict[str, object]:
    """The network flags of a host as its authors have them."""
    parser = argparse.ArgumentParser()
    host.add_flags(parser)
    defaults = vars(parser.parse_args([]))
    return {flag: defaults[flag] for flag in host.network_flags}


def stage_of(config: Config) -> str:
    """What the stage of a run is called."""
    return HOSTS[config.get("host", INP_FORMER.name)].stage_name(config["clb_stage"])


def described_network(config: Config) -> str:
    """What stands on the encoder: the host, with those flags of its network that are not as its authors have them."""
    host = HOSTS[config.get("host", INP_FORMER.name)]  # runs from before there were two do not say it
    usual = network_defaults(host)
    changed = [f"{flag} {config[flag]}" for flag in usual if config.get(flag, usual[flag]) != usual[flag]]
    return ", ".join([host.name, *changed])
