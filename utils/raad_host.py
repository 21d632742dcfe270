"""RAAD as a host: its numbers, its stages, and how a detector is brought into the form of each."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.build import PDN_ENCODERS
from models.efficientad import EfficientAD, EfficientADOptions, EfficientADTraining
from models.patch_description import FrozenTeacher
from models.teacher import build_teacher
from quantize.blocks import STRIDE, WINDOW
from quantize.layers import QuantizationOptions, dequantize_network
from quantize.reconstruction import ReconstructionOptions
from utils.host import Config, Host, Passes, fields_of
from utils.penalty import PenaltyImages, names_sha256
from utils.raad_arguments import (
    BASELINE,
    BASELINE_ITERATIONS,
    FINETUNE,
    QUANTIZATION_FLAGS,
    QUANTIZE,
    STAGES,
    add_raad_flags,
    allocation_options,
    check_raad,
    choose_raad_defaults,
)
from utils.raad_quantization import QuantizationPlan, ScoringOptions, quantize_detector, restore_structure

_CROP = 65  # of the reconstruction, or the largest that fits


def _plan(config: Config) -> QuantizationPlan:
    crop = None if config["padding"] else min(_CROP, WINDOW + (config["crop_size"] - WINDOW) // STRIDE * STRIDE)
    return QuantizationPlan(
        allocation=allocation_options(config),
        scoring=ScoringOptions(config["hqs_score"], config["hqs_input"], config["hqs_tap"]),
        layers=_layer_options(config),
        reconstruction=ReconstructionOptions(
            iterations=config["recon_iters"],
            activation_iterations=config["recon_activation_iters"],
            batch_size=config["recon_batch_size"],
            learning_rate=config["recon_learning_rate"],
            crop=crop,
            crops=config["recon_crops"],
            fisher=config["fisher"],
            seed=config["seed"],
        ),
        calibration_images=config["calibration_images_count"],
        autoencoder_bits=config["autoencoder_bits"],
    )


def _layer_options(config: Config) -> QuantizationOptions:
    return QuantizationOptions(
        range_init=config["range_init"],
        round="adaround" if config["rounding"] == "adaround" else "nearest",
        bias_correction=config["bias_correction"],
        learn_step=config["rounding"] == "lsq" or config["learn_steps"],
        output_bits=config["output_bits"] or None,
    )


def _build(teacher: FrozenTeacher, config: Config) -> EfficientAD:
    options = EfficientADOptions(**fields_of(EfficientADOptions, config))
    return EfficientAD(teacher.with_padding(options.padding), options, config["crop_size"])


def _convert(detector: EfficientAD, stage: int, config: Config, state: Mapping[str, Tensor]) -> None:
    if any(".weight_quantizer." in name for name in state):
        restore_structure(detector, _layer_options(config), state)
    elif stage == FINETUNE and config["finetune"] == "float":
        dequantize_network(detector.student)


def _prepare_training(detector: EfficientAD, config: Config) -> None:
    penalty = PenaltyImages(Path(config["penalty_images"]), config["crop_size"]) if config["penalty_images"] else None
    detector.train_with(EfficientADTraining(**fields_of(EfficientADTraining, config)), penalty)


def _prepare(detector: EfficientAD, config: Config, training: Passes, normal: Passes) -> Config:
    if config["clb_stage"] == QUANTIZE:
        with torch.autocast(detector.device.type, enabled=False):  # ranges and learned roundings need float32
            return quantize_detector(detector, _plan(config), training, normal)
    if config["clb_stage"] == BASELINE:
        detector.prepare(training)
    return {}


def _training_facts(config: Config) -> dict[str, object]:
    return {"penalty_images": names_sha256(Path(config["penalty_images"]))} if config["penalty_images"] else {}


RAAD = Host(
    name="RAAD",
    network_flags=("map_normalisation", "padding"),
    training_flags=("hard_quantile", "jitter", "penalty_images", "baseline", "finetune", *QUANTIZATION_FLAGS),
    folder_flags=(),
    add_flags=add_raad_flags,
    defaults={
        "encoder": "pdn_small",
        "input_size": None,
        "crop_size": None,
        "holdout": 0.1,
        "sab": "off",
        "total_epochs": None,
        "batch_size": 1,
        "optimizer": "adam",
        "adam_eps": 1e-8,
        "learning_rate": 1e-4,
        "final_learning_rate": None,
        "schedule": "step",
        "warmup_iters": 0,
        "weight_decay": 1e-5,
        "gradient_clip": 0.0,
        "metric_size": 0,
        "smoothing_kernel": 0,
        "max_ratio": 0.0,
        "true_false": "f1max",
    },
    help={
        "encoder": "teacher and student: pdn_small pdn_medium, for tests pdn_tiny",
        "encoder_weights": "as --teacher_weights",
        "pos_embed": argparse.SUPPRESS,
        "input_size": "as --image_size",
        "crop_size": "as --image_size",
        "holdout": "share of training images kept for the scale of maps, scores of layers and thresholds (default 0.1)",
        "total_epochs": argparse.SUPPRESS,
        "total_iters": f"of the baseline (default {BASELINE_ITERATIONS})",
        "final_learning_rate": "in the last 5 %% of the iterations (default: a tenth)",
        "warmup_iters": "default 0",
        "scoring": "only reconstruction",
        "save_name": "default RAAD and the setting; -Baseline and -Quantized are added for these stages",
        "setting": "single: a model per category; multi: one of all",
    },
    check=check_raad,
    choose_defaults=choose_raad_defaults,
    build=_build,
    prepare_training=_prepare_training,
    prepare=_prepare,
    convert=_convert,
    training_facts=_training_facts,
    start_stage=lambda config: BASELINE if config["allocation"] in (None, "none") else config["clb_stage"] - 1,
    stage_flags=QUANTIZATION_FLAGS,
    encoders=tuple(PDN_ENCODERS),
    build_encoder=lambda name, size, weights, positions: build_teacher(PDN_ENCODERS[name], weights),
    binarizes=False,
    stages=STAGES,
    stage_suffixes=("-Baseline", "-Quantized", ""),
)
