"""Where tensors live: device, precision and seed."""

import contextlib
import logging
import random

import numpy as np
import torch

from common.errors import UserError
from utils.distributed import local_rank, processes_on_this_machine

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device of `--device`: cpu, cuda, cuda:i, or auto; under torchrun each process has a GPU of its own.

    Raises:
        UserError: there is no such device, or there are fewer GPUs than processes.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu", *(f"cuda:{index}" for index in range(count))]
    if name not in ("auto", "cuda", *available) or (name == "cuda" and not count):
        raise UserError(f"--device {name!r} is not available here; choose from auto {' '.join(available)}")
    if name == "cpu" or not count:
        device = torch.device("cpu")
    elif processes_on_this_machine() > 1:
        device = _gpu_of_process(name, count)
    else:
        device = torch.device("cuda" if name == "auto" else name)
    if device.index is not None:
        torch.cuda.set_device(device)  # what NCCL and the random state refer to
    if name == "auto":
        logger.info("device: %s (--device auto)", device)
    return device


def _gpu_of_process(name: str, count: int) -> torch.device:
    """The GPU that has this process's number on its machine."""
    processes = processes_on_this_machine()
    if name not in ("auto", "cuda"):
        raise UserError(f"--device {name} is one GPU for {processes} processes, each needs its own; give --device cuda")
    if processes > count:
        raise UserError(
            f"{processes} processes but {count} GPUs on this machine; start torchrun with --nproc_per_node {count}, or give "
            "--device cpu"
        )
    return torch.device("cuda", local_rank())


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Mixed precision for `--precision bf16`, nothing for fp32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, and choose deterministic cuDNN kernels."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
