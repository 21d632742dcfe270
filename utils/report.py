"""Tables as text and one offline HTML page per run, made from the files of a run folder alone."""

import base64
import csv
import html
import json
from dataclasses import asdict
from pathlib import Path

import yaml

from binarize.cost import Cost
from utils.checkpoint import write_text
from utils.evaluation import EvaluationOptions
from utils.metrics import METRIC_NAMES, mean_metrics
from utils.result_files import Row, read_metrics, read_results
from utils.tables import format_cost, format_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
img { max-width: 100% } svg { background: #fafafa; margin-right: 1rem } .note { color: #666 }
"""
_SHEET_NOTE = (
    "Heat maps share one scale, fixed by training images. Outline: red where the map exceeds half of that scale, green the "
    "ground truth; a grey mask is unknown."
)
_PLOT_WIDTH, _PLOT_HEIGHT, _PLOT_LEFT, _PLOT_BOTTOM = 460, 220, 52, 28
_HISTOGRAM_BINS = 40
_GOOD_COLOUR, _DEFECTIVE_COLOUR, _LINE_COLOUR = "#4878a8", "#d1495b", "#333"


def format_metric(value: float | None) -> str:
    """A fraction in percent, "n/a" where the metric does not exist."""
    return "n/a" if value is None else f"{100 * value:.2f}"


def result_rows(rows: dict[str, Row]) -> list[tuple[str, ...]]:
    """Header, categories and mean as cells in percent."""
    lines = {**rows, "Mean": mean_metrics(list(rows.values()))}
    return [
        ("item", *METRIC_NAMES),
        *((item, *(format_metric(row[name]) for name in METRIC_NAMES)) for item, row in lines.items()),
    ]


def format_results(rows: dict[str, Row]) -> str:
    """The results as an aligned text table in percent, with a note on what the mean leaves out."""
    text = format_rows(result_rows(rows))
    absent = [name for name in METRIC_NAMES if any(row[name] is None for row in rows.values())]
    return f"{text}\nn/a: not defined for that category; left out of the mean ({', '.join(absent)})" if absent else text


def write_cost(path: Path, table: dict[str, Cost]) -> None:
    """`cost.json`: the counted cost by part."""
    write_text(path, json.dumps({part: asdict(cost) for part, cost in table.items()}, indent=1) + "\n")


def read_cost(path: Path) -> dict[str, Cost] | None:
    """What `write_cost` wrote, or None."""
    if not path.is_file():
        return None
    return {part: Cost(**cost) for part, cost in json.loads(path.read_text()).items()}


def write_run_report(folder: Path, training_folder: Path | None = None) -> None:
    """`report.html` of one run; a test with another protocol takes configuration and loss curves from its training."""
    write_text(folder / "report.html", _page([_run_section(folder, training_folder or folder)]))


def write_comparison(path: Path, folders: list[Path], summary: str) -> None:
    """One page over several runs, with their comparison on top."""
    write_text(
        path,
        _page(
            [
                f"<h1>Comparison</h1><pre>{html.escape(summary)}</pre>",
                *(_run_section(folder, folder) for folder in folders),
            ]
        ),
    )


def _page(sections: list[str]) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>BinaryAD report</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def _run_section(folder: Path, training_folder: Path) -> str:
    own = folder / "config.yaml"
    config = yaml.safe_load((own if own.is_file() else training_folder / "config.yaml").read_text())
    environment = json.loads((training_folder / "env.json").read_text())
    rows, cost = read_results(folder / "results.csv"), read_cost(training_folder / "cost.json")
    parts = [
        f"<h1>{html.escape(folder.name)}</h1>",
        f'<p class="note">CLB stage {config["clb_stage"]} · {html.escape(config["encoder"])}, weights: '
        f"{html.escape(environment['encoder_source'])} · crop {config['crop_size']} px · seed {config['seed']}<br>"
        f"{html.escape(EvaluationOptions.from_config(config).describe())}; percent, n/a where a metric is not defined</p>",
        _table(result_rows(rows)),
    ]
    if cost:
        parts.append(f"<h2>Cost (counted)</h2><pre>{html.escape(format_cost(cost))}</pre>")
    for item in rows:
        parts.append(f"<h2>{html.escape(item)}</h2>")
        losses = [
            (line["iteration"], line["loss"])
            for line in read_metrics(training_folder / "metrics.jsonl")
            if line["item"] == item and line["kind"] == "training"
        ]
        if losses:
            parts.append(_loss_curve(losses))
        parts.append(_score_histogram(folder / item / "scores.csv"))
        sheet = folder / item / "maps" / "contact_sheet.jpg"
        if sheet.is_file():
            data = base64.b64encode(sheet.read_bytes()).decode()
            parts.append(f'<p class="note">{_SHEET_NOTE}</p><img alt="contact sheet" src="data:image/jpeg;base64,{data}">')
    return "".join(parts)


def _table(rows: list[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(rows[0], 'th')}{''.join(line(row, 'td') for row in rows[1:])}</table>"


def _axes(title: str, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    bottom, right = _PLOT_HEIGHT - _PLOT_BOTTOM, _PLOT_WIDTH - 10
    labels = (
        (_PLOT_LEFT, _PLOT_HEIGHT - 8, "start", f"{x_range[0]:.4g}"),
        (right, _PLOT_HEIGHT - 8, "end", f"{x_range[1]:.4g}"),
        (_PLOT_LEFT - 4, bottom, "end", f"{y_range[0]:.3g}"),
        (_PLOT_LEFT - 4, 34, "end", f"{y_range[1]:.3g}"),
        (_PLOT_LEFT, 16, "start", title),
    )
    text = "".join(
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12">{label}</text>' for x, y, anchor, label in labels
    )
    return f'<path d="M{_PLOT_LEFT} 24V{bottom}H{right}" fill="none" stroke="#999"/>{text}'


def _svg(content: str) -> str:
    return f'<svg width="{_PLOT_WIDTH}" height="{_PLOT_HEIGHT}" role="img">{content}</svg>'


def _place(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (value - low) / ((high - low) or 1) * (end - start)


def _loss_curve(points: list[tuple[int, float]]) -> str:
    x_range = (points[0][0], points[-1][0])
    y_range = (0.0, max(loss for _, loss in points))
    path = " ".join(
        f"{_place(x, *x_range, _PLOT_LEFT, _PLOT_WIDTH - 10):.1f},{_place(y, *y_range, _PLOT_HEIGHT - _PLOT_BOTTOM, 24):.1f}"
        for x, y in points
    )
    line = f'<polyline points="{path}" fill="none" stroke="{_LINE_COLOUR}" stroke-width="1.5"/>'
    return _svg(_axes("training loss by iteration", x_range, y_range) + line)


def _score_histogram(path: Path) -> str:
    """Image scores of good and defective test images over each other."""
    if not path.is_file():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        scores = [(int(row["label"]), float(row["score"])) for row in csv.DictReader(file)]
    if not scores:
        return ""
    low, high = min(score for _, score in scores), max(score for _, score in scores)
    counts = {0: [0] * _HISTOGRAM_BINS, 1: [0] * _HISTOGRAM_BINS}
    for label, score in scores:
        counts[label][min(_HISTOGRAM_BINS - 1, int(_place(score, low, high, 0, _HISTOGRAM_BINS)))] += 1
    top, bottom = max(map(max, counts.values())), _PLOT_HEIGHT - _PLOT_BOTTOM
    width = (_PLOT_WIDTH - 10 - _PLOT_LEFT) / _HISTOGRAM_BINS
    bars = "".join(
        f'<rect x="{_PLOT_LEFT + index * width:.1f}" y="{_place(count, 0, top, bottom, 24):.1f}" width="{width:.1f}" '
        f'height="{bottom - _place(count, 0, top, bottom, 24):.1f}" fill="{colour}" fill-opacity="0.55"/>'
        for label, colour in ((0, _GOOD_COLOUR), (1, _DEFECTIVE_COLOUR))
        for index, count in enumerate(counts[label])
        if count
    )
    return _svg(_axes("test images by score: blue good, red defective", (low, high), (0, top)) + bars)
