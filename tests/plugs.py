"""Faults that are put into a command before it begins (see `tests.commands`, `plug`)."""

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import torch

import models.encoder
import models.teacher
import utils.run_folder
from models.detector import Detector


def raise_unexpectedly() -> None:
    """A bug: results cannot be written, for a reason nobody thought of."""

    def write_results(*arguments):
        raise TypeError("a bug")

    utils.run_folder.write_results = write_results


def keep_training_state() -> None:
    """A finished training leaves its last.pth, as one that ends before its last evaluation does."""
    unlink = Path.unlink

    def unlink_others(path: Path, *arguments, **options) -> None:
        if path.name != "last.pth":
            unlink(path, *arguments, **options)

    Path.unlink = unlink_others


def old_torch() -> None:
    """A torch from before weights_only was safe."""
    torch.__version__ = "2.5.1"


def no_network(folder: str) -> None:
    """No connection, and of all weights only what a folder holds: `weights` and the hub's cache `hub`."""
    models.encoder._hub_is_reachable = lambda: False
    models.encoder.LOCAL_WEIGHTS_FOLDER = Path(folder) / "weights"
    models.teacher.LOCAL_WEIGHTS_FOLDER = Path(folder) / "weights"
    huggingface_hub.constants.HF_HUB_CACHE = str(Path(folder) / "hub")


def maps_are(value: str) -> None:
    """Every pixel of every anomaly map has one value."""
    _change_maps(lambda maps: maps.fill_(float(value)))


def maps_have(value: str) -> None:
    """The middle pixel of every second anomaly map, counted from the first, has this value."""
    count = itertools.count()

    def change(maps: torch.Tensor) -> torch.Tensor:
        for anomaly_map in maps:
            if next(count) % 2:
                anomaly_map[len(anomaly_map) // 2, len(anomaly_map) // 2] = float(value)
        return maps

    _change_maps(change)


def _change_maps(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def wrapped(original: Callable) -> Callable:
        return lambda self, inputs: change(original(self, inputs).clone())

    kinds = [Detector]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind is not Detector and "anomaly_map" in vars(kind):
            kind.anomaly_map = wrapped(kind.anomaly_map)


def end_when_opened(folder: str) -> None:
    """The process ends with code 99 as soon as it opens anything below a folder."""

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and str(arguments[0]).startswith(folder):
            os._exit(99)

    sys.addaudithook(watch)
