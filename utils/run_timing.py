"""Milliseconds of the models of runs, from a decoded photograph to its map, measured side by side and kept with the runs."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from datasets.transforms import image_transform
from models.detector import Detector
from utils.agreement import packed_copy
from utils.checkpoint import write_text
from utils.detectors import load_detector
from utils.hosts import HOSTS
from utils.packed_model import PackingOptions
from utils.run_results import TIMING_FILE, has_begun, load_run, training_folder
from utils.timing import describe_machine, interleaved_medians

logger = logging.getLogger(__name__)

_PHOTO_SIDE = 900
# of a training's configuration: what a model's time depends on, beside its host's flags; its values do not matter
_NETWORK_KEYS = ("clb_stage", "encoder", "input_size", "crop_size", "interpolation", "act_bits", "sab")


def measure_runs(folders: Sequence[Path], encoder_weights: str | None, repeats: int) -> None:
    """Time the model of every run on one thread and write `timing.json` into its folder; equal networks are timed once.

    Raises:
        UserError: no run has a trained model, or one cannot be loaded.
    """
    networks: dict[tuple, list[Path]] = {}
    for folder in dict.fromkeys(training_folder(folder) for folder in folders if has_begun(folder)):
        if _model_file(folder) is None:
            logger.warning("%s has no trained model yet and is not timed", folder)
            continue
        run = load_run(folder)
        networks.setdefault((*(run.config[key] for key in _NETWORK_KEYS), run.network), []).append(folder)
    if not networks:
        raise UserError("--measure: none of the runs has a trained model; train at least one")
    models = {network: _model_file(same[0]) for network, same in networks.items()}
    with torch.inference_mode(), _one_thread():
        calls = {network: _photo_to_map(path, encoder_weights) for network, path in models.items()}
        seconds = interleaved_medians(calls, repeats)
        measurement = {"machine": describe_machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    for network, same in networks.items():
        engine = _engine(load_run(same[0]).host, stage=network[0])
        content = {"milliseconds": 1000 * seconds[network], "engine": engine, "model": str(models[network])}
        content |= measurement
        for folder in same:
            write_text(folder / TIMING_FILE, json.dumps(content, indent=2) + "\n")
            logger.info("%s: %.1f ms per image, %s", folder, content["milliseconds"], content["engine"])


def _engine(host: str, stage: int) -> str:
    """What runs a model of this stage in `_photo_to_map`."""
    if stage == 0:
        return "torch float32"
    return "1-bit engine, int8 encoder" if HOSTS[host].binarizes else "torch, quantization simulated (scripts.benchmark_raad)"


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _model_file(folder: Path) -> Path | None:
    """The model of all categories, or of the first that has one."""
    whole = folder / "model.pth"
    return whole if whole.is_file() else next(iter(sorted(folder.rglob("model.pth"))), None)


def _photo_to_map(path: Path, encoder_weights: str | None) -> Callable[[], object]:
    """One run of a model: float as trained, binary stages as they are deployed, on bits with an int8 encoder; RAAD in torch."""
    detector, content = load_detector(path, encoder_weights)
    config = content["config"]
    on_bits = content["stage"] > 0 and HOSTS[content["host"]].binarizes
    deployed: Detector = packed_copy(detector, PackingOptions()) if on_bits else detector
    transform = image_transform(config["input_size"], config["crop_size"], config.get("interpolation", "bilinear"))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (_PHOTO_SIDE, _PHOTO_SIDE, 3), dtype=np.uint8))
    return lambda: deployed.anomaly_map(deployed.encode(transform(photo).unsqueeze(0)))
