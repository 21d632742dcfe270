"""What a paper setting does with its data, from flags to results."""

from utils.categories import all_items, list_data, models_of
from utils.devices import choose_device
from utils.distributed import is_main
from utils.evaluation_phase import evaluation_phase, zero_shot_phase
from utils.experiment import Experiment
from utils.hosts import Host
from utils.report import format_results
from utils.run_folder import RunFolder
from utils.settings import Settings
from utils.train_phase import train_phase


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
    encoder = host.build_encoder(options.encoder, settings.data.crop_size, options.encoder_weights, options.position_embedding)
    experiment = Experiment(settings, host, RunFolder(settings.run_path), encoder, device, all_items(settings), models)
    if settings.phase == "train":
        output = train_phase(experiment)
    else:
        output = zero_shot_phase(experiment) if settings.test_checkpoint else evaluation_phase(experiment)
    failed = {item: reason for item, reason in output.failures().items() if item in experiment.wanted}
    if is_main():
        print(format_results(output.rows()))
        for item, reason in failed.items():
            print(f"failed: {item}: {reason}")
        print(f"report: {output.path / 'report.html'}")
    return 1 if failed else 0
