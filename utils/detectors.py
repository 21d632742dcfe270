"""Put a detector together: host network, stage, and the weights it starts from."""

import logging
from pathlib import Path

import torch

from common import schema
from common.errors import UserError
from models.detector import Detector
from models.encoder import FrozenEncoder
from models.teacher import RANDOM_TEACHER
from utils.categories import ModelData
from utils.checkpoint import load_checkpoint
from utils.host import Host
from utils.hosts import HOSTS
from utils.network_config import check_network
from utils.run_folder import RunFolder
from utils.settings import ModelOptions, Settings
from utils.stored_config import EARLIER_DEFAULTS
from utils.trained_state import fitting_state, without_prefixes

logger = logging.getLogger(__name__)


# What a checkpoint and the command that reads it must agree on: the network, the data it is for, and once binary, the bits.
_NETWORK_KEYS = ("encoder", "encoder_sha256", "pos_embed", "input_size", "crop_size", "interpolation")
_NEEDS = {"host": schema.text, "item": schema.text, "stage": schema.one_of(0, 1, 2)}
_SCALE = schema.fields(
    {"map_median": schema.real(), "map_limit": schema.real()},
    {"map_threshold": schema.real(), "scores": schema.sequence_of(schema.real(), 1)},
)
CALIBRATION = {"calibration": _SCALE}
_MAY = {**CALIBRATION, "calibrations": schema.mapping_to(_SCALE), "protocol": schema.mapping}
_DATA_KEYS = ("dataset", "item", "items", "chosen_files")


def description(settings: Settings, model: ModelData, encoder: FrozenEncoder, host: str) -> dict:
    """What a checkpoint says about its model."""
    content = {
        "host": host,
        "item": model.name,
        "stage": settings.model.stage,
        "encoder": encoder.name,
        "encoder_sha256": encoder.weights_sha256,
        "config": settings.identity,
    }
    if settings.phase == "train" and not model.one_of_many:
        content["items"] = model.items
    if settings.phase == "train" and settings.data.shot is not None:
        content["chosen_files"] = {category.item: category.chosen_files() for category in model.categories}
    return content


def checkpoint_path(settings: Settings, reference: str, model: ModelData) -> Path:
    """The file meant by `NAME|FILE`: an existing file, else this model in the run of that save_name."""
    if Path(reference).is_file():
        return Path(reference)
    path = model.folder(settings.run_path_of(reference)) / "model.pth"
    if not path.is_file():
        raise UserError(
            f"no model for {reference!r}: neither a file of that name nor {str(path)!r} exists; train that stage first "
            "with the same data set, encoder, sizes and network flags"
        )
    return path


def open_checkpoint(path: Path, expected: dict, stages: tuple[int, ...], purpose: str, same_data: bool = True) -> dict:
    """Read a checkpoint and compare it with what the command expects; without `same_data` it may be for other categories.

    Raises:
        UserError: damaged, of another stage than `stages`, or of another model; shows expected and found.
    """
    content = load_checkpoint(path, _NEEDS, _MAY)
    if content["host"] != expected["host"]:
        raise UserError(
            f"wrong model: {str(path)!r} is a model of {content['host']}, this script is for {expected['host']}; give one of "
            "this host, or use the other's script"
        )
    if content["stage"] not in stages:
        host = HOSTS[content["host"]]
        wanted = " or ".join(map(host.stage_name, stages))
        raise UserError(
            f"wrong stage: {purpose} needs a model of {wanted}, {str(path)!r} is of {host.stage_name(content['stage'])}"
        )
    keys = _NETWORK_KEYS + HOSTS[expected["host"]].network_flags + (_DATA_KEYS if same_data else ())
    keys += HOSTS[expected["host"]].stage_flags if content["stage"] > 0 and expected["stage"] > 0 else ()
    found, wanted = ({**EARLIER_DEFAULTS, **about["config"], **about} for about in (content, expected))
    differing = [key for key in keys if key in wanted and found.get(key) != wanted[key]]
    differences = [
        "chosen_files: other few-shot images, see --shot and --seed"
        if key == "chosen_files"
        else f"{key}: expected {wanted[key]!r}, found {found.get(key)!r}"
        for key in differing
    ]
    if "encoder_sha256" in differing:
        differences.append("give the weights that it was trained with, or train it again with these")
    elif differing and content["stage"] > 0:
        differences.append("give what it was trained with, or train the stage before with these values first")
    if differences:
        raise UserError(f"wrong model: {str(path)!r} does not fit this command; {'; '.join(differences)}")
    return content


def restore_detector(content: dict, path: Path, encoder: FrozenEncoder, host: Host) -> Detector:
    """The detector of a checkpoint, at its own stage."""
    config, state = content["config"], without_prefixes(content["model"])
    try:
        detector = host.build(encoder, config)
        host.convert(detector, content["stage"], config, state)
        detector.load_trained_state(fitting_state(state, detector.trained_state(), path))
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"wrong model: {str(path)!r} does not describe a model this program knows ({' '.join(str(error).split())}); give "
            "another copy, or train again"
        ) from error
    return detector


