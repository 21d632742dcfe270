"""Where tensors live: device, precision and random state."""

import contextlib
import logging
import random

import numpy as np
import torch

from common.errors import UserError

logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device of `--device`: cpu, cuda, cuda:i, or auto; raises UserError with the list of devices if it is absent."""
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        logger.info("device: %s (--device auto)", device)
        return device
    available = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name != "cpu" and ((name == "cuda" and len(available) == 1) or (name != "cuda" and name not in available)):
        raise UserError(f"--device {name!r} is not available here; choose from auto {' '.join(available)}")
    return torch.device(name)


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


def random_state() -> dict:
    """All random states as plain tensors and types."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict) -> None:
    """Undo everything since `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
