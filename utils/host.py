"""What a network brings to the command line and to the engine besides its layers."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from binarize.linear import BinarizationOptions
from binarize.stages import binarize
from models.build import ENCODERS, Taps, build_encoder
from models.detector import Detector

Config = Mapping[str, object]  # flags by name
Passes = Callable[[], Iterable[Tensor]]  # every call is a pass over batches of inputs
BINARY_KEYS = ("act_bits", "sab", "weight_gradient", "activation_gradient")  # what a binary network depends on


def _binarize(detector: Detector, stage: int, config: Config, state: Mapping[str, Tensor]) -> None:
    binarize(detector, stage, BinarizationOptions(*(config[key] for key in BINARY_KEYS)))


def _prepare(detector: Detector, config: Config, training: Passes, normal: Passes) -> Config:
    detector.prepare(training)
    return {}


@dataclass(frozen=True)
class Host:
    """A network that becomes binary, or is quantized.

    Attributes:
        name: what checkpoints, run folders and tables call it.
        network_flags: flags of its own that its network depends on, by name.
        training_flags: flags of its own that only its training depends on.
        folder_flags: network flags that the names of its run folders end with.
        add_flags: adds network and training flags to an argument group.
        defaults: of shared flags, where the host has its own.
        help: of shared flags, where the host has its own.
        check: raises UserError for a command that it cannot follow.
        choose_defaults: command -> values of flags that it leaves open (None) and that depend on setting and data set.
        build: encoder and a config with the network flags -> fresh float detector.
        convert: detector, stage, config, state -> the form of a stage, in place; `state` holds the tensors of a checkpoint that
            will be loaded, nothing for a training that starts.
        prepare_training: give a detector the training flags of a config.
        prepare: detector, config, passes over the training images, over held-out ones (if none, the same) -> what a run should
            record of what the detector learned from them before the training (plain values, by name).
        training_facts: config -> what a run's training depends on besides its configuration, by name.
        start_stage: config -> stage of the checkpoint that a training goes on from.
        stage_flags: flags that checkpoints of stage 1 and 2 must share with the command that goes on from them.
        encoders: values of `--encoder`.
        build_encoder: its name, the images' side, a file or None for its weights, `--pos_embed` -> frozen part.
        binarizes: whether it has the flags of binarization.
        taps: which blocks of the encoder it takes.
        stages: what `--stage` calls them; empty: they are CLB stages, which `--clb_stage` counts.
        stage_suffixes: what default save names end with, by stage.
        exports_float: whether its float model (stage 0) gets a packed file, too.
        exports_graph: whether it has a form for other runtimes.
    """

    name: str
    network_flags: tuple[str, ...]
    training_flags: tuple[str, ...]
    folder_flags: tuple[str, ...]
    add_flags: Callable[[argparse._ArgumentGroup], None]
    defaults: Config
    help: Mapping[str, str]
    check: Callable[[argparse.Namespace], None]
    choose_defaults: Callable[[argparse.Namespace], Config]
    build: Callable[[nn.Module, Config], Detector]
    prepare_training: Callable[[Detector, Config], None]
    prepare: Callable[[Detector, Config, Passes, Passes], Config] = _prepare
    training_facts: Callable[[Config], dict[str, object]] = lambda config: {}
    start_stage: Callable[[Config], int] = lambda config: config["clb_stage"] - 1
    stage_flags: tuple[str, ...] = BINARY_KEYS
    convert: Callable[[Detector, int, Config, Mapping[str, Tensor]], None] = _binarize
    encoders: tuple[str, ...] = tuple(ENCODERS)
    build_encoder: Callable[[str, int, str | None, str], nn.Module] = build_encoder
    binarizes: bool = True
    taps: Taps = "middle"
    stages: tuple[str, ...] = ()
    stage_suffixes: tuple[str, str, str] = ("-FP", "", "-CLB2")
    exports_float: bool = False
    exports_graph: bool = True

    def stage_name(self, stage: int) -> str:
        """What messages call a stage."""
        return f"stage {self.stages[stage]}" if self.stages else f"CLB stage {stage}"

    def stage_flag(self, stage: int) -> str:
        """How a command asks for a stage."""
        return f"--stage {self.stages[stage]}" if self.stages else f"--clb_stage {stage}"


def fields_of(kind: type, config: Config) -> dict[str, object]:
    """The values of a dataclass's fields in a config."""
    return {field.name: config[field.name] for field in fields(kind)}
