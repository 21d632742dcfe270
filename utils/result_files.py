"""The small tables a run leaves: results.csv, scores.csv, bad_images.csv, predictions.csv and metrics.jsonl."""

import csv
import io
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from common import schema
from common.errors import ResourceError
from common.readers import Line, Source, parse_json, read_bytes, read_table
from datasets.listing import leaves_folder
from datasets.records import Record
from utils.checkpoint import explain_write_error, write_text
from utils.metrics import METRIC_NAMES, column_names, mean_metrics

logger = logging.getLogger(__name__)

Row = dict[str, float | None]

_FRACTION = re.compile(r"0\.\d{4}|1\.0000")
_MEAN = "Mean"
_LONGEST_NAME = 255  # bytes of a folder's name, on common file systems
_SECONDS_BETWEEN_TABLES = 10
_SCORE_COLUMNS = ("path", "item", "label", "score")
_ANY_LINE = schema.fields({"item": schema.text, "kind": schema.text}, unknown=True)  # of metrics.jsonl
_TRAINING_LINE = schema.fields({"iteration": schema.count, "loss": schema.number}, unknown=True)
_AGAIN = "remove it and run --phase test"


def write_results(path: Path, rows: dict[str, Row]) -> None:
    """`results.csv`: a row per category and `Mean`; fractions with 4 decimals, empty where a metric does not exist.

    Columns are the seven metrics and then what else any row has. Categories of the form `DATASET/ITEM` have one row
    `Mean DATASET` per data set before the last row.
    """
    names = column_names(list(rows.values()))
    lines = {**rows, **mean_rows(rows)}
    _write_csv(
        path,
        ("item", *names),
        (
            (safe_cell(item), *("" if row.get(name) is None else f"{row[name]:.4f}" for name in names))
            for item, row in lines.items()
        ),
    )


def mean_rows(rows: dict[str, Row]) -> dict[str, Row]:
    """`Mean DATASET` of each data set among categories of the form `DATASET/ITEM`, then `Mean` of all categories."""
    groups: dict[str, list[Row]] = {}
    for item, row in rows.items():
        if name := _mean_of_data_set(item):
            groups.setdefault(name, []).append(row)
    return {name: mean_metrics(group) for name, group in {**groups, _MEAN: list(rows.values())}.items()}


def _mean_of_data_set(item: str) -> str | None:
    data_set, slash, _ = item.partition("/")
    return f"{_MEAN} {data_set}" if slash else None


def read_results(path: Path) -> dict[str, Row]:
    """Rows by category without the means; raises DamagedFile for a file of another form, or one that was cut short."""
    if not path.is_file():
        return {}
    source = Source(path, "results", _AGAIN)
    (_, *names), lines = read_table(source, ("item", *METRIC_NAMES), further=True)
    rows = {}
    for item, line in _by_item(source, lines):
        cells = {name: line.cells[name] for name in names}
        wrong = [cell for cell in cells.values() if cell and not _FRACTION.fullmatch(cell)]
        if wrong:
            raise source.damaged(f"has {wrong[0]!r} where a fraction with 4 decimals should be", line.place)
        rows[item] = {name: float(cell) if cell else None for name, cell in cells.items()}
    means = {_MEAN, *map(_mean_of_data_set, rows)}
    return {item: row for item, row in rows.items() if item not in means}


def _by_item(source: Source, lines: list[Line]) -> Iterator[tuple[str, Line]]:
    """Lines with their categories, which name folders, each once."""
    seen = set()
    for line in lines:
        item = line.cells["item"].removeprefix("'")
        if (
            not item
            or leaves_folder(item)
            or any(len(part.encode("utf-8", "surrogateescape")) > _LONGEST_NAME for part in item.split("/"))
        ):
            raise source.damaged(f"has {item!r:.100} where a category should be", line.place)
        if item in seen:
            raise source.damaged(f"has {item!r} a second time", line.place)
        seen.add(item)
        yield item, line


def write_scores(path: Path, rows: Iterable[tuple[str, str, int, float]]) -> None:
    """`scores.csv`: path, item, label, score of every test image."""
    _write_csv(
        path,
        _SCORE_COLUMNS,
        ((safe_cell(image_path), safe_cell(item), label, f"{score:.6f}") for image_path, item, label, score in rows),
    )


def read_scores(path: Path) -> list[tuple[int, float]]:
    """(label, score) of all images in a `scores.csv`, empty without one; raises DamagedFile."""
    if not path.is_file():
        return []
    source = Source(path, "scores", _AGAIN)
    _, lines = read_table(source, _SCORE_COLUMNS)
    for line in lines:
        if line.cells["label"] not in ("0", "1"):
            raise source.damaged(f"has the label {line.cells['label']!r}", line.place)
    return [(int(line.cells["label"]), line.number_in(source, "score")) for line in lines]


def write_bad_images(path: Path, bad: Iterable[tuple[Record, str]]) -> None:
    """`bad_images.csv`: path and reason of every image left out."""
    _write_csv(path, ("path", "reason"), ((safe_cell(str(record.path)), safe_cell(reason)) for record, reason in bad))


