"""Train and evaluate: what a paper setting does with its data, from flags to results."""

import logging
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from binarize.cost import Cost, cost_table
from binarize.stages import calibrate, force_gates
from common.errors import UserError
from datasets.catalog import LAYOUTS, data_root
from datasets.records import ImageDataset, Record
from models.build import build_encoder
from models.detector import Detector
from models.encoder import FrozenEncoder
from utils.categories import CategoryData, list_data, log_data
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.detectors import (
    Host,
    check_referenced_checkpoints,
    description,
    open_checkpoint,
    restore_detector,
    start_detector,
)
from utils.devices import autocast, choose_device, seed_everything
from utils.evaluation import Evaluation, calibrate_scale, evaluate
from utils.feature_cache import FeatureDataset, cache_features
from utils.logs import log_to_file
from utils.metrics import named
from utils.pictures import write_contact_sheet
from utils.report import format_metric, format_results, write_cost, write_run_report
from utils.result_files import MetricsLog, write_bad_images, write_scores
from utils.run_folder import RunFolder
from utils.settings import IDENTITY_KEYS, MEASURING_KEYS, PROTOCOL_KEYS, Settings, changed_protocol
from utils.tables import format_cost
from utils.training import ShuffledBatches, fit

logger = logging.getLogger(__name__)

_CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Experiment:
    """What all categories of one command share."""

    settings: Settings
    host: Host
    run: RunFolder
    encoder: FrozenEncoder
    device: torch.device

    def description(self, item: str) -> dict:
        """What a checkpoint of this command says about its model."""
        return description(self.settings, item, self.encoder, self.host.name)


def run_per_category(settings: Settings, host: Host) -> int:
    """One model per category: train (unless `--phase test`), evaluate, report; returns the exit code."""
    device = choose_device(settings.device)
    categories = list_data(settings)
    if settings.phase == "train":
        for category in categories:
            settings.training_for(category.item, len(category.train))
    model = settings.model
    encoder = build_encoder(model.encoder, settings.data.crop_size, model.encoder_weights, model.position_embedding)
    experiment = Experiment(settings, host, RunFolder(settings.run_path), encoder, device)
    work = _train if settings.phase == "train" else _test
    output = work(experiment, categories)
    print(format_results(output.rows()))
    print(f"report: {output.path / 'report.html'}")
    return 0


def _train(experiment: Experiment, categories: list[CategoryData]) -> RunFolder:
    """Train and evaluate every category that is not finished; returns the folder with the results."""
    settings, run = experiment.settings, experiment.run
    for category in categories:
        check_referenced_checkpoints(settings, experiment.description(category.item))
    with run.lock():
        replaces_another = run.claim(
            settings.config, (*IDENTITY_KEYS, *PROTOCOL_KEYS), experiment.encoder.weights_sha256, settings.overwrite
        )
        if not replaces_another:
            _check_untouched(experiment, categories)
        with log_to_file(run.path / "log.txt"):
            _log_start(experiment)
            for category in categories:
                if settings.resume and category.item in run.rows():
                    path = run.item_folder(category.item) / "model.pth"
                    open_checkpoint(path, experiment.description(category.item), (settings.model.stage,), "--resume")
                    logger.info("%s: already finished, skipped (--resume)", category.item)
                    continue
                _train_category(experiment, category, replaces_another)
                replaces_another = False
                write_run_report(run.path)
    return run


