"""Compare runs, finished or not, with each other and with published results: text, Markdown, CSV and one HTML page.

python -m scripts.report RUN RUN RUN --html report.html
python -m scripts.report RUNS... --output table.md --html report.html              # also table.csv
python -m scripts.report RUNS... --output table.md --measure                       # times every model on this machine first
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.command import run_command
from utils.comparison import compare_runs
from utils.comparison_csv import write_csv
from utils.comparison_page import write_markdown, write_page
from utils.comparison_tables import cost_table, overview, protocol_lines
from utils.converters import number
from utils.parser import tool_parser
from utils.published import read_published
from utils.run_timing import measure_runs


def report(arguments: argparse.Namespace) -> int:
    """Print the tables and write the files."""
    folders = [arguments.root / run for run in arguments.runs]
    published = read_published()
    comparison = compare_runs(folders)
    if arguments.measure:
        measure_runs(folders, arguments.encoder_weights, arguments.repeats)
        comparison = compare_runs(folders)
    for section in comparison.sections:
        print(f"{overview(section).text()}\n\n{cost_table(section).text()}\n")
    notes = ["percent; n/a: not defined (no masks, or one class only)", *protocol_lines(comparison), *comparison.warnings]
    print(*notes, *(f"missing: {line}" for line in comparison.missing), sep="\n")
    table = arguments.csv or (arguments.output and arguments.output.with_suffix(".csv"))
    page = arguments.html or (arguments.output.with_suffix(".html") if arguments.output else Path("report.html"))
    for path, write in ((arguments.output, write_markdown), (table, write_csv), (page, write_page)):
        if path:
            write(path, comparison, published)
            print(f"report: {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders; one that does not exist yet is listed as missing")
    parser.add_argument("--root", type=Path, default=Path(), help="folder that the run folders lie in")
    parser.add_argument("--html", type=Path, help="page to write (default: beside --output, else report.html)")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="tables as Markdown")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help="tables as CSV (default: beside --output)")
    parser.add_argument("--measure", action="store_true", help="time every model here, on one thread; timing.json keeps it")
    parser.add_argument("--repeats", type=number(int, 1), default=9, help="of --measure: rounds in which every model runs once")
    parser.add_argument(
        "--encoder_weights",
        "--teacher_weights",
        metavar="FILE",
        help="of --measure: if the file that the trainings were given has moved",
    )
    return run_command(parser, argv, report)


if __name__ == "__main__":
    sys.exit(main())
