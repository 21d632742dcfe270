"""What is kept of a model and of its evaluation: what normal images look like, scores, pictures."""

import logging

from torch.utils.data import ConcatDataset, Dataset, Subset

from models.detector import Detector
from utils.categories import CategoryData, ModelData
from utils.evaluation import SCALE_SIDE, Evaluation, calibrate_scale, evaluate
from utils.measurement import Measurement
from utils.pictures import pick_worst_and_best, write_contact_sheet
from utils.report import format_metric
from utils.result_files import MetricsLog, write_bad_images, write_scores
from utils.run_folder import RunFolder
from utils.settings import Settings

logger = logging.getLogger(__name__)

_CALIBRATION_IMAGES, _LEAST_PER_CATEGORY = 256, 16
_UNKNOWN_IMAGES, _UNKNOWN_QUANTILE = 64, 0.95

Calibration = dict[str, float | list[float]]


def _evaluated(settings: Settings, detector: Detector, data: Dataset, name: str, largest_side: int | None = None) -> Evaluation:
    training = settings.training
    loading = training.batch_size, training.num_workers, training.precision
    return evaluate(detector, data, settings.evaluation, *loading, name, largest_side)


def _spread(data: Dataset, count: int) -> Subset:
    """At most `count` images, spread over the set."""
    step = max(1, -(-len(data) // count))
    return Subset(data, range(0, len(data), step))


def calibrations_of(settings: Settings, detector: Detector, normal: dict[str, Dataset], model: ModelData) -> dict:
    """What maps and scores of normal images look like: `calibration` of all; for one model of many, `calibrations` of each.

    `normal`: by category, of which at most 256 images in all are taken, but 16 of every category.
    """
    count = max(_LEAST_PER_CATEGORY, _CALIBRATION_IMAGES // len(normal))
    parts = [_spread(data, count) for data in normal.values()]
    evaluation = _evaluated(settings, detector, ConcatDataset(parts), f"{model.name} train", SCALE_SIDE)
    content = {"calibration": calibrate_scale(evaluation)}
    if not model.one_of_many:
        content["calibrations"], start = {}, 0
        for item, part in zip(normal, parts, strict=True):
            content["calibrations"][item] = calibrate_scale(evaluation.part(slice(start, start + len(part))))
            start += len(part)
    return content


def scale_of_unknown(settings: Settings, detector: Detector, data: Dataset) -> Calibration:
    """A scale for pictures alone, where no training image belongs to the maps: from test images, whatever their label.

    Median and 95 % of the pixels of at most 64 images, so that heat still means unusual.
    """
    evaluation = _evaluated(settings, detector, _spread(data, _UNKNOWN_IMAGES), "scale of pictures", SCALE_SIDE)
    return calibrate_scale(evaluation, _UNKNOWN_QUANTILE)


def report_category(
    settings: Settings,
    output: RunFolder,
    category: CategoryData,
    measurement: Measurement,
    detector: Detector,
    data: Dataset,
    calibration: Calibration,
) -> None:
    """Scores and pictures of a category; its row comes after them: what has a row is complete."""
    item, folder = category.item, output.item_folder(category.item)
    rows = zip(measurement.paths, measurement.labels.tolist(), measurement.scores.tolist(), strict=True)
    write_scores(folder / "scores.csv", ((path, item, label, score) for path, label, score in rows))
    if category.bad:
        write_bad_images(folder / "bad_images.csv", category.bad)
    if measurement.empty_masks:
        logger.warning("%s: %d defective images have a mask that marks nothing within the crop", item, measurement.empty_masks)
    if measurement.paths:
        worst, best = pick_worst_and_best(measurement.scores, measurement.labels)
        shown = Subset(data, sorted({pick.index for pick in worst + best}))
        sheet = _evaluated(settings, detector, shown, f"pictures of {item}")
        write_contact_sheet(folder / "maps" / "contact_sheet.jpg", sheet, calibration, settings.data)
    if settings.phase == "train":
        log = MetricsLog(output.path / "metrics.jsonl", item)
        log.append("evaluation", mean_gate=measurement.mean_gate, pixel_error=measurement.pixel_error, **measurement.metrics)
    logger.info("%s: %s", item, ", ".join(f"{name} {format_metric(value)}" for name, value in measurement.metrics.items()))
