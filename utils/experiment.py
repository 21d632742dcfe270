"""Train and evaluate: what a paper setting does with its data, from flags to results."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from binarize.cost import cost_table
from binarize.stages import calibrate, force_gates
from common.errors import NumericError, UserError
from models.build import build_encoder
from models.detector import Detector
from models.encoder import FrozenEncoder
from utils.categories import CategoryData, ModelData, all_items, list_data, log_data, models_of
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.detectors import Host, check_referenced_checkpoints, description, open_checkpoint, restore_detector, start_detector
from utils.devices import choose_device, seed_everything
from utils.distributed import is_main, on_main, only_on_main, world_size
from utils.evaluation import measure
from utils.logs import log_to_file
from utils.prepared_data import Places, PreparedData, plan_features, prepare, test_images
from utils.report import format_results, write_cost, write_run_report
from utils.result_files import MetricsLog, write_chosen_files
from utils.results import calibrations_of, report_category, scale_of_unknown
from utils.run_folder import RunFolder
from utils.settings import IDENTITY_KEYS, MEASURING_KEYS, PROTOCOL_KEYS, Settings, changed_protocol
from utils.tables import format_cost
from utils.training import TrainingOptions, first_global_batch, fit

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


def run_experiment(settings: Settings, host: Host) -> int:
    """Train (unless `--phase test`), evaluate and report what the settings say; returns the exit code.

    1 means that a category failed and the others are complete.
    """
    device = choose_device(settings.device)
    models = models_of(settings, list_data(settings))
    if settings.phase == "train":
        for model in models:
            settings.training_for(model.name, model.training_count)
    options = settings.model
    encoder = build_encoder(options.encoder, settings.data.crop_size, options.encoder_weights, options.position_embedding)
    experiment = Experiment(settings, host, RunFolder(settings.run_path), encoder, device, all_items(settings), models)
    if settings.phase == "train":
        output = _train(experiment)
    else:
        output = _zero_shot(experiment) if settings.test_checkpoint else _test(experiment)
    failed = {item: reason for item, reason in output.failures().items() if item in experiment.wanted}
    if is_main():
        print(format_results(output.rows()))
        for item, reason in failed.items():
            print(f"failed: {item}: {reason}")
        print(f"report: {output.path / 'report.html'}")
    return 1 if failed else 0


def _train(experiment: Experiment) -> RunFolder:
    """Train and evaluate every model that is not finished; returns the folder with the results."""
    settings, run = experiment.settings, experiment.run
    for model in experiment.models:
        check_referenced_checkpoints(settings, model, experiment.encoder, experiment.host)
    with only_on_main(run.lock()):
        if not on_main(lambda: _claim(experiment)):
            on_main(lambda: _check_untouched(experiment))
        on_main(lambda: run.forget_failures(experiment.wanted))
        with only_on_main(log_to_file(run.path / "log.txt")):
            _log_start(experiment)
            places = _plan(experiment)
            for model in experiment.models:
                if settings.resume and run.rows().keys() >= set(model.items):
                    path = model.folder(run.path) / "model.pth"
                    open_checkpoint(path, experiment.description(model), (settings.model.stage,), "--resume")
                    logger.info("%s: already finished, skipped (--resume)", model.name)
                    continue
                with _others_go_on(experiment, run, model.items, alone=len(experiment.models) == 1):
                    _train_model(experiment, model, places)
                on_main(lambda: write_run_report(run.path) if run.stored_config() else None)
    return run


def _claim(experiment: Experiment) -> bool:
    """Check that this command may write into its run folder; true if it holds another run, to be deleted first."""
    settings = experiment.settings
    keys = (*IDENTITY_KEYS, *PROTOCOL_KEYS, *(("item",) if settings.one_model else ()))
    return experiment.run.claim(settings.config, keys, experiment.encoder.weights_sha256, settings.overwrite)


@contextlib.contextmanager
def _others_go_on(experiment: Experiment, run: RunFolder, items: list[str], alone: bool) -> Iterator[None]:
    """With several categories the failure of one is noted and the others go on; several processes end together."""
    try:
        yield
    except (UserError, NumericError) as error:
        if alone or world_size() > 1:
            raise
        logger.error("%s: failed: %s", " ".join(items), error)
        run.add_failures(items, str(error))


def _plan(experiment: Experiment) -> Places:
    settings = experiment.settings
    detector = experiment.host.build(experiment.encoder, settings.model.prototype_count).to(experiment.device)
    return plan_features(settings, experiment.models, detector)


def _train_model(experiment: Experiment, model: ModelData, places: Places) -> None:
    """Train, save and evaluate one model; what an earlier run left is deleted only when all that can fail early is done."""
    settings, run = experiment.settings, experiment.run
    for category in model.categories:
        log_data(category)
    seed_everything(settings.training.seed)
    detector = start_detector(settings, model, experiment.encoder, experiment.host, experiment.device)
    finished = run.rows().keys() if settings.resume else set()
    data = prepare(settings, model, detector, places, finished)
    on_main(lambda: _open_folder(experiment, model, detector))

    folder, expected = model.folder(run.path), experiment.description(model)
    path = folder / "model.pth"
    if path.is_file() and not (folder / "last.pth").is_file():
        content = open_checkpoint(path, expected, (settings.model.stage,), "--resume")
        detector = experiment.restored(content, path)
        logger.info("%s: already trained, only evaluated (--resume)", model.name)
    else:
        _fit(experiment, model, detector, data)
        content = {
            **expected,
            **on_main(lambda: calibrations_of(settings, detector, data.normal, model)),
            "protocol": {key: settings.config[key] for key in PROTOCOL_KEYS},
        }
        on_main(lambda: save_checkpoint(path, {"model": detector.trained_state(), **content}))
    for category in model.categories:
        if category.item not in finished:
            with _others_go_on(experiment, run, [category.item], alone=len(experiment.wanted) == 1):
                _evaluate(experiment, run, category, detector, data.test[category.item], content)
    on_main(lambda: (folder / "last.pth").unlink(missing_ok=True))  # finished: model.pth and its rows are on disk


def _open_folder(experiment: Experiment, model: ModelData, detector: Detector) -> None:
    """Make the run folder ready for a training of this model: settings, environment, cost; nothing of an earlier one."""
    settings, run = experiment.settings, experiment.run
    if _claim(experiment):
        run.clear()
    if not settings.resume:
        run.forget(model.name, model.items, model.folder(run.path))
    run.write_yaml("config.yaml", settings.config)
    run.write_environment(experiment.encoder, experiment.device, settings.training.seed, experiment.wanted)
    if settings.data.shot is not None:
        chosen = [(category.item, name) for category in model.categories for name in category.chosen_files()]
        write_chosen_files(model.folder(run.path) / "chosen_files.csv", chosen)
        for item, name in chosen:
            logger.info("%s: trains on %s", item, name)
    _write_cost(run, detector, settings.data.crop_size)


def _write_cost(run: RunFolder, detector: Detector, crop_size: int) -> None:
    table = cost_table(detector, crop_size)
    logger.info("cost of one %dx%d image (counted, not measured)\n%s", crop_size, crop_size, format_cost(table))
    write_cost(run.path / "cost.json", table)


def _fit(experiment: Experiment, model: ModelData, detector: Detector, data: PreparedData) -> None:
    settings, run = experiment.settings, experiment.run
    options = settings.training_for(model.name, len(data.train))
    logger.info("%s: %s", model.name, _describe_training(options))
    calibrated = calibrate(detector, first_global_batch(data.train, options).to(detector.device))
    if calibrated:
        logger.info("%s: thresholds and scales of %d binary layers set from the first batch", model.name, calibrated)
    identity = {
        **experiment.description(model),
        "image_count": len(data.train),
        "total_iterations": options.total_iterations,
        "features": data.features,
    }
    log = MetricsLog(run.path / "metrics.jsonl", model.name)
    fit(detector, data.train, options, model.folder(run.path), identity, log, settings.resume)


def _describe_training(options: TrainingOptions) -> str:
    processes = f" in each of {world_size()} processes" if world_size() > 1 else ""
    return (
        f"{options.total_iterations} iterations of {options.batch_size} images{processes}, warm-up {options.warmup}, "
        f"precision {options.precision}"
    )


def _evaluate(
    experiment: Experiment, output: RunFolder, category: CategoryData, detector: Detector, data: Dataset, content: dict
) -> None:
    """Measure a category and write its scores, pictures and row."""
    settings, training = experiment.settings, experiment.settings.training
    measurement = measure(
        detector,
        data,
        settings.evaluation,
        training.batch_size,
        training.num_workers,
        training.precision,
        category.item,
        settings.metrics_memory,
        category.source.layout,
    )

    def write() -> None:
        foreign = settings.test_checkpoint or settings.evaluation.scoring != content["protocol"].get(
            "scoring", "reconstruction"
        )
        calibration = content.get("calibrations", {}).get(category.item, content["calibration"])
        if foreign:
            calibration = scale_of_unknown(settings, detector, data)
        report_category(settings, output, category, measurement, detector, data, calibration)
        output.add_row(category.item, measurement.metrics, experiment.items)

    on_main(write)


def _test(experiment: Experiment) -> RunFolder:
    """Evaluate the run's own models; anything measured otherwise than in training gets a folder of its own."""
    settings, run, stage = experiment.settings, experiment.run, experiment.settings.model.stage
    stored = run.stored_config()
    if stored is None:
        raise UserError(
            f"no run to test: {str(run.path)!r} does not exist; train it first, or correct --save_dir and --save_name"
        )
    paths = {model.name: model.folder(run.path) / "model.pth" for model in experiment.models}
    for model in experiment.models:
        content = open_checkpoint(paths[model.name], experiment.description(model), (stage,), f"--clb_stage {stage}")
        unknown = [item for item in model.items if item not in content.get("items", model.items)]
        if unknown:
            logger.warning("%s: not among the categories that %s was trained on", " ".join(unknown), paths[model.name])
    changed = changed_protocol(stored, settings)
    output = RunFolder(run.path / "_".join(["test", *changed])) if changed else run
    with only_on_main(run.lock()):
        if changed:
            measured = {key: settings.config[key] for key in MEASURING_KEYS}
            on_main(lambda: output.write_yaml("config.yaml", {**stored, **measured}))
        _test_models(experiment, output, paths, training_folder=run.path)
    return output


