"""Seconds and values of the pixel metrics beside scikit-learn and the official AUPRO code, on synthetic maps.

python -m scripts.benchmark_metrics            # 83 maps of 256x256; needs requirements-dev.txt
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch

from utils.command import run_command
from utils.metrics import PRO_LIMIT, pixel_metrics
from utils.parser import tool_parser
from utils.tables import format_rows


def synthetic_maps(count: int, side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Skewed score maps (n, side, side) float32 and masks with one to three elliptic regions each."""
    generator = np.random.default_rng(seed)
    maps, masks = [], np.zeros((count, side, side), np.uint8)
    for mask in masks:
        for _ in range(generator.integers(1, 4)):
            centre = tuple(int(value) for value in generator.integers(side // 8, side * 7 // 8, 2))
            axes = tuple(int(value) for value in generator.integers(side // 40, side // 10, 2))
            cv2.ellipse(mask, centre, axes, float(generator.uniform(0, 180)), 0, 360, 1, -1)
        noise = cv2.GaussianBlur(generator.gamma(2.0, 1.0, (side, side)).astype(np.float32), (0, 0), side / 64)
        signal = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), side / 40) * generator.uniform(0.2, 2.0)
        maps.append(noise + signal)
    return np.stack(maps), masks.astype(bool)


def official_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """The official curve (as pyaupro ships it), integrated with interpolation at FPR 0.3."""
    from pyaupro import PerRegionOverlap

    metric = PerRegionOverlap(thresholds=None, reference_implementation=True)
    metric.update(torch.from_numpy(maps), torch.from_numpy(masks))
    rate, overlap = (np.asarray(part, np.float64) for part in metric.compute())
    end = np.interp(PRO_LIMIT, rate, overlap)
    kept = rate < PRO_LIMIT
    return float(np.trapezoid([*overlap[kept], end], [*rate[kept], PRO_LIMIT]) / PRO_LIMIT)


def scikit_learn_metrics(maps: np.ndarray, masks: np.ndarray) -> tuple[float, float, float]:
    """P-AUROC, P-AP and P-F1 by scikit-learn."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    truth, scores = masks.ravel(), maps.ravel()
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return roc_auc_score(truth, scores), average_precision_score(truth, scores), f1.max()


def best_of(runs: int, work: Callable[[], object]) -> tuple[float, object]:
    """Shortest wall-clock seconds of some runs, and the result."""
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure the three in turn and print one table."""
    maps, masks = synthetic_maps(arguments.count, arguments.side, arguments.seed)
    ours, values = best_of(arguments.runs, lambda: pixel_metrics(maps, masks))
    sklearn, reference = best_of(arguments.runs, lambda: scikit_learn_metrics(maps, masks))
    official, aupro = best_of(arguments.runs, lambda: official_aupro(maps, masks))
    rows = [
        ("", "P-AUROC", "P-AP", "P-F1", "AUPRO", "seconds"),
        ("BinaryAD, all four in one sort", *(f"{value:.6f}" for value in values), f"{ours:.2f}"),
        ("scikit-learn", *(f"{value:.6f}" for value in reference), "-", f"{sklearn:.2f}"),
        ("official AUPRO code", "-", "-", "-", f"{aupro:.6f}", f"{official:.2f}"),
    ]
    print(
        f"{arguments.count} maps of {arguments.side}x{arguments.side}, {masks.mean():.1%} defective, best of {arguments.runs}"
    )
    print(format_rows(rows))
    print(f"scikit-learn and official code together take {(sklearn + official) / ours:.1f} times as long")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--count", type=int, default=83, help="number of maps")
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return run_command(parser, argv, benchmark)


if __name__ == "__main__":
    sys.exit(main())
