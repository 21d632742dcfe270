"""The test phase: evaluate models that exist, the run's own or one of another training."""

import argparse
import logging
from pathlib import Path

from binarize.stages import force_gates
from common.errors import UserError
from utils.categories import log_data
from utils.checkpoint import load_checkpoint
from utils.converters import dataset_names
from utils.detectors import CALIBRATION, open_checkpoint
from utils.distributed import on_main, only_on_main
from utils.experiment import Experiment, count_cost, evaluate_category, log_start, others_go_on, plan
from utils.logs import log_to_file
from utils.prepared_data import test_images
from utils.report import write_run_report
from utils.run_folder import RunFolder, name_of_a_test
from utils.settings import MEASURING_KEYS, changed_protocol

logger = logging.getLogger(__name__)


def evaluation_phase(experiment: Experiment) -> RunFolder:
    """Evaluate the run's own models; anything measured otherwise than in training gets a folder of its own."""
    settings, run, stage = experiment.settings, experiment.run, experiment.settings.model.stage
    stored = run.stored_config()
    if stored is None:
        raise UserError(
            f"no run to test: {str(run.path)!r} does not exist; train it first, or correct --save_dir and --save_name"
        )
    paths = {model.name: model.folder(run.path) / "model.pth" for model in experiment.models}
    for model in experiment.models:
        content = open_checkpoint(paths[model.name], experiment.description(model), (stage,), experiment.host.stage_flag(stage))
        unknown = [item for item in model.items if item not in content.get("items", model.items)]
        if unknown:
            logger.warning("%s: not among the categories that %s was trained on", " ".join(unknown), paths[model.name])
    changed = changed_protocol(stored, settings)
    output = RunFolder(run.path / name_of_a_test(changed)) if changed else run
    with only_on_main(run.lock()):
        if changed:
            measured = {key: settings.config[key] for key in MEASURING_KEYS}
            on_main(lambda: output.write_yaml("config.yaml", {**stored, **measured}))
        _test_models(experiment, output, paths, training_folder=run.path)
    return output


def zero_shot_phase(experiment: Experiment) -> RunFolder:
    """Evaluate a model of another training on these categories, in a run folder that names source and target."""
    settings, stage, path = experiment.settings, experiment.settings.model.stage, experiment.settings.test_checkpoint
    expected = experiment.description(experiment.models[0])
    content = open_checkpoint(path, expected, (stage,), experiment.host.stage_flag(stage), same_data=False)
    output = RunFolder(settings.zero_shot_path(_trained_on(content, path)))
    with only_on_main(output.lock()):

        def open_folder() -> None:
            facts = {"encoder_sha256": experiment.encoder.weights_sha256, "model_sha256": content["model_sha256"]}
            if output.claim(settings.config, MEASURING_KEYS, facts, settings.overwrite):
                output.clear()
            output.write_yaml("config.yaml", settings.config)
            output.write_environment(
                experiment.encoder.source, experiment.device, settings.training.seed, experiment.wanted, facts
            )
            count_cost(output, experiment.restored(content, path), settings.data.crop_size)

        on_main(open_folder)
        paths = {model.name: path for model in experiment.models}
        _test_models(experiment, output, paths, training_folder=output.path)
    return output


def _trained_on(content: dict, path: Path) -> str:
    """The data set of a checkpoint, which becomes a part of a folder's name."""
    try:
        return dataset_names(str(content["config"].get("dataset")))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"checkpoint unusable: {str(path)!r} was trained on another data set than there is: {error}") from error


def _test_models(experiment: Experiment, output: RunFolder, paths: dict[str, Path], training_folder: Path) -> None:
    settings = experiment.settings
    with only_on_main(log_to_file(output.path / "log.txt")):
        log_start(experiment)
        on_main(lambda: output.forget_failures(experiment.wanted))
        places = plan(experiment)
        for model in experiment.models:
            content = load_checkpoint(paths[model.name], {} if settings.test_checkpoint else CALIBRATION)
            detector = experiment.restored(content, paths[model.name])
            force_gates(detector, settings.model.forced_gate)
            for category in model.categories:
                log_data(category)
                with others_go_on(output, [category.item], alone=len(experiment.wanted) == 1):
                    data = test_images(settings, category, detector, places)
                    evaluate_category(experiment, output, category, detector, data, content)
                on_main(lambda: write_run_report(output.path, training_folder=training_folder))
