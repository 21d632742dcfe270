"""Tables as text and one offline HTML page per run, made from the files of a run folder alone."""

import base64
import html
import json
import logging
import math
from dataclasses import asdict, fields
from pathlib import Path

from binarize.cost import Cost
from common import schema
from common.readers import DamagedFile, Source, read_bytes, read_json
from utils.checkpoint import write_text
from utils.hosts import described_network, stage_of
from utils.metrics import column_names
from utils.plots import loss_curve, score_histogram
from utils.protocol import EvaluationOptions
from utils.result_files import Row, mean_rows, read_metrics, read_results, read_scores
from utils.run_folder import RunFolder
from utils.stored_config import completed_config, read_stored_config
from utils.tables import format_cost, format_rows, html_rows

logger = logging.getLogger(__name__)

SCOPES = ("decoder side", "whole model")  # of a cost, which every table has
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem; overflow-wrap: anywhere }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
img { max-width: 100% } svg { background: #fafafa; margin-right: 1rem } .note { color: #666 }
"""
_SHEET_NOTE = (
    "Heat maps share one scale, fixed by normal images. Outline: red where the map exceeds half of that scale, green the "
    "ground truth; a grey mask is unknown."
)


def format_metric(value: float | None) -> str:
    """A fraction in percent, "n/a" where the metric does not exist."""
    return "n/a" if value is None else f"{100 * value:.2f}"


def result_rows(rows: dict[str, Row]) -> list[tuple[str, ...]]:
    """Header, categories and means as cells in percent."""
    columns = column_names(list(rows.values()))
    lines = {**rows, **mean_rows(rows)}
    return [
        ("item", *columns),
        *((item, *(format_metric(row.get(name)) for name in columns)) for item, row in lines.items()),
    ]


def format_results(rows: dict[str, Row]) -> str:
    """The results as an aligned text table in percent, with a note on what the mean leaves out."""
    text = format_rows(result_rows(rows))
    columns = column_names(list(rows.values()))
    absent = [name for name in columns if any(row.get(name) is None for row in rows.values())]
    return f"{text}\nn/a: not defined for that category; left out of the mean ({', '.join(absent)})" if absent else text


def points_at_most(error: float) -> str:
    """A largest error, given as a fraction, in percentage points, rounded up to a hundredth."""
    return f"{max(1, math.ceil(round(1e4 * error, 6))) / 100:.2f}"


def write_cost(path: Path, table: dict[str, Cost]) -> None:
    """`cost.json`: the counted cost by part."""
    write_text(path, json.dumps({part: asdict(cost) for part, cost in table.items()}, indent=1) + "\n")


def read_cost(path: Path) -> dict[str, Cost] | None:
    """What `write_cost` wrote, or None; raises DamagedFile for anything else."""
    if not path.is_file():
        return None
    source = Source(path, "cost", "remove it and run --phase test")
    counts = dict.fromkeys((field.name for field in fields(Cost)), schema.count)
    content = source.checked(read_json(source), schema.mapping_to(schema.fields({"parameters": schema.count}, counts)))
    table = {part: Cost(**counted) for part, counted in content.items()}
    for scope in SCOPES:
        if scope not in table or table[scope].bits <= 0 or not table[scope].macs:
            raise source.damaged(f"has no usable {scope!r}")
    return table


def write_run_report(folder: Path, training_folder: Path | None = None) -> None:
    """`report.html` of one run; a test with another protocol takes configuration and loss curves from its training."""
    write_text(folder / "report.html", page([run_section(folder, training_folder or folder)]))


def page(sections: list[str]) -> str:
    """An offline HTML page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>BinaryAD report</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def run_section(folder: Path, training_folder: Path) -> str:
    """All of one run as HTML: table, cost, loss curves, score histograms and contact sheets."""
    own = folder / "config.yaml"
    config = completed_config(read_stored_config(own if own.is_file() else training_folder / "config.yaml"))
    encoder_source = RunFolder(training_folder).environment().get("encoder_source", "unknown")
    rows, cost = read_results(folder / "results.csv"), read_cost(training_folder / "cost.json")
    losses = _losses(training_folder / "metrics.jsonl")
    parts = [
        f"<h1>{html.escape(folder.name)}</h1>",
        f'<p class="note">{html.escape(described_network(config))} · {html.escape(stage_of(config))} · '
        f"{html.escape(config['encoder'])}, weights: "
        f"{html.escape(encoder_source)} · crop {config['crop_size']} px · seed {config['seed']}<br>"
        f"{html.escape(EvaluationOptions.from_config(config).describe())}; percent, n/a where a metric is not defined</p>",
        html_rows(result_rows(rows)),
    ]
    errors = {item: error for item, error in RunFolder(folder).pixel_errors().items() if item in rows}
    if errors:
        note = (
            f"pixel metrics of {', '.join(errors)} come from bins, off by at most {points_at_most(max(errors.values()))} points"
        )
        parts.append(f'<p class="note">{html.escape(note)}</p>')
    if cost:
        parts.append(f"<h2>Cost (counted)</h2><pre>{html.escape(format_cost(cost))}</pre>")
    of_several = [name for name in losses if name not in rows]  # one model of all categories
    parts += [loss_curve(f"training loss by iteration: {name}", losses[name]) for name in of_several]
    for item in rows:
        parts.append(f"<h2>{html.escape(item)}</h2>")
        if item in losses:
            parts.append(loss_curve("training loss by iteration", losses[item]))
        parts.append(_histogram(folder / item / "scores.csv"))
        sheet = folder / item / "maps" / "contact_sheet.jpg"
        if sheet.is_file():
            data = base64.b64encode(read_bytes(Source(sheet, "contact sheet", "remove it"))).decode()
            parts.append(f'<p class="note">{_SHEET_NOTE}</p><img alt="contact sheet" src="data:image/jpeg;base64,{data}">')
    return "".join(parts)


def _losses(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(iteration, loss) of every trained model of a `metrics.jsonl`."""
    losses: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(path):
        if line["kind"] == "training":
            losses.setdefault(line["item"], []).append((line["iteration"], line["loss"]))
    return losses


def _histogram(path: Path) -> str:
    """The scores of a category as a picture, or why there is none: the page of a training is not lost with one old table."""
    try:
        scores = read_scores(path)
    except DamagedFile as error:
        logger.warning("%s", error)
        return f'<p class="note">{html.escape(str(error))}</p>'
    return score_histogram(scores) if scores else ""
