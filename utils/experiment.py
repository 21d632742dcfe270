"""What all models of one command share, and what training and test do alike."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from binarize.cost import cost_table
from common.errors import NumericError, UserError
from models.detector import Detector
from models.encoder import FrozenEncoder
from utils.categories import CategoryData, ModelData
from utils.detectors import description, restore_detector
from utils.distributed import is_main, on_main, world_size
from utils.evaluation import measure
from utils.hosts import Host
from utils.prepared_data import Places, plan_features
from utils.report import write_cost
from utils.results import report_category, scale_of_unknown
from utils.run_folder import RunFolder
from utils.settings import Settings
from utils.tables import format_cost

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Experiment:
    """What all models of one command share; `items` are all categories of the data sets, in their order."""

    settings: Settings
    host: Host
    run: RunFolder
    encoder: FrozenEncoder
    device: torch.device
    items: list[str]
    models: list[ModelData]

    def description(self, model: ModelData) -> dict:
        """What a checkpoint of this command says about its model."""
        return description(self.settings, model, self.encoder, self.host.name)

    def restored(self, content: dict, path: Path) -> Detector:
        """The detector of an opened checkpoint, on the device."""
        return restore_detector(content, path, self.encoder, self.host).to(self.device)

    @property
    def wanted(self) -> list[str]:
        """The categories of this command."""
        return [item for model in self.models for item in model.items]


def log_start(experiment: Experiment) -> None:
    """Say what is about to happen, with which encoder, and how it will be measured."""
    settings, encoder = experiment.settings, experiment.encoder
    logger.info("run folder: %s, phase %s, device %s", experiment.run.path, settings.phase, experiment.device)
    flags = [f"{flag} {settings.config[flag]}" for flag in experiment.host.network_flags]
    logger.info("network: %s, %s, %s", experiment.host.name, experiment.host.stage_name(settings.model.stage), ", ".join(flags))
    logger.info("encoder: %s from %s (sha256 %s)", encoder.name, encoder.source, encoder.weights_sha256[:16])
    logger.info("evaluation: %s", settings.evaluation.describe())


def plan(experiment: Experiment) -> Places:
    """As `plan_features`, for all models of the command."""
    settings = experiment.settings
    detector = experiment.host.build(experiment.encoder, settings.config).to(experiment.device)
    return plan_features(settings, experiment.models, detector)


@contextlib.contextmanager
def others_go_on(run: RunFolder, items: list[str], alone: bool) -> Iterator[None]:
    """With several categories the failure of one is noted and the others go on; several processes end together."""
    try:
        yield
    except (UserError, NumericError) as error:
        if alone:
            raise
        if is_main():
            run.add_failures(items, str(error))
        if world_size() > 1:  # the others may not have failed, and wait for this one
            raise
        logger.error("%s: failed: %s", " ".join(items), error)


def count_cost(run: RunFolder, detector: Detector, crop_size: int) -> None:
    """Count a detector's cost, show it and store it with the run."""
    table = cost_table(detector, crop_size)
    logger.info("cost of one %dx%d image (counted, not measured)\n%s", crop_size, crop_size, format_cost(table))
    write_cost(run.path / "cost.json", table)


def evaluate_category(
    experiment: Experiment, output: RunFolder, category: CategoryData, detector: Detector, data: Dataset, content: dict
) -> None:
    """Measure a category and write its scores, pictures and row."""
    settings, training = experiment.settings, experiment.settings.training
    calibration = None
    if not settings.test_checkpoint and settings.evaluation.scoring == "reconstruction":  # as all models are calibrated
        calibration = content.get("calibrations", {}).get(category.item, content["calibration"])
    measurement = measure(
        detector,
        data,
        settings.evaluation.with_threshold(calibration),
        training.batch_size,
        training.num_workers,
        training.precision,
        category.item,
        settings.metrics_memory,
        category.source.layout,
    )

    def write() -> None:
        scale = calibration or scale_of_unknown(settings, detector, data)
        report_category(settings, output, category, measurement, detector, data, scale)
        output.add_row(category.item, measurement.metrics, experiment.items, measurement.pixel_error)

    on_main(write)
