"""Results that others published, from one data file that names the source of every row."""

from dataclasses import dataclass
from pathlib import Path

from common.readers import Source, brief, read_table
from datasets.catalog import LAYOUTS
from utils.hosts import HOSTS
from utils.metrics import METRIC_NAMES

PUBLISHED_FILE = Path(__file__).with_name("published_results.csv")
SETTINGS = (
    "single-class", "multi-class", "super-multi-class", "few-shot 1", "few-shot 2", "few-shot 4", "zero-shot",
)  # fmt: skip
MEAN = "Mean"
_KINDS = ("published", "reproduced", "claim")
_CLAIMS = ("size_ratio", "flops_ratio", "auroc_loss")
_COLUMNS = (
    "kind", "method", "setting", "dataset", "item", *METRIC_NAMES, *_CLAIMS, "encoder", "input_size", "crop_size",
    "metric_size", "source", "host", "note",
)  # fmt: skip
_TEXTS = ("kind", "method", "setting", "dataset", "item", "encoder", "input_size", "crop_size", "source", "host", "note")


@dataclass(frozen=True)
class PublishedRow:
    """One row: metrics in percent, as written by their authors, "" where none is given.

    Attributes:
        kind: `published` by the method's authors or others who compare with it, `reproduced` by a reader of the paper.
        item: a category, or `Mean` of all categories.
        encoder, input_size, crop_size: what it was measured with, "" if not stated or another kind of network.
        metric_size: side of the maps that it was measured on, in pixels; 0: that of the images.
        host: whose runs it stands beside, "" for all that were measured on maps of that size.
        note: what is wrong with its numbers or not stated, "" if nothing is known.
    """

    kind: str
    method: str
    setting: str
    dataset: str
    item: str
    metrics: dict[str, str]
    encoder: str
    input_size: str
    crop_size: str
    metric_size: int
    source: str
    host: str
    note: str


@dataclass(frozen=True)
class Claim:
    """A published claim relative to the float model: ratios of size and FLOPs, largest loss of I-AUROC in points."""

    method: str
    size_ratio: float
    flops_ratio: float
    auroc_loss: float
    source: str


@dataclass(frozen=True)
class Published:
    """The whole data file."""

    rows: tuple[PublishedRow, ...]
    claims: tuple[Claim, ...]

    def of(self, setting: str, dataset: str) -> list[PublishedRow]:
        """Rows of one table, means and categories."""
        return [row for row in self.rows if (row.setting, row.dataset) == (setting, dataset)]


def read_published(path: Path = PUBLISHED_FILE) -> Published:
    """Read and check the data file; raises DamagedFile naming the line that is wrong."""
    source = Source(path, "published results", "correct it")
    _, lines = read_table(source, _COLUMNS)
    rows: list[PublishedRow] = []
    claims: list[Claim] = []
    for line in lines:
        cells = line.cells
        try:
            _check(cells)
            if cells["kind"] == "claim":
                ratios = (line.number_in(source, name) for name in _CLAIMS)
                claims.append(Claim(cells["method"], *ratios, source=cells["source"]))
                continue
            row = _row(cells)
            if any(_place(row) == _place(other) for other in rows):
                raise ValueError("is there twice")
            rows.append(row)
        except (ValueError, TypeError) as error:
            raise source.damaged(f"is wrong ({brief(error)})", line.place) from error
    return Published(tuple(rows), tuple(claims))


def _check(line: dict[str, str]) -> None:
    if line["kind"] not in _KINDS:
        raise ValueError(f"kind {line['kind']!r} is none of {' '.join(_KINDS)}")
    for name in ("method", "source"):
        if not line[name].strip():
            raise ValueError(f"{name} is empty")


def _row(line: dict[str, str]) -> PublishedRow:
    if line["setting"] not in SETTINGS:
        raise ValueError(f"setting {line['setting']!r} is none of {', '.join(SETTINGS)}")
    layout = LAYOUTS.get(line["dataset"])
    if layout is None or layout.published_items is None:
        raise ValueError(f"dataset {line['dataset']!r} is no published data set")
    if line["item"] not in (MEAN, *layout.published_items):
        raise ValueError(f"item {line['item']!r} is no category of {line['dataset']} and not {MEAN}")
    if any(line[name] for name in _CLAIMS):
        raise ValueError("ratios and losses belong to claims")
    metrics = {name: line[name] for name in METRIC_NAMES}
    numbers = {name: float(cell) for name, cell in metrics.items() if cell}
    if not numbers:
        raise ValueError("it has no metric")
    for name, value in numbers.items():
        if not 1 < value <= 100:
            raise ValueError(f"{name} is {value:g}, expected percent")
    if not line["metric_size"].isdecimal():
        raise ValueError(f"metric_size {line['metric_size']!r} is no number of pixels, or 0 for that of the images")
    if line["host"] not in ("", *HOSTS):
        raise ValueError(f"host {line['host']!r} is none of {' '.join(HOSTS)}")
    fields = {name: line[name] for name in _TEXTS}
    return PublishedRow(**fields, metrics=metrics, metric_size=int(line["metric_size"]))


def _place(row: PublishedRow) -> tuple[str, ...]:
    return row.host, row.kind, row.method, row.setting, row.dataset, row.item
