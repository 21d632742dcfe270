"""Counts the cost of equal networks once: that takes a second, a third of a training as small as those of the tests.

What is counted, shown and stored stays the same. `tests.test_cost` and its neighbours call `binarize.cost` itself.
"""

import hashlib
import os
import pickle
from pathlib import Path

import torch

from binarize.cost import Cost, cost_table
from utils import experiment


def remember_costs(folder: Path) -> None:
    """Let the trainings of this process, and of processes forked from it, find counted costs in `folder`."""
    folder.mkdir(exist_ok=True)

    def remembered(detector: torch.nn.Module, crop_size: int) -> dict[str, Cost]:
        path = folder / hashlib.sha256(_structure(detector, crop_size).encode()).hexdigest()
        if not path.exists():
            unfinished = path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(pickle.dumps(cost_table(detector, crop_size)))
            unfinished.rename(path)
        return pickle.loads(path.read_bytes())

    experiment.cost_table = remembered


def _structure(detector: torch.nn.Module, crop_size: int) -> str:
    """All that a count can depend on: kinds and settings of the modules, shapes and types of their tensors."""
    lines = [str(crop_size)]
    for name, module in detector.named_modules():
        settings = {key: value for key, value in vars(module).items() if key[0] != "_" and not isinstance(value, torch.Tensor)}
        del settings["training"]
        lines.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {settings}")
    lines += [
        f"{name} {value.shape} {value.dtype}" for name, value in [*detector.named_parameters(), *detector.named_buffers()]
    ]
    return "\n".join(lines)