def _train_category(experiment: Experiment, category: CategoryData, replaces_another: bool) -> None:
    """Train, save and evaluate one model; what an earlier run left is deleted only when all that can fail early is done."""
    settings, run, item = experiment.settings, experiment.run, category.item
    log_data(category)
    seed_everything(settings.training.seed)
    expected = experiment.description(item)
    detector = start_detector(settings, expected, experiment.encoder, experiment.host, experiment.device)
    train_data = _prepared(settings, category.train, detector, f"{item} train")
    test_data = _prepared(settings, category.test, detector, f"{item} test")

    if replaces_another:
        run.clear()
    if not settings.resume:
        run.forget_item(item)
    run.write_yaml("config.yaml", settings.config)
    run.write_environment(experiment.encoder, experiment.device, settings.training.seed)
    write_cost(run.path / "cost.json", log_cost(detector, settings.data.crop_size))
    model, log = run.item_folder(item) / "model.pth", MetricsLog(run.path / "metrics.jsonl", item)
    if model.is_file() and not (run.item_folder(item) / "last.pth").is_file():
        content = open_checkpoint(model, expected, (settings.model.stage,), "--resume")
        detector = restore_detector(content, model, experiment.encoder, experiment.host).to(experiment.device)
        logger.info("%s: already trained, only evaluated (--resume)", item)
    else:
        _fit(settings, run, detector, train_data, expected, log)
        content = {
            "model": detector.trained_state(),
            **expected,
            "calibration": _calibrated_scale(settings, detector, train_data, item),
            "protocol": {key: settings.config[key] for key in PROTOCOL_KEYS},
        }
        save_checkpoint(model, content)
    evaluation = _evaluate(settings, detector, test_data, item)
    metrics = named(evaluation.metrics(settings.evaluation.pro_mode))
    log.append("evaluation", mean_gate=evaluation.mean_gate, **metrics)
    _report_category(settings, run, category, evaluation, metrics, content["calibration"])
    (run.item_folder(item) / "last.pth").unlink(missing_ok=True)  # finished: model.pth and its row are on disk


def _test(experiment: Experiment, categories: list[CategoryData]) -> RunFolder:
    """Evaluate `model.pth` of every category; anything measured otherwise than in training gets a folder of its own."""
    settings, run, stage = experiment.settings, experiment.run, experiment.settings.model.stage
    stored = run.stored_config()
    if stored is None:
        raise UserError(
            f"no run to test: {str(run.path)!r} does not exist; train it first, or correct --save_dir and --save_name"
        )
    models = {category.item: run.item_folder(category.item) / "model.pth" for category in categories}
    for item, path in models.items():
        open_checkpoint(path, experiment.description(item), (stage,), f"--clb_stage {stage}")
    changed = changed_protocol(stored, settings)
    output = RunFolder(run.path / "_".join(["test", *changed])) if changed else run
    with run.lock():
        if changed:
            output.write_yaml("config.yaml", {**stored, **{key: settings.config[key] for key in MEASURING_KEYS}})
        with log_to_file(output.path / "log.txt"):
            _log_start(experiment)
            for category in categories:
                log_data(category)
                path = models[category.item]
                content = load_checkpoint(path)
                detector = restore_detector(content, path, experiment.encoder, experiment.host).to(experiment.device)
                force_gates(detector, settings.model.forced_gate)
                data = _prepared(settings, category.test, detector, f"{category.item} test")
                evaluation = _evaluate(settings, detector, data, category.item)
                metrics = named(evaluation.metrics(settings.evaluation.pro_mode))
                _report_category(settings, output, category, evaluation, metrics, content["calibration"])
                write_run_report(output.path, training_folder=run.path)
    return output


def _log_start(experiment: Experiment) -> None:
    settings, encoder = experiment.settings, experiment.encoder
    logger.info("run folder: %s, phase %s, device %s", experiment.run.path, settings.phase, experiment.device)
    logger.info("encoder: %s from %s (sha256 %s)", encoder.name, encoder.source, encoder.weights_sha256[:16])
    logger.info("evaluation: %s", settings.evaluation.describe())


def _check_untouched(experiment: Experiment, categories: list[CategoryData]) -> None:
    """Without --resume or --overwrite nothing that an earlier run trained is touched."""
    settings, run = experiment.settings, experiment.run
    if settings.resume or settings.overwrite:
        return
    trained = [
        category.item
        for category in categories
        if any((run.item_folder(category.item) / name).exists() for name in ("model.pth", "last.pth"))
    ]
    if trained:
        raise UserError(
            f"{str(run.path)!r} already holds training of {' '.join(trained)}; give --resume to go on (finished categories "
            "are skipped) or --overwrite to train them anew"
        )


def log_cost(detector: Detector, crop_size: int) -> dict[str, Cost]:
    """Count the detector's cost and show it."""
    table = cost_table(detector, crop_size)
    logger.info("cost of one %dx%d image (counted, not measured)\n%s", crop_size, crop_size, format_cost(table))
    return table


