"""What a network brings to the command line and to the engine besides its layers."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from models.build import Taps
from models.detector import Detector
from models.encoder import FrozenEncoder

Config = Mapping[str, object]  # flags by name


@dataclass(frozen=True)
class Host:
    """A network that becomes binary.

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
        prepare_training: give a detector the training flags of a config.
        taps: which blocks of the encoder it takes.
        stage_suffixes: what default save names end with, by CLB stage.
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
    build: Callable[[FrozenEncoder, Config], Detector]
    prepare_training: Callable[[Detector, Config], None]
    taps: Taps = "middle"
    stage_suffixes: tuple[str, str, str] = ("-FP", "", "-CLB2")
    exports_float: bool = False
    exports_graph: bool = True


def fields_of(kind: type, config: Config) -> dict[str, object]:
    """The values of a dataclass's fields in a config."""
    return {field.name: config[field.name] for field in fields(kind)}
