"""The training phase: train, save and evaluate every model of a command that is not finished."""

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from binarize.stages import calibrate
from common.errors import UserError
from models.detector import Detector
from utils.categories import ModelData, log_data
from utils.checkpoint import save_checkpoint, write_text
from utils.detectors import check_referenced_checkpoints, open_checkpoint, start_detector
from utils.devices import autocast, seed_everything
from utils.distributed import on_main, only_on_main, world_size
from utils.experiment import Experiment, count_cost, evaluate_category, log_start, others_go_on, plan
from utils.loading import loaded_batches
from utils.logs import log_to_file
from utils.prepared_data import Places, PreparedData, prepare
from utils.report import write_run_report
from utils.result_files import MetricsLog, write_chosen_files
from utils.results import calibrations_of
from utils.run_folder import RunFolder
from utils.settings import IDENTITY_KEYS, PROTOCOL_KEYS, Settings
from utils.training import TrainingOptions, first_global_batch, fit

logger = logging.getLogger(__name__)


def train_phase(experiment: Experiment) -> RunFolder:
    """Train and evaluate every model that is not finished; returns the folder with the results."""
    settings, run = experiment.settings, experiment.run
    _check_starts(experiment)
    with only_on_main(run.lock()):
        if not on_main(lambda: _claim(experiment)):
            on_main(lambda: _check_untouched(experiment))
        on_main(lambda: run.forget_failures(experiment.wanted))
        with only_on_main(log_to_file(run.path / "log.txt")):
            log_start(experiment)
            places = plan(experiment)
            for model in experiment.models:
                if settings.resume and run.rows().keys() >= set(model.items):
                    path = model.folder(run.path) / "model.pth"
                    open_checkpoint(path, experiment.description(model), (settings.model.stage,), "--resume")
                    logger.info("%s: already finished, skipped (--resume)", model.name)
                    continue
                with others_go_on(run, model.items, alone=len(experiment.models) == 1):
                    _train_model(experiment, model, places)
                on_main(lambda: write_run_report(run.path) if run.stored_config() else None)
    return run


def _check_starts(experiment: Experiment) -> None:
    """Look at the checkpoints that the trainings start from; one of several that is wrong fails when it is its turn."""
    errors = []
    for model in experiment.models:
        try:
            check_referenced_checkpoints(experiment.settings, model, experiment.encoder, experiment.host)
        except UserError as error:
            errors.append(error)
    if errors and (len(errors) == len(experiment.models) or world_size() > 1):
        raise errors[0]


def _claim(experiment: Experiment) -> bool:
    """Check that this command may write into its run folder; true if it holds another run, to be deleted first."""
    settings = experiment.settings
    keys = [*IDENTITY_KEYS, *PROTOCOL_KEYS]
    keys += ["item"] if settings.one_model else []
    keys += ["data_path"] if "Folder" in settings.data.dataset.split("+") else []  # the others' names say which data it is
    return experiment.run.claim(settings.config, keys, _facts(experiment), settings.overwrite)


def _facts(experiment: Experiment) -> dict:
    """What a run depends on besides its configuration: the batches of all processes together make one step."""
    further = experiment.host.training_facts(experiment.settings.config)
    return {"encoder_sha256": experiment.encoder.weights_sha256, "processes": world_size(), **further}


def _check_untouched(experiment: Experiment) -> None:
    """Without --resume or --overwrite nothing that an earlier run trained is touched."""
    settings, run = experiment.settings, experiment.run
    if settings.resume or settings.overwrite:
        return
    trained = [
        model.name
        for model in experiment.models
        if any((model.folder(run.path) / name).exists() for name in ("model.pth", "last.pth"))
    ]
    if trained:
        raise UserError(
            f"{str(run.path)!r} already holds training of {' '.join(trained)}; give --resume to go on (finished categories "
            "are skipped) or --overwrite to train them anew"
        )