def _prepared(settings: Settings, records: list[Record], detector: Detector, name: str) -> Dataset:
    """The images of some records, with their features cached if the settings and the machine allow it."""
    data = settings.data
    images = ImageDataset(records, data.input_size, data.crop_size, data.max_pixels)
    identity = {
        "encoder_sha256": detector.encoder.weights_sha256,
        "taps": detector.encoder.taps,
        "pos_embed": settings.model.position_embedding,
        "precision": settings.training.precision,
    }

    @torch.no_grad()
    def encode(batch: Tensor) -> Tensor:
        with autocast(detector.device, settings.training.precision):
            return detector.encode(batch.to(detector.device)).cpu()

    return cache_features(
        images,
        encode,
        identity,
        settings.cache_features,
        settings.save_dir / "feature_cache",
        settings.training.batch_size,
        settings.training.num_workers,
        name,
    )


def _fit(settings: Settings, run: RunFolder, detector: Detector, data: Dataset, expected: dict, log: MetricsLog) -> None:
    item = expected["item"]
    options = settings.training_for(item, len(data))
    logger.info(
        "%s: %d iterations of %d images, warm-up %d, precision %s",
        item,
        options.total_iterations,
        options.batch_size,
        options.warmup,
        options.precision,
    )
    indices = next(iter(ShuffledBatches(len(data), options.batch_size, options.seed, 0, 1)))
    first_batch = default_collate([data[index]["image"] for index in indices]).to(detector.device)
    calibrated = calibrate(detector, first_batch)
    if calibrated:
        logger.info("%s: thresholds and scales of %d binary layers set from the first batch", item, calibrated)
    features = "float16" if isinstance(data, FeatureDataset) else "not cached"
    identity = {**expected, "image_count": len(data), "total_iterations": options.total_iterations, "features": features}
    fit(detector, data, options, run.item_folder(item), identity, log, settings.resume)


def _evaluate(settings: Settings, detector: Detector, data: Dataset, name: str) -> Evaluation:
    training = settings.training
    return evaluate(detector, data, settings.evaluation, training.batch_size, training.num_workers, training.precision, name)


def _calibrated_scale(settings: Settings, detector: Detector, data: Dataset, item: str) -> dict[str, float | list[float]]:
    """What maps of normal images look like, from at most 256 training images spread over the set."""
    step = -(-len(data) // _CALIBRATION_IMAGES)
    return calibrate_scale(_evaluate(settings, detector, Subset(data, range(0, len(data), step)), f"{item} train"))


def _report_category(
    settings: Settings,
    output: RunFolder,
    category: CategoryData,
    evaluation: Evaluation,
    metrics: dict[str, float | None],
    calibration: dict[str, float],
) -> None:
    """Scores and pictures of a category, then its row: what has a row is complete."""
    item, folder = category.item, output.item_folder(category.item)
    rows = zip(evaluation.paths, evaluation.labels.tolist(), evaluation.scores.tolist(), strict=True)
    write_scores(folder / "scores.csv", ((path, item, label, score) for path, label, score in rows))
    if category.bad:
        write_bad_images(folder / "bad_images.csv", category.bad)
    empty = (evaluation.labels == 1) & evaluation.has_pixel_truth & ~evaluation.masks.any(axis=(1, 2))
    if empty.any():
        logger.warning("%s: %d defective images have a mask that marks nothing within the crop", item, empty.sum())
    if evaluation.paths:
        write_contact_sheet(folder / "maps" / "contact_sheet.jpg", evaluation, calibration, settings.data)
    root = data_root(settings.data.dataset, settings.data.path)
    output.add_row(item, metrics, LAYOUTS[settings.data.dataset].categories(root))
    logger.info("%s: %s", item, ", ".join(f"{name} {format_metric(value)}" for name, value in metrics.items()))
    if evaluation.mean_gate is not None:
        logger.info("%s: %.1f %% of the attention maps is binary (mean gate of SAB)", item, 100 * evaluation.mean_gate)
