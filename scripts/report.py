"""Compare runs: one table of results, one of cost, and one HTML page with everything.

python -m scripts.report RUN RUN RUN --html report.html
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from common.errors import UserError
from utils.command import run_command
from utils.evaluation import EvaluationOptions
from utils.metrics import METRIC_NAMES, mean_metrics
from utils.report import format_metric, read_cost, write_comparison
from utils.run_folder import RunFolder
from utils.tables import format_rows

_SCOPES = ("decoder side", "whole model")


def result_comparison(folders: list[Path]) -> str:
    """Mean metrics of every run, in percent."""
    rows = [("run", "stage", "items", *METRIC_NAMES)]
    for folder in folders:
        run = RunFolder(folder)
        results, config = run.rows(), run.stored_config()
        means = mean_metrics(list(results.values()))
        cells = (format_metric(means[name]) for name in METRIC_NAMES)
        rows.append((config["save_name"], str(config["clb_stage"]), str(len(results)), *cells))
    return format_rows(rows)


def cost_comparison(folders: list[Path]) -> str:
    """Counted cost of every run: megabytes and MACs, decoder side and whole model."""
    rows = [("run", *(cell for scope in _SCOPES for cell in (f"{scope}: MB", "ratio", "GMAC", "ratio")))]
    for folder in folders:
        table = read_cost(folder / "cost.json")
        cells = [RunFolder(folder).stored_config()["save_name"]]
        for scope in _SCOPES:
            cost = table[scope]
            cells += [
                f"{cost.bytes / 1e6:.1f}",
                f"{cost.size_ratio:.2f}x",
                f"{cost.equivalent_macs / 1e9:.2f}",
                f"{cost.mac_ratio:.2f}x",
            ]
        rows.append(tuple(cells))
    return format_rows(rows)


def compare(arguments: argparse.Namespace) -> int:
    """Print both tables and write the page."""
    folders = [arguments.root / run for run in arguments.runs]
    for folder in folders:
        if not all((folder / name).is_file() for name in ("config.yaml", "results.csv", "cost.json")):
            raise UserError(f"{str(folder)!r} is no finished run; expected config.yaml, results.csv and cost.json in it")
    protocols = {folder.name: EvaluationOptions.from_config(RunFolder(folder).stored_config()).describe() for folder in folders}
    same = len(set(protocols.values())) == 1
    protocol = (
        next(iter(protocols.values()))
        if same
        else "\n".join(
            ["PROTOCOLS DIFFER, the rows are not comparable:", *(f"{name}: {text}" for name, text in protocols.items())]
        )
    )
    summary = (
        f"{result_comparison(folders)}\n\npercent; n/a: not defined (no masks, or one class only)\n{protocol}\n\n"
        f"{cost_comparison(folders)}\n\n"
        "cost is counted, not measured: a binary MAC at 1/64 of a float MAC, a binary weight as one bit"
    )
    print(summary)
    write_comparison(arguments.html, folders, summary)
    print(f"report: {arguments.html}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that the run folders lie in")
    parser.add_argument("--html", type=Path, default=Path("report.html"), help="page to write")
    return run_command(parser, argv, compare)


if __name__ == "__main__":
    sys.exit(main())
