"""What a command was asked to do: its flags checked against each other and sorted into small dataclasses."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from datasets.catalog import ListingOptions
from datasets.transforms import Interpolation
from models.build import check_sizes
from utils.arguments import listing_options
from utils.hosts import HOSTS
from utils.optim import warmup_length
from utils.protocol import LEAST_METRIC_SIZE, EvaluationOptions
from utils.run_folder import check_plain_name, resolved_paths, run_folder_name
from utils.stored_config import EARLIER_DEFAULTS
from utils.training import TrainingOptions, iterations_per_epoch

# what a command does with a run, not what the run is
_NOT_STORED = ("config", "quiet", "debug", "phase", "resume", "overwrite", "force_gate")
_SETTING_NAMES = {"single": "Single-Class", "multi": "Multi-Class", "few": "Few-Shot"}
_LOG_EVERY = 10
# A run folder and its checkpoints belong to one choice of these.
IDENTITY_KEYS = (
    "host", "setting", "dataset", "realiad_json", "shot", "per_category",
    "encoder", "pos_embed", "input_size", "crop_size", "interpolation", "holdout",
    "clb_stage", "load_checkpoint", "act_bits", "sab", "weight_gradient", "activation_gradient",
    "distill", "distill_teacher", "total_epochs", "total_iters", "batch_size",
    "learning_rate", "final_learning_rate", "schedule", "warmup_iters", "weight_decay",
    "optimizer", "adam_beta1", "adam_eps", "gradient_clip", "precision", "seed",
    "skip_bad_images", *(flag for host in HOSTS.values() for flag in (*host.network_flags, *host.training_flags)),
)  # fmt: skip
PROTOCOL_KEYS = (
    "mask_threshold",
    "smoothing_kernel",
    "smoothing_sigma",
    "metric_size",
    "smoothing_border",
    "max_ratio",
    "pro_mode",
    "true_false",
    "scoring",
    "allow_missing_masks",
)

# what a test may measure otherwise than the training did
MEASURING_KEYS = (*PROTOCOL_KEYS, "precision", "skip_bad_images", "realiad_json", "data_path")


@dataclass(frozen=True)
class DataOptions:
    """Which images: one path for each data set of `dataset` ("A+B"), `items` the wanted categories or None for all.

    `shot`: training images per category, None for all of them; `holdout`: share of them that is not trained on.
    """

    dataset: str
    paths: list[str] | None
    items: list[str] | None
    listing: ListingOptions
    shot: int | None
    input_size: int
    crop_size: int
    max_pixels: int
    skip_bad_images: bool
    cache_images: str
    interpolation: Interpolation = "bilinear"
    holdout: float = 0.0


@dataclass(frozen=True)
class ModelOptions:
    """Which network, and how far it is binary."""

    encoder: str
    encoder_weights: str | None
    position_embedding: str
    stage: int
    load_checkpoint: str | None
    distillation_weight: float
    distillation_teacher: str | None
    forced_gate: float | None


@dataclass(frozen=True)
class Settings:
    """One command, checked. `config` holds all flags by name, as `config.yaml` stores them."""

    config: dict
    data: DataOptions
    model: ModelOptions
    training: TrainingOptions
    evaluation: EvaluationOptions
    phase: str
    one_model: bool
    test_checkpoint: Path | None
    save_dir: Path
    resume: bool
    overwrite: bool
    device: str
    cache_features: str
    metrics_memory: float | None

    @property
    def identity(self) -> dict:
        """The part of the configuration that a trained model depends on."""
        return {key: self.config[key] for key in IDENTITY_KEYS if key in self.config}

    @property
    def run_path(self) -> Path:
        """Folder of this run."""
        return self.run_path_of(self.config["save_name"])

    def run_path_of(self, save_name: str) -> Path:
        """Folder of another run of the same setting, data, encoder and sizes."""
        dataset, shot = self.data.dataset, self.data.shot
        name = save_name if shot is None else f"{save_name}-{shot}"
        return self.save_dir / self._run_folder_name(name, None if "+" in dataset else dataset)

    def zero_shot_path(self, source: str) -> Path:
        """Folder for the test of a model that was trained on the data set `source`."""
        name = self._run_folder_name(self.config["save_name"], None)
        gate = "" if self.model.forced_gate is None else f"_gate={self.model.forced_gate:g}"
        return self.save_dir / f"{name}_Source={source}_Target={self.data.dataset}{gate}"

    def _run_folder_name(self, save_name: str, dataset: str | None) -> str:
        data, model = self.data, self.model
        flags = {name: self.config[name] for name in HOSTS[self.config["host"]].folder_flags}
        return run_folder_name(save_name, dataset, model.encoder, data.input_size, data.crop_size, flags)

    def training_for(self, item: str, image_count: int) -> TrainingOptions:
        """Training options with the iterations of this category's image count filled in."""
        epochs, iterations = self.config["total_epochs"], self.config["total_iters"]
        if not image_count:
            raise UserError(f"{item} has no usable training image left; run `python -m scripts.check_dataset` to see why")
        per_epoch = iterations_per_epoch(image_count, self.training.batch_size, item)
        total = epochs * per_epoch if iterations is None else iterations
        warmup = warmup_length(total) if self.config["warmup_iters"] is None else self.config["warmup_iters"]
        return replace(self.training, total_iterations=total, warmup=warmup)


