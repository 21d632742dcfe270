"""What quantized networks weigh as RAAD's table 4 counts it, from the records beside the models."""

import json
import statistics
from pathlib import Path

from common.errors import UserError
from utils.comparison import Section
from utils.run_results import training_folder


def quantization_notes(section: Section) -> list[str]:
    """Effective parameters of each row whose stage was the quantization, means over its models: bits are a category's own."""
    notes = []
    for label, group in section.labelled_groups:
        folders = {training_folder(folder) for part in group.parts for folder in part.run.folders}
        sizes = [size for folder in sorted(folders) for size in _sizes(folder)]
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
    """Sizes of all models that were quantized in a run folder; none in those of other stages and networks."""
    try:
        return [json.loads(path.read_text(encoding="utf-8"))["size"] for path in sorted(folder.rglob("quantization.json"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"record damaged: a quantization.json in {str(folder)!r} cannot be read ({error!r}); remove it, or train again"
        ) from error
