"""Tiny quantized models of RAAD: made at once, or trained by the entry script."""

import copy
from pathlib import Path

import torch
from torch import nn

import RAAD
from models.efficientad import EfficientAD, EfficientADOptions
from models.teacher import build_teacher
from quantize.layers import QuantizationOptions, calibrate, quantize_network
from tests.miniature import make_mvtec

SIDE = 64
NEAREST = QuantizationOptions(round="nearest")  # its searched ranges leave some values outside


def images_of(count: int, seed: int = 0) -> torch.Tensor:
    """Noise."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def detector_of(bits=(8, 4, 2, 8), autoencoder_bits: int | None = None, options: QuantizationOptions = NEAREST) -> EfficientAD:
    """Quantized and calibrated on noise.

    Biases are large, so that one which is lost is seen; latent weights lie off the grid, as after a fine-tuning.
    """
    torch.manual_seed(1)
    detector = EfficientAD(build_teacher("tiny", "random"), EfficientADOptions(), SIDE).eval()
    detector.quantized_teacher = copy.deepcopy(detector.encoder.network)
    networks = {"quantized_teacher": bits, "student": bits, "autoencoder": autoencoder_bits and [autoencoder_bits] * 14}
    for name, layer_bits in networks.items():
        network = getattr(detector, name)
        for layer in network.convolutions:
            nn.init.uniform_(layer.bias, -0.1, 0.1)
        if layer_bits:
            quantize_network(network, layer_bits, options)
            calibrate(network, images_of(4, seed=1), options)
    detector.prepare(lambda: [images_of(4, seed=1)])
    detector.calibrate([images_of(4, seed=2)])
    return detector


def train_stages(root: Path, flags: str) -> Path:
    """Train all three stages of a tiny model on data made below `root`, which it returns."""
    make_mvtec(root / "data")
    usual = "--encoder pdn_tiny --teacher_weights random --image_size 64 --holdout 0.25 --num_workers 0 --quiet"
    place = ("--dataset", "Folder", "--data_path", str(root / "data"), "--save_dir", str(root / "runs"))
    assert RAAD.main([*place, *usual.split(), *flags.split()]) == 0
    return root


def checkpoint_of(root: Path, suffix: str) -> Path:
    """The model of a stage of `train_stages`: suffix -Baseline, -Quantized or none."""
    (path,) = root.glob(f"runs/RAAD-Single-Class{suffix}_*/*/model.pth")
    return path