def changed_protocol(stored: dict, settings: Settings) -> list[str]:
    """`key=value` of everything that this test measures otherwise than the run's training, fit for a folder name."""
    changed = []
    for key in MEASURING_KEYS:
        value = settings.config[key]
        if key == "data_path":
            here, there = resolved_paths(value), resolved_paths(stored.get(key))
            if here and there and here != there:
                changed.append(f"{key}={'+'.join(path.name for path in here)}")
        elif stored.get(key, EARLIER_DEFAULTS.get(key)) != value:
            changed.append(f"{key}={value}")
    if settings.model.forced_gate is not None:
        changed.append(f"gate={settings.model.forced_gate:g}")
    return changed


def settings_of(arguments: argparse.Namespace) -> Settings:
    """Check flags against each other and sort them into dataclasses; raises UserError for a combination that cannot work."""
    arguments = _completed(arguments)
    config = {key: value for key, value in vars(arguments).items() if key not in _NOT_STORED}
    config["save_name"] = check_plain_name(arguments.save_name or default_save_name(arguments), "--save_name")
    check_sizes(arguments.encoder, arguments.input_size, arguments.crop_size)
    _check_combinations(arguments)
    return Settings(
        config=config,
        data=_data_options(arguments),
        model=_model_options(arguments),
        training=_training_options(arguments),
        evaluation=EvaluationOptions.from_config(config),
        phase=arguments.phase,
        one_model=arguments.setting == "multi" or (arguments.setting == "few" and not arguments.per_category),
        test_checkpoint=Path(arguments.test_checkpoint) if arguments.test_checkpoint else None,
        save_dir=Path(arguments.save_dir),
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        device=arguments.device,
        cache_features=arguments.cache_features,
        metrics_memory=arguments.metrics_memory,
    )


def _completed(arguments: argparse.Namespace) -> argparse.Namespace:
    """The command with the flags that it leaves open as its host has them for this setting and data set."""
    chosen = HOSTS[arguments.host].choose_defaults(arguments)
    open_flags = {name: value for name, value in chosen.items() if getattr(arguments, name) is None}
    return argparse.Namespace(**{**vars(arguments), **open_flags})


def _data_options(arguments: argparse.Namespace) -> DataOptions:
    return DataOptions(
        dataset=arguments.dataset,
        paths=arguments.data_path,
        items=arguments.item,
        listing=listing_options(arguments),
        shot=arguments.shot if arguments.setting == "few" else None,
        holdout=arguments.holdout,
        input_size=arguments.input_size,
        crop_size=arguments.crop_size,
        max_pixels=arguments.max_pixels,
        skip_bad_images=arguments.skip_bad_images,
        cache_images=arguments.cache_images,
        interpolation=arguments.interpolation,
    )


def _model_options(arguments: argparse.Namespace) -> ModelOptions:
    return ModelOptions(
        encoder=arguments.encoder,
        encoder_weights=arguments.encoder_weights,
        position_embedding=arguments.pos_embed,
        stage=arguments.clb_stage,
        load_checkpoint=arguments.load_checkpoint,
        distillation_weight=arguments.distill,
        distillation_teacher=arguments.distill_teacher,
        forced_gate=arguments.force_gate,
    )


