"""Measure packed models on a data set: its metrics, bytes and milliseconds of each file in one table.

python -m scripts.evaluate --model bottle.binaryad --dataset MVTec-AD --data_path ./datasets/mvtec --item bottle
python -m scripts.evaluate --model fp32.binaryad int8.binaryad --dataset Folder --data_path my_parts --item bracket
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from datasets.catalog import Layout, choose_items, data_sources, label_of
from datasets.records import ImageDataset, Record
from utils.arguments import add_data_arguments, listing_options
from utils.command import run_command
from utils.converters import number
from utils.devices import choose_device
from utils.distributed import is_main
from utils.evaluation import measure
from utils.measurement import Measurement
from utils.metrics import column_names
from utils.packed_model import load_packed
from utils.parser import tool_parser
from utils.protocol import EvaluationOptions
from utils.report import format_metric
from utils.tables import format_rows


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = tool_parser(__doc__)
    parser.add_argument("--model", type=Path, nargs="+", required=True, metavar="FILE.binaryad")
    add_data_arguments(parser.add_argument_group("data"))
    parser.add_argument("--encoder_weights", metavar="FILE", help="for models that only name their encoder")
    parser.add_argument("--device", default="cpu", metavar="auto|cpu|cuda[:i]")
    parser.add_argument("--threads", type=number(int, 1), help="CPU threads (default: torch's choice)")
    parser.add_argument("--metrics_memory", type=number(float, 1e-3), metavar="GB", help="for pixel metrics, as in a training")
    return parser


def evaluate_models(arguments: argparse.Namespace) -> int:
    """Print a row per model and category."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sources = data_sources(arguments.dataset, arguments.data_path)
    measured = []
    for source, item in choose_items(sources, arguments.item):
        label, records = label_of(sources, source, item), source.layout.test(source.root, item, listing_options(arguments))
        for path in arguments.model:
            measured.append((path, label, *measure_model(path, label, records, source.layout, arguments)))
    if not is_main():  # under torchrun the main process alone has the measurements
        return 0
    columns = column_names([measurement.metrics for _, _, measurement, _ in measured])
    rows = [("model", "item", *columns, "OK right", "NG right", "MB", "ms per image")]
    print(format_rows([*rows, *(cells(*line, columns) for line in measured)]))
    return 0


def measure_model(
    path: Path, item: str, records: list[Record], layout: Layout, arguments: argparse.Namespace
) -> tuple[Measurement, float]:
    """What a packed model makes of a category, and the threshold of its verdicts."""
    detector, description = load_packed(path, choose_device(arguments.device), arguments.encoder_weights)
    sizes, protocol = description["preprocessing"], EvaluationOptions.from_config(description["protocol"])
    interpolation = sizes.get("interpolation", "bilinear")  # older files do not say it
    images = ImageDataset(records, sizes["input_size"], sizes["crop_size"], arguments.max_pixels, interpolation=interpolation)
    measurement = measure(detector, images, protocol, 1, 0, "fp32", item, arguments.metrics_memory, layout)
    return measurement, description["decision"]["threshold"]


def cells(path: Path, item: str, measurement: Measurement, threshold: float, columns: tuple[str, ...]) -> tuple[str, ...]:
    """One row: metrics in percent, verdicts at the file's threshold, size, mean time with decoding."""
    labels, flagged = measurement.labels, measurement.scores > threshold
    right = [f"{int((flagged == label)[labels == label].sum())}/{int((labels == label).sum())}" for label in (0, 1)]
    milliseconds = 1000 * measurement.seconds / max(1, len(labels))
    metrics = (format_metric(measurement.metrics.get(name)) for name in columns)
    return (path.name, item, *metrics, *right, f"{path.stat().st_size / 1e6:.2f}", f"{milliseconds:.0f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, evaluate_models)


if __name__ == "__main__":
    sys.exit(main())
