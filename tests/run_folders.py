"""Run folders written by hand: the files that a training leaves, with chosen numbers."""

import json
from pathlib import Path

import yaml

from binarize.cost import Cost
from utils.arguments import base_parser, parse
from utils.hosts import INP_FORMER, Host
from utils.metrics import METRIC_NAMES
from utils.report import write_cost
from utils.result_files import write_results
from utils.settings import settings_of

# 1000 float32 parameters in the decoder; at stage 2 all but 100 of them binary, and half of the MACs
COSTS = {
    0: {"decoder side": Cost(1000, 0, 0, 2000, 0), "whole model": Cost(3000, 0, 0, 6000, 0)},
    1: {"decoder side": Cost(1000, 400, 0, 1600, 400), "whole model": Cost(3000, 400, 0, 5600, 400)},
    2: {"decoder side": Cost(1000, 900, 0, 1000, 1000), "whole model": Cost(3000, 900, 0, 5000, 1000)},
}


def row(auroc: float | None, **further: float) -> dict[str, float | None]:
    """A row with an image AUROC, and other metrics by name with `_` for `-`."""
    known = {name.replace("_", "-"): value for name, value in further.items()}
    return {**dict.fromkeys(METRIC_NAMES), "I-AUROC": auroc, **known}


def make_run(
    root: Path,
    rows: dict,
    *flags: str,
    host: Host = INP_FORMER,
    setting: str = "single",
    stage: int = 0,
    items=(),
    inside: str = "",
    weights: str = "e",
    **environment: object,
) -> Path:
    """A run folder below `root`.

    Args:
        flags: of the training script, beyond data set (MVTec-AD) and stage.
        items: what env.json names as asked for.
        weights: hash of the encoder's weights.
        environment: what else env.json has.
        inside: name of the folder of a test with another protocol, which gets the rows and the flags instead.
    """
    start = ["--dataset", "MVTec-AD", "--data_path", "data", "--clb_stage", str(stage), "--total_iters", "100"]
    start += ["--load_checkpoint", "before"] if stage == 2 and "--load_checkpoint" not in flags else []
    settings = settings_of(parse(base_parser("", host, [setting]), [*start, "--save_dir", str(root), *flags]))
    folder = settings.run_path / inside
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.config))
    if not inside:
        known = {
            "commit": "c0ffee",
            "date": "2026-01-02",
            "encoder_sha256": weights,
            "encoder_source": "hub",
            "device": "cpu",
            "items": list(items),
        }
        (folder / "env.json").write_text(json.dumps(known | environment))
        write_cost(folder / "cost.json", COSTS[stage])
    if rows:
        write_results(folder / "results.csv", rows)
    return folder
