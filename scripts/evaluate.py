"""Measure packed models on a data set: the seven metrics, bytes and milliseconds of each file in one table.

python -m scripts.evaluate --model bottle.binaryad --dataset MVTec-AD --data_path ./datasets/mvtec --item bottle
python -m scripts.evaluate --model fp32.binaryad int8.binaryad --dataset Folder --data_path my_parts --item bracket
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from datasets.catalog import choose_items, data_sources, label_of
from datasets.records import ImageDataset, Record
from utils.arguments import add_data_arguments, listing_options, number
from utils.command import run_command
from utils.devices import choose_device
from utils.evaluation import evaluate
from utils.metrics import METRIC_NAMES, named
from utils.packed_model import load_packed
from utils.protocol import EvaluationOptions
from utils.report import format_metric
from utils.tables import format_rows


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, nargs="+", required=True, metavar="FILE.binaryad")
    add_data_arguments(parser.add_argument_group("data"))
    parser.add_argument("--encoder_weights", metavar="FILE", help="for models that only name their encoder")
    parser.add_argument("--device", default="cpu", metavar="auto|cpu|cuda[:i]")
    parser.add_argument("--threads", type=number(int, 1), help="CPU threads (default: torch's choice)")
    parser.add_argument("--quiet", action="store_true", help="warnings only")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def evaluate_models(arguments: argparse.Namespace) -> int:
    """Print a row per model and category."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    sources = data_sources(arguments.dataset, arguments.data_path)
    rows = [("model", "item", *METRIC_NAMES, "OK right", "NG right", "MB", "ms per image")]
    for source, item in choose_items(sources, arguments.item):
        records = source.layout.test(source.root, item, listing_options(arguments))
        rows += [evaluate_model(path, label_of(sources, source, item), records, arguments) for path in arguments.model]
    print(format_rows(rows))
    return 0


def evaluate_model(path: Path, item: str, records: list[Record], arguments: argparse.Namespace) -> tuple[str, ...]:
    """One row: metrics in percent, verdicts at the file's threshold, size, mean time with decoding."""
    detector, description = load_packed(path, choose_device(arguments.device), arguments.encoder_weights)
    sizes, protocol = description["preprocessing"], EvaluationOptions.from_config(description["protocol"])
    images = ImageDataset(records, sizes["input_size"], sizes["crop_size"], arguments.max_pixels)
    started = time.perf_counter()
    evaluation = evaluate(detector, images, protocol, batch_size=1, num_workers=0, precision="fp32", item=item)
    milliseconds = 1000 * (time.perf_counter() - started) / max(1, len(images))
    metrics = named(evaluation.metrics(protocol.pro_mode))
    flagged = evaluation.scores > description["decision"]["threshold"]
    right = [
        f"{int((flagged == label)[evaluation.labels == label].sum())}/{int((evaluation.labels == label).sum())}"
        for label in (0, 1)
    ]
    size = f"{path.stat().st_size / 1e6:.2f}"
    return (path.name, item, *map(format_metric, metrics.values()), *right, size, f"{milliseconds:.0f}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, evaluate_models)


if __name__ == "__main__":
    sys.exit(main())
