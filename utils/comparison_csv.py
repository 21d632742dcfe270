"""A comparison as CSV: every published row, every run and every mean over seeds, as means and by category."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.catalog import ListingOptions
from utils.checkpoint import write_text
from utils.comparison import Average, Comparison, Group, Section
from utils.comparison_tables import SCOPES
from utils.published import MEAN, Claim, Published, PublishedRow
from utils.result_files import safe_cell

_FIRST = ("setting", "dataset", "kind", "name", "stage", "seeds", "n", "item", "categories", "expected")
_COST_NAMES = ("bytes", "size ratio", "MACs", "MAC ratio")
_COSTS = tuple(f"{scope} {name}" for scope in SCOPES for name in _COST_NAMES)
_LAST = (
    "pixel_error", "compared categories", "float run", *_COSTS, "milliseconds", "network", "encoder", "input_size", "crop_size",
    "metric_size", "realiad_json", "source",
)  # fmt: skip
_SUFFIXES = ("", " deviation", " difference", " difference deviation")


def write_csv(path: Path, comparison: Comparison, published: Published) -> None:
    """Write the table; metrics, their deviations over seeds, differences to float and largest pixel errors are in percent."""
    metrics = list(dict.fromkeys(metric for section in comparison.sections for metric in section.metrics))
    columns = (*_FIRST, *(metric + suffix for metric in metrics for suffix in _SUFFIXES), *_LAST)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for section in comparison.sections:
        lines = [_published_line(row) for row in section.published_rows(published)]
        for line in [*lines, *_our_lines(section)]:
            writer.writerow({name: _cell(cell) for name, cell in line.items()})
    for claim in published.claims:
        writer.writerow({name: _cell(cell) for name, cell in _claim_line(claim).items()})
    write_text(path, text.getvalue())


def _cell(text: str) -> str:
    """Names are kept from being formulas; a difference that begins with its sign is a number."""
    try:
        float(text)
    except ValueError:
        return safe_cell(text)
    return text


def _published_line(row: PublishedRow) -> dict[str, str]:
    return {
        "setting": row.setting,
        "dataset": row.dataset,
        "kind": row.kind,
        "name": row.method,
        "item": row.item,
        **row.metrics,
        "encoder": row.encoder,
        "input_size": row.input_size,
        "crop_size": row.crop_size,
        "metric_size": str(row.metric_size),
        "realiad_json": ListingOptions().realiad_json if row.dataset == "Real-IAD" else "",
        "source": f"{row.source}; {row.note}" if row.note else row.source,
    }


def _claim_line(claim: Claim) -> dict[str, str]:
    text = f"size up to {claim.size_ratio:g}x, FLOPs up to {claim.flops_ratio:g}x (of which part is not stated)"
    difference = f"{-claim.auroc_loss:g}"
    return {"kind": "claim", "name": claim.method, "I-AUROC difference": difference, "source": f"{text}; {claim.source}"}


def _our_lines(section: Section) -> Iterator[dict[str, str]]:
    """Each run by itself, and runs that differ in their seed together."""
    for label, group in section.labelled_groups:
        members = [(part.run.name, Group((part,), (other,))) for part, other in zip(group.parts, group.floats, strict=True)]
        kinds = [("run", name, member) for name, member in members]
        kinds += [("seeds", label, group)] if len(members) > 1 else []
        for kind, name, member in kinds:
            start = {"setting": section.setting, "dataset": section.dataset, "kind": kind, "name": name}
            yield {**start, **_line(member, section.metrics, MEAN, member.items, member.items_with_float)}
            for item in member.items:
                compared = [item] if item in member.items_with_float else []
                yield {**start, **_line(member, section.metrics, item, [item], compared)}


def _line(group: Group, metrics: Sequence[str], item: str, items: Sequence[str], compared: Sequence[str]) -> dict[str, str]:
    run, config, error = group.parts[0].run, group.parts[0].run.config, group.pixel_error(items)
    cells = {
        "stage": str(group.stage),
        "seeds": " ".join(str(part.run.config["seed"]) for part in group.parts),
        "n": str(len(group.parts)),
        "item": item,
        "categories": str(len(items)),
        "expected": str(len(group.parts[0].expected)) if item == MEAN else "1",
        "pixel_error": "" if error is None else f"{100 * error:.4f}",
        "compared categories": str(len(compared)),
        "float run": " ".join(other.run.name for _, other in group.pairs),
        "milliseconds": f"{run.timing['milliseconds']:.2f}" if run.timing else "",
        "network": run.network,
        "encoder": config["encoder"],
        "input_size": str(config["input_size"]),
        "crop_size": str(config["crop_size"]),
        "metric_size": str(group.metric_size),
        "realiad_json": config["realiad_json"] if "Real-IAD" in run.datasets else "",
        "source": " ".join(str(folder) for part in group.parts for folder in part.run.folders),
    }
    for metric in metrics:
        values = (*_percent(group.average(metric, items)), *_percent(group.difference(metric, compared)))
        cells |= {metric + suffix: value for suffix, value in zip(_SUFFIXES, values, strict=True)}
    for scope in SCOPES if run.cost else ():
        cost = run.cost[scope]
        values = (f"{cost.bytes}", f"{cost.size_ratio:.4f}", f"{cost.equivalent_macs:.0f}", f"{cost.mac_ratio:.4f}")
        cells |= {f"{scope} {name}": value for name, value in zip(_COST_NAMES, values, strict=True)}
    return cells


def _percent(value: Average | None) -> tuple[str, str]:
    """Mean and deviation, empty where they do not exist."""
    if value is None:
        return "", ""
    return f"{100 * value.mean:.4f}", "" if value.deviation is None else f"{100 * value.deviation:.4f}"