def _train_model(experiment: Experiment, model: ModelData, places: Places) -> None:
    """Train, save and evaluate one model; what an earlier run left is deleted only when all that can fail early is done."""
    settings, run = experiment.settings, experiment.run
    for category in model.categories:
        log_data(category)
    seed_everything(settings.training.seed)
    detector = start_detector(settings, model, experiment.encoder, experiment.host, experiment.device)
    finished = run.rows().keys() if settings.resume else set()
    data = prepare(settings, model, detector, places, finished)
    options = settings.training_for(model.name, len(data.train))
    on_main(lambda: _open_folder(experiment, model, detector))

    folder, expected = model.folder(run.path), experiment.description(model)
    path = folder / "model.pth"
    if path.is_file() and not (folder / "last.pth").is_file():
        content = open_checkpoint(path, expected, (settings.model.stage,), "--resume")
        detector = experiment.restored(content, path)
        on_main(lambda: count_cost(run, detector, settings.data.crop_size))  # a quantized one is counted as it is now
        logger.info("%s: already trained, only evaluated (--resume)", model.name)
    else:
        record = {}
        if not (settings.resume and (folder / "last.pth").is_file()):  # which holds what was learned before
            record = _learn_before(experiment, detector, data)
        _fit(experiment, model, detector, data.train, options, data.features)
        with autocast(detector.device, settings.training.precision):
            detector.eval().calibrate(_inputs_of(settings, detector, ConcatDataset(data.normal.values())))
        content = {
            **expected,
            **record,
            **on_main(lambda: calibrations_of(settings, detector, data.normal, model)),
            "protocol": {key: settings.config[key] for key in PROTOCOL_KEYS},
        }
        on_main(lambda: _save(path, {"model": detector.trained_state(), **content}, record))
    for category in model.categories:
        if category.item not in finished:
            with others_go_on(run, [category.item], alone=len(experiment.wanted) == 1):
                evaluate_category(experiment, run, category, detector, data.test[category.item], content)
    on_main(lambda: (folder / "last.pth").unlink(missing_ok=True))  # finished: model.pth and its rows are on disk


def _open_folder(experiment: Experiment, model: ModelData, detector: Detector) -> None:
    """Make the run folder ready for a training of this model: settings, environment, cost; nothing of an earlier one."""
    settings, run = experiment.settings, experiment.run
    if _claim(experiment):
        run.clear()
    if not settings.resume:
        run.forget(model.name, model.items, model.folder(run.path))
    run.write_yaml("config.yaml", settings.config)
    run.write_environment(
        experiment.encoder.source, experiment.device, settings.training.seed, experiment.wanted, _facts(experiment)
    )
    if settings.data.shot is not None:
        chosen = [(category.item, name) for category in model.categories for name in category.chosen_files()]
        write_chosen_files(model.folder(run.path) / "chosen_files.csv", chosen)
        for item, name in chosen:
            logger.info("%s: trains on %r", item, name)
    count_cost(run, detector, settings.data.crop_size)


def _learn_before(experiment: Experiment, detector: Detector, data: PreparedData) -> dict:
    """What the host learns from images before the training; returns what it records of that."""
    settings = experiment.settings
    images = [_in_random_order(part, settings.training.seed) for part in (data.train, ConcatDataset(data.normal.values()))]
    passes = [partial(_inputs_of, settings, detector, part) for part in images]
    with autocast(detector.device, settings.training.precision):
        record = experiment.host.prepare(detector, settings.config, *passes)
    if record:  # the network has another form now
        on_main(lambda: count_cost(experiment.run, detector, settings.data.crop_size))
    return record


def _in_random_order(images: Dataset, seed: int) -> Dataset:
    """So that the first of them, which is all that a host may look at, come from every category."""
    return Subset(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist())


def _save(path: Path, content: dict, record: dict) -> None:
    """A finished model, after the record of each thing learned before its training as a file that people can read."""
    for name, facts in record.items():
        write_text(path.with_name(f"{name}.json"), json.dumps(facts, indent=1) + "\n")
    save_checkpoint(path, content)


def _fit(
    experiment: Experiment, model: ModelData, detector: Detector, images: Dataset, options: TrainingOptions, features: str
) -> None:
    settings, run = experiment.settings, experiment.run
    logger.info("%s: %s", model.name, _describe_training(options))
    calibrated = calibrate(detector, first_global_batch(images, options).to(detector.device))
    if calibrated:
        logger.info("%s: thresholds and scales of %d binary layers set from the first batch", model.name, calibrated)
    identity = {
        **experiment.description(model),
        "image_count": len(images),
        "total_iterations": options.total_iterations,
        "features": features,
    }
    log = MetricsLog(run.path / "metrics.jsonl", model.name)
    fit(detector, images, options, model.folder(run.path), identity, log, settings.resume)


def _inputs_of(settings: Settings, detector: Detector, images: Dataset) -> Iterator[Tensor]:
    """Batches on the device, loaded when they are asked for."""
    training = settings.training
    with loaded_batches(images, training.num_workers, batch_size=training.batch_size) as batches:
        for batch in batches:
            yield batch["image"].to(detector.device)


def _describe_training(options: TrainingOptions) -> str:
    if not options.total_iterations:
        return "nothing is trained in this stage"
    processes = f" in each of {world_size()} processes" if world_size() > 1 else ""
    return (
        f"{options.total_iterations} iterations of {options.batch_size} images{processes}, warm-up {options.warmup}, "
        f"precision {options.precision}"
    )