def _zero_shot(experiment: Experiment) -> RunFolder:
    """Evaluate a model of another training on these categories, in a run folder that names source and target."""
    settings, stage, path = experiment.settings, experiment.settings.model.stage, experiment.settings.test_checkpoint
    expected = experiment.description(experiment.models[0])
    content = open_checkpoint(path, expected, (stage,), f"--clb_stage {stage}", same_data=False)
    output = RunFolder(settings.zero_shot_path(content["config"]["dataset"]))
    with only_on_main(output.lock()):

        def open_folder() -> None:
            keys = ("test_checkpoint", "realiad_json", *PROTOCOL_KEYS)
            if output.claim(settings.config, keys, experiment.encoder.weights_sha256, settings.overwrite):
                output.clear()
            output.write_yaml("config.yaml", settings.config)
            output.write_environment(experiment.encoder, experiment.device, settings.training.seed, experiment.wanted)
            _write_cost(output, experiment.restored(content, path), settings.data.crop_size)

        on_main(open_folder)
        paths = {model.name: path for model in experiment.models}
        _test_models(experiment, output, paths, training_folder=output.path)
    return output


def _test_models(experiment: Experiment, output: RunFolder, paths: dict[str, Path], training_folder: Path) -> None:
    settings = experiment.settings
    with only_on_main(log_to_file(output.path / "log.txt")):
        _log_start(experiment)
        on_main(lambda: output.forget_failures(experiment.wanted))
        places = _plan(experiment)
        for model in experiment.models:
            content = load_checkpoint(paths[model.name])
            detector = experiment.restored(content, paths[model.name])
            force_gates(detector, settings.model.forced_gate)
            for category in model.categories:
                log_data(category)
                with _others_go_on(experiment, output, [category.item], alone=len(experiment.wanted) == 1):
                    data = test_images(settings, category, detector, places)
                    _evaluate(experiment, output, category, detector, data, content)
                on_main(lambda: write_run_report(output.path, training_folder=training_folder))


def _log_start(experiment: Experiment) -> None:
    settings, encoder = experiment.settings, experiment.encoder
    logger.info("run folder: %s, phase %s, device %s", experiment.run.path, settings.phase, experiment.device)
    logger.info("encoder: %s from %s (sha256 %s)", encoder.name, encoder.source, encoder.weights_sha256[:16])
    logger.info("evaluation: %s", settings.evaluation.describe())


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
