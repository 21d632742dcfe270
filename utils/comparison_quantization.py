"""What quantized networks weigh as RAAD's table 4 counts it, from the records in their checkpoints."""

import statistics
from pathlib import Path

import torch

from common.errors import UserError
from utils.comparison import Section
from utils.run_results import training_folder


def quantization_notes(section: Section) -> list[str]:
    """Effective parameters of each row whose stage was the quantization, means over its models: bits are a category's own."""
    notes = []
    for label, group in section.labelled_groups:
        folders = {training_folder(folder) for part in group.parts for folder in part.run.folders}
        sizes = [size for folder in sorted(folders) for size in _sizes(folder)] if group.stage == 1 else []
        if sizes:
            pair, whole = (
                statistics.fmean(size[name] for size in sizes) / 1e6 for name in ("effective_teacher_student", "effective_all")
            )
            notes.append(
                f"{label}: {pair:.3f} M effective parameters (x bits / 32, biases as their layer) of teacher and student, "
                f"{whole:.3f} M with the autoencoder, mean of {len(sizes)} models; finetuning keeps them."
            )
    return notes


def _sizes(folder: Path) -> list[dict]:
    """Sizes of all quantized models in a run folder."""
    records = [_record(path) for path in sorted(folder.rglob("model.pth"))]
    return [record["size"] for record in records if record]


def _record(path: Path) -> dict | None:
    """What the quantization decided, read without the tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("quantization")
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        raise UserError(
            f"checkpoint damaged: {str(path)!r} cannot be read ({type(error).__name__}); use another copy or train again"
        ) from error
