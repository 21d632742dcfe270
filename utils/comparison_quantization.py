"""What quantized networks weigh as RAAD's table 4 counts it, from the records beside the models."""

import statistics
from pathlib import Path

from common import schema
from common.readers import Source, read_json
from utils.comparison import Section
from utils.run_results import training_folder

_SIZES = ("effective_teacher_student", "effective_all")


def quantization_notes(section: Section) -> list[str]:
    """Effective parameters of each row whose stage was the quantization, means over its models: bits are a category's own."""
    notes = []
    for label, group in section.labelled_groups:
        folders = {training_folder(folder) for part in group.parts for folder in part.run.folders}
        sizes = [size for folder in sorted(folders) for size in _sizes(folder)]
        if sizes:
            pair, whole = (statistics.fmean(size[name] for size in sizes) / 1e6 for name in _SIZES)
            notes.append(
                f"{label}: {pair:.3f} M effective parameters (x bits / 32, biases as their layer) of teacher and student, "
                f"{whole:.3f} M with the autoencoder, mean of {len(sizes)} models; finetuning keeps them."
            )
    return notes


def _sizes(folder: Path) -> list[dict]:
    """Sizes of all models that were quantized in a run folder; none in those of other stages and networks."""
    return [_size(path) for path in sorted(folder.rglob("quantization.json"))]


def _size(path: Path) -> dict:
    source = Source(path, "record of the quantization", "remove it, or train again")
    sizes = schema.fields(dict.fromkeys(_SIZES, schema.number), unknown=True)
    return source.checked(read_json(source), schema.fields({"size": sizes}, unknown=True))["size"]