def _training_options(arguments: argparse.Namespace) -> TrainingOptions:
    return TrainingOptions(
        total_iterations=0,  # filled in by `training_for`
        batch_size=arguments.batch_size,
        warmup=0,
        peak_rate=arguments.learning_rate,
        final_rate=arguments.final_learning_rate,
        weight_decay=arguments.weight_decay,
        adam_eps=arguments.adam_eps,
        gradient_clip=arguments.gradient_clip,
        seed=arguments.seed,
        precision=arguments.precision,
        num_workers=arguments.num_workers,
        save_every=arguments.save_every,
        log_every=_LOG_EVERY,
        optimizer=arguments.optimizer,
        adam_beta1=arguments.adam_beta1,
        schedule=arguments.schedule,
    )


def default_save_name(arguments: argparse.Namespace) -> str:
    """The host's name, the setting's, and the stage's suffix, so that nothing overwrites another."""
    name = _SETTING_NAMES[arguments.setting]
    if arguments.test_checkpoint:
        name = "Zero-Shot" if arguments.scoring == "prototype" else "Transfer"
    elif arguments.setting == "few" and arguments.per_category:
        name += "-Per-Category"
    elif arguments.setting == "multi" and "+" in arguments.dataset:
        name = f"Super-{name}"
    return f"{arguments.host}-{name}{HOSTS[arguments.host].stage_suffixes[arguments.clb_stage]}"


def _check_combinations(arguments: argparse.Namespace) -> None:
    HOSTS[arguments.host].check(arguments)
    stage, training = arguments.clb_stage, arguments.phase == "train"
    if arguments.smoothing_kernel and arguments.smoothing_kernel % 2 == 0:
        raise UserError(
            f"--smoothing_kernel {arguments.smoothing_kernel} is even; use {arguments.smoothing_kernel + 1}, or 0 for none"
        )
    if 0 < arguments.metric_size < LEAST_METRIC_SIZE:
        raise UserError(f"--metric_size {arguments.metric_size} is less than {LEAST_METRIC_SIZE} and not 0 (the crop's size)")
    if arguments.total_iters == 0 and HOSTS[arguments.host].binarizes and training:
        raise UserError("--total_iters 0 trains nothing; give at least 1")
    if arguments.setting != "few" and (getattr(arguments, "shot", None) or getattr(arguments, "per_category", False)):
        raise UserError("--shot and --per_category are for few images; give --setting few with them, or leave them out")
    if arguments.setting == "few" and arguments.holdout:
        raise UserError("--holdout keeps images from the training and few-shot has none to spare; leave it out")
    if arguments.resume and arguments.overwrite:
        raise UserError("--resume continues a run and --overwrite deletes it; give one of them")
    if arguments.force_gate is not None and (training or stage == 0 or arguments.sab == "off"):
        raise UserError("--force_gate is for --phase test of a model with gates (stage 1 or 2, --sab mixed or binary)")
    if arguments.test_checkpoint and training:
        raise UserError("--test_checkpoint evaluates a trained model; give --phase test with it")
    if arguments.scoring != "reconstruction" and training:
        raise UserError(f"--scoring {arguments.scoring} scores a trained model otherwise; give --phase test with it")
    if arguments.distill_teacher and not arguments.distill and training:
        raise UserError("--distill_teacher does nothing without --distill WEIGHT; give both")
    if stage == 0 and arguments.load_checkpoint and training:
        raise UserError("--clb_stage 0 trains the float network from scratch and takes no --load_checkpoint; leave it out")
    if stage == 2 and not arguments.load_checkpoint and training:
        raise UserError(
            "--clb_stage 2 starts from a stage-1 model: give --load_checkpoint NAME (its save_name, by default "
            f"{default_save_name(argparse.Namespace(**{**vars(arguments), 'clb_stage': 1}))}) or a model.pth"
        )
    if arguments.distill and training and not (arguments.distill_teacher or (stage == 1 and arguments.load_checkpoint)):
        raise UserError("--distill needs a float model: give --distill_teacher NAME (its save_name) or a model.pth of stage 0")