def read_described(path: Path) -> dict:
    """Content of a checkpoint that is to be rebuilt by what it says of itself; raises UserError unless that makes a network."""
    content = load_checkpoint(path, _NEEDS, _MAY)
    if content["host"] not in HOSTS:
        raise UserError(f"unknown host: {str(path)!r} holds a {content['host']!r}, known are {' '.join(HOSTS)}")
    host = HOSTS[content["host"]]
    try:
        check_network(content["config"], host)
        schema.one_of(*host.encoders)(content["encoder"], "encoder")
    except ValueError as error:
        raise UserError(f"checkpoint unusable: in {str(path)!r} {error}; train that model again") from error
    return content


def load_detector(path: Path, encoder_weights: str | None) -> tuple[Detector, dict]:
    """The detector of a `model.pth` with the encoder it was trained on, and the checkpoint's content.

    Raises:
        UserError: the file is no usable model, or the encoder's weights cannot be had or are others than in training.
    """
    content = read_described(path)
    host, config = HOSTS[content["host"]], content["config"]
    weights = encoder_weights or _weights_of_training(path)
    encoder = host.build_encoder(content["encoder"], config["crop_size"], weights, config["pos_embed"])
    if encoder.weights_sha256 != content["encoder_sha256"]:
        raise UserError(
            f"wrong encoder: {str(path)!r} was trained on {content['encoder']} of sha256 {content['encoder_sha256'][:16]}, "
            f"{encoder.source} has {encoder.weights_sha256[:16]}; give --encoder_weights FILE with the weights of the training"
        )
    return restore_detector(content, path, encoder, host).eval(), content


def _weights_of_training(checkpoint: Path) -> str | None:
    """The file that the training was given, if it is still there (or `random`), from the settings in its run folder."""
    for folder in checkpoint.parents[:2]:  # of one model of all categories, of a model of one
        stored = RunFolder(folder).stored_config() or {}
        named = stored.get("encoder_weights")
        if named and (named == RANDOM_TEACHER or Path(named).is_file()):
            return named
    return None


def start_detector(settings: Settings, model: ModelData, encoder: FrozenEncoder, host: Host, device: torch.device) -> Detector:
    """A detector ready to be trained at the wanted stage: fresh, or from the stage before; with its teacher, if any."""
    options, expected = settings.model, description(settings, model, encoder, host.name)
    if options.load_checkpoint is None:
        detector = host.build(encoder, settings.config)
    else:
        path = checkpoint_path(settings, options.load_checkpoint, model)
        content = open_checkpoint(path, expected, (host.start_stage(settings.config),), host.stage_flag(options.stage))
        _check_held_out(settings, content, path)
        detector = restore_detector(content, path, encoder, host)
        logger.info("%s: starts from %s (%s)", model.name, path, host.stage_name(content["stage"]))
    host.convert(detector, options.stage, settings.config, {})
    host.prepare_training(detector.to(device), settings.config)
    if options.distillation_weight:
        path = checkpoint_path(settings, _teacher_reference(options), model)
        content = open_checkpoint(path, expected, (0,), "--distill")
        detector.distil_from(restore_detector(content, path, encoder, host).to(device), options.distillation_weight)
        logger.info("%s: distils from %s", model.name, path)
    return detector


def _check_held_out(settings: Settings, content: dict, path: Path) -> None:
    """What is held out here must not have been trained on there; the seed decides which images that is."""
    keys = ("holdout", "seed")
    there, here = ([{**EARLIER_DEFAULTS, **config}.get(key) for key in keys] for config in (content["config"], settings.config))
    if settings.data.holdout and there != here:
        raise UserError(
            f"--holdout {here[0]:g} and --seed {here[1]}: {str(path)!r}, from which this training starts, has --holdout "
            f"{there[0]:g} and --seed {there[1]} and may have seen images that are held out now; give the same of both, or "
            "--holdout 0"
        )


def _teacher_reference(options: ModelOptions) -> str:
    return options.distillation_teacher or options.load_checkpoint


def check_referenced_checkpoints(settings: Settings, model: ModelData, encoder: FrozenEncoder, host: Host) -> None:
    """Open all models that this training starts from; raises UserError as `open_checkpoint` does."""
    options, expected = settings.model, description(settings, model, encoder, host.name)
    if options.load_checkpoint:
        path = checkpoint_path(settings, options.load_checkpoint, model)
        content = open_checkpoint(path, expected, (host.start_stage(settings.config),), host.stage_flag(options.stage))
        _check_held_out(settings, content, path)
    if options.distillation_weight:
        open_checkpoint(checkpoint_path(settings, _teacher_reference(options), model), expected, (0,), "--distill")
