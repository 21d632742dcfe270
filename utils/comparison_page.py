"""A comparison as one Markdown document and one offline HTML page, made from the same tables."""

import html
from pathlib import Path

from utils.checkpoint import write_text
from utils.comparison import Comparison, Section
from utils.comparison_tables import (
    SCOPES,
    categories_cell,
    category_table,
    cost_table,
    protocol_lines,
    provenance_table,
    result_table,
)
from utils.plots import STAGE_COLOURS, Point, scatter
from utils.published import Published
from utils.report import page, run_section
from utils.run_results import training_folder
from utils.tables import escape_markdown

_PLOTTED_METRICS = ("I-AUROC", "P-AP", "AUPRO")
_INTRODUCTION = (
    "Rows marked published or reproduced are other people's numbers, with their source; rows marked ours come from the run "
    "folders listed at the end."
)


def write_markdown(path: Path, comparison: Comparison, published: Published) -> None:
    """The document."""
    parts = ["# Results\n", f"{_INTRODUCTION}\n"]
    for title, lines in _lists(comparison):
        parts.append(f"## {title}\n\n" + "".join(f"* {escape_markdown(line)}\n" for line in lines))
    for section in comparison.sections:
        parts.append(f"## {section.setting}, {escape_markdown(section.dataset)}\n")
        parts += [table.markdown(3) for table in _tables(section, published)]
    parts.append(provenance_table(comparison.runs).markdown(2))
    write_text(path, "\n".join(parts))


def write_page(path: Path, comparison: Comparison, published: Published) -> None:
    """The page: the document with plots, then every run with its curves and pictures."""
    parts = ["<h1>Results</h1>", f"<p>{_INTRODUCTION}</p>"]
    for title, lines in _lists(comparison):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        parts.append(f"<h2>{title}</h2><ul>{items}</ul>")
    for section in comparison.sections:
        results, cost, categories = _tables(section, published)
        parts.append(f"<h2>{section.setting}, {html.escape(section.dataset)}</h2>")
        parts += [results.html(3), cost.html(3), *plots(section), categories.html(3)]
    parts.append(provenance_table(comparison.runs).html(2))
    folders = [folder for run in comparison.runs for folder in run.folders if (folder / "results.csv").is_file()]
    write_text(path, page([*parts, *(run_section(folder, training_folder(folder)) for folder in folders)]))


def plots(section: Section) -> list[str]:
    """Each metric against megabytes (decoder side, whole model) and against milliseconds, for the runs that have both."""
    axes = [(f"size of the {scope}, MB", lambda run, scope=scope: run.cost and run.cost[scope].bytes / 1e6) for scope in SCOPES]
    axes.append(("milliseconds per image", lambda run: run.timing and run.timing["milliseconds"]))
    drawn = []
    for metric in _PLOTTED_METRICS:
        for name, position in axes:
            points = _points(section, metric, position)
            if points:
                drawn.append(scatter(f"{metric} against {name}", name, f"{metric}, %", points))
    return drawn


def _points(section: Section, metric: str, position) -> list[Point]:
    points = []
    for label, group in section.labelled_groups:
        average, x = group.average(metric, group.items), position(group.parts[0].run)
        if average is not None and x is not None:
            label = f"{label} ({categories_cell(group)})"
            spread = 100 * (average.deviation or 0.0)
            points.append(Point(label, x, 100 * average.mean, STAGE_COLOURS[group.stage], spread))
    return points


def _tables(section: Section, published: Published) -> tuple:
    return result_table(section, published), cost_table(section), category_table(section, published)


def _lists(comparison: Comparison) -> list[tuple[str, tuple[str, ...] | list[str]]]:
    named = (
        ("Warnings", comparison.warnings),
        ("Missing", comparison.missing),
        ("How ours were measured", protocol_lines(comparison)),
    )
    return [(title, lines) for title, lines in named if lines]
