"""Shared fixtures."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.build import RANDOM_TINY_ENCODER, build_encoder, build_inp_former
from tests.miniature import TINY_FLAGS, make_mvtec

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_encoder():
    return build_encoder(RANDOM_TINY_ENCODER, 56)


@pytest.fixture
def tiny_detector(tiny_encoder):
    """A float INP-Former of 32 channels on 4 x 4 patches, seeded."""
    torch.manual_seed(0)
    return build_inp_former(tiny_encoder, 6)


@pytest.fixture
def mvtec(tmp_path):
    """Root of a miniature MVTec-AD with the category bottle."""
    return make_mvtec(tmp_path / "data")


@pytest.fixture
def single_class(tmp_path):
    """Run the single-class script as a user does; returns the finished process. Outputs go to tmp_path/runs."""

    def run(*flags: str, dataset: str = "Folder", data: Path | None = None, tiny: bool = True):
        command = [sys.executable, str(REPOSITORY / "Binary_INP_Single_Class.py"), "--dataset", dataset]
        command += ["--data_path", str(data)] if data is not None else []
        command += [*(TINY_FLAGS if tiny else []), "--save_dir", str(tmp_path / "runs"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)

    return run


def run_folder(tmp_path: Path, save_name: str = "INP-Former-Single-Class", dataset: str = "Folder") -> Path:
    """Where `single_class` puts a run."""
    return tmp_path / "runs" / f"{save_name}_dataset={dataset}_Encoder=random_vit_tiny_14_Resize=64_Crop=56_INP_num=6"