def write_chosen_files(path: Path, chosen: Iterable[tuple[str, str]]) -> None:
    """`chosen_files.csv`: item and path of every few-shot training image."""
    _write_csv(path, ("item", "path"), ((safe_cell(item), safe_cell(name)) for item, name in chosen))


def write_failures(path: Path, failures: dict[str, str]) -> None:
    """`failures.csv`: categories that have no row, and why."""
    _write_csv(path, ("item", "reason"), ((safe_cell(item), safe_cell(reason)) for item, reason in failures.items()))


def read_failures(path: Path) -> dict[str, str]:
    """Reason by category; empty without the file."""
    if not path.is_file():
        return {}
    source = Source(path, "list of failures", "remove it")
    _, lines = read_table(source, ("item", "reason"))
    return {item: line.cells["reason"].removeprefix("'") for item, line in _by_item(source, lines)}


def write_pixel_errors(path: Path, errors: dict[str, float]) -> None:
    """`pixel_errors.csv`: categories whose pixel metrics come from bins, and by how much they can be off (fractions)."""
    _write_csv(path, ("item", "error"), ((safe_cell(item), f"{error:.6f}") for item, error in errors.items()))


def read_pixel_errors(path: Path) -> dict[str, float]:
    """Error by category; empty without the file."""
    if not path.is_file():
        return {}
    source = Source(path, "errors of pixel metrics", _AGAIN)
    _, lines = read_table(source, ("item", "error"))
    errors = {item: line.number_in(source, "error") for item, line in _by_item(source, lines)}
    for item, error in errors.items():
        if not 0 <= error <= 1:
            raise source.damaged(f"has the error {error:g} for {item!r:.50} where a fraction should be")
    return errors


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def safe_cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe goes before what could start one."""
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "'", "\t", "\r", "\n") else text


class PredictionTable:
    """`predictions.csv`: path, score, verdict, threshold, error of every image; a bad one has an error and no score.

    It is renewed as a whole every few seconds, so that even a killed process leaves a complete table of what it did.
    """

    def __init__(self, path: Path, threshold: float):
        """Replace the file by an empty table; raises ResourceError if that is impossible."""
        self.path, self.threshold = path, threshold
        self._rows: list[tuple[str, ...]] = []
        self.write()

    def add(self, image_path: str, score: float | None = None, verdict: str = "", error: str = "") -> None:
        """One more image: its score and verdict, or the reason why there are none."""
        number = "" if score is None else f"{score:.6f}"
        self._rows.append((safe_cell(image_path), number, verdict, f"{self.threshold:.6f}", safe_cell(error)))
        if time.monotonic() - self._written > _SECONDS_BETWEEN_TABLES:
            self.write()

    def write(self) -> None:
        """Put all rows into the file."""
        _write_csv(self.path, ("path", "score", "verdict", "threshold", "error"), self._rows)
        self._written = time.monotonic()


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, of all categories of a run."""

    def __init__(self, path: Path, item: str):
        self.path, self.item = path, item

    def training(self, iteration: int, loss: float, rate: float, seconds: float, parts: dict[str, float]) -> None:
        """One logged training step; `seconds` per iteration on average since the start."""
        logger.info(
            "%s: iteration %d, loss %.4f (%s), lr %.2e, %.2f s per iteration",
            self.item,
            iteration,
            loss,
            ", ".join(f"{name} {value:.4f}" for name, value in parts.items()),
            rate,
            seconds,
        )
        self.append("training", iteration=iteration, loss=loss, lr=rate, seconds_per_iteration=seconds, **parts)

    def append(self, kind: str, **values) -> None:
        """Append one line and flush it to the disk."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                begin = b"\n" if _is_cut_short(file) else b""  # else two lines would be lost
                file.write(begin + json.dumps({"item": self.item, "kind": kind, **values}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResourceError(explain_write_error(self.path, error)) from error

    def truncate(self, iteration: int) -> None:
        """Drop this category's lines after an iteration: they will be written again."""
        lines = read_metrics(self.path)
        kept = [line for line in lines if line["item"] != self.item or line.get("iteration", iteration + 1) <= iteration]
        if len(kept) < len(lines):
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))


def _is_cut_short(file: IO[bytes]) -> bool:
    """Whether a crash left a last line without its end; leaves the file at its end."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def read_metrics(path: Path) -> list[dict]:
    """Lines of a `metrics.jsonl`; with a warning it passes over what is none, as a last line cut short by a crash."""
    if not path.is_file():
        return []
    lines = []
    for number, text in enumerate(read_bytes(Source(path, "log of losses", "remove it")).splitlines(), 1):
        line = _metrics_line(text)
        if line is None:
            logger.warning("passed over line %d of %r, which is damaged", number, str(path))
        else:
            lines.append(line)
    return lines


def _metrics_line(text: bytes) -> dict | None:
    try:
        line = parse_json(text)
        _ANY_LINE(line, "")
        if line["kind"] == "training":
            _TRAINING_LINE(line, "")
    except ValueError:
        return None
    return line
