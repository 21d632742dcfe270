"""How maps become numbers, on the command line: the flags of the evaluation protocol."""

import argparse
import math
from typing import get_args

from utils.converters import number
from utils.metrics import BEST_F1, NO_TRUE_FALSE, NORMAL_QUANTILE
from utils.protocol import DEFAULT_METRIC_SIZE, Scoring, SmoothingBorder


def _true_false_rule(text: str) -> str:
    """A converter for argparse: `off`, `f1max`, `val_quantile` or `fixed:VALUE`, the number as Python writes it."""
    kind, _, value = text.partition(":")
    if text in (NO_TRUE_FALSE, BEST_F1, NORMAL_QUANTILE):
        return text
    try:
        if kind == "fixed" and math.isfinite(float(value)):
            return f"fixed:{float(value)}"
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"{text!r} is not {NO_TRUE_FALSE}, {BEST_F1}, {NORMAL_QUANTILE} or fixed:VALUE with a number"
    )


def add_evaluation_flags(group: argparse._ArgumentGroup) -> None:
    """What decides how a model is measured, the protocol, and on which model."""
    group.add_argument(
        "--mask_threshold",
        type=number(float, 0, 1),
        default=0.5,
        help="mask > this is defect (INP-Former 0.5, Dinomaly 0)",
    )
    group.add_argument("--smoothing_kernel", type=number(int, 0), default=5, help="odd side in pixels, 0 for none")
    group.add_argument("--smoothing_sigma", type=number(float, 1e-3), default=4.0)
    group.add_argument(
        "--smoothing_border", choices=get_args(SmoothingBorder), default="zeros", help="what lies beyond a map's border"
    )
    group.add_argument(
        "--metric_size",
        type=number(int, 0),
        default=DEFAULT_METRIC_SIZE,
        help="side of the maps and masks that are measured, 0 for the crop's",
    )
    group.add_argument(
        "--max_ratio",
        type=number(float, 0, 1),
        default=0.01,
        help="share of top pixels in the image score, 0 for the maximum",
    )
    group.add_argument(
        "--pro_mode", choices=["exact", "dinomaly"], default="exact", help="dinomaly: 200 thresholds, for old tables"
    )
    group.add_argument(
        "--true_false",
        type=_true_false_rule,
        default=NO_TRUE_FALSE,
        metavar="off|f1max|val_quantile|fixed:VALUE",
        help="P-TRUE and P-FALSE, recall and 1 - precision of all pixels of a category: at the best P-F1, at the 0.995 "
        "quantile of normal images, or at a map's value",
    )
    group.add_argument(
        "--scoring",
        choices=get_args(Scoring),
        default="reconstruction",
        help="test phase: prototype scores by the distance to the image's own nearest prototype, without the decoder",
    )
    group.add_argument(
        "--test_checkpoint",
        metavar="FILE",
        help="test phase: evaluate this model.pth, trained on whatever data, instead of the run's own (zero-shot)",
    )
    group.add_argument(
        "--metrics_memory",
        type=number(float, 1e-3),
        metavar="GB",
        help="for a category's pixel metrics, beyond it from bins with a stated error (default: half of what is free)",
    )
