"""What a reader must know about a table of results: sentences below it."""

from collections.abc import Sequence

from datasets.catalog import ListingOptions
from models.build import patch_size_of
from utils.comparison import Group, Section
from utils.published import MEAN, PublishedRow
from utils.report import points_at_most

FEWER_MARK = "†"
_PAPERS_SPLIT = ListingOptions().realiad_json
# what the authors' published pixel metrics come from, where it is not what ours do
_PUBLISHED_PROTOCOLS = {
    "INP-Former": "P-AP and P-F1 of masks > 0",
    "Dinomaly": "pixel metrics of masks > 0, AUPRO of 200 thresholds (biased low)",
    "VarAD": "maps at the images' size, image score their maximum, epoch chosen by pixel AUROC on the test images",
    "RAAD": "size of the maps and rule of the image score not stated",
}


def result_notes(section: Section, others: list[PublishedRow]) -> list[str]:
    """How to read the table, what its means leave out, and what is not comparable; `others` are its published rows."""
    notes = [
        "Percent. Kind: published by authors, reproduced by a reader with the authors' code, ours. In brackets: difference to "
        "the float run of the same network, data, batch, precision, seed, encoder, sizes and protocol, over categories of both."
    ]
    if any(len(group.items) < len(group.parts[0].expected) for group in section.groups):
        notes.append(f"{FEWER_MARK} Mean over fewer categories than the full data set: not comparable with means over all.")
    for label, group in section.labelled_groups:
        if any(len(part.rows) > len(group.items) for part in group.parts):
            notes.append(f"{label}: its seeds have different categories; the mean is over those that all have, see the CSV.")
    names = [
        name for name in section.metrics if any(row.get(name) is None for part in section.parts for row in part.rows.values())
    ]
    if names:
        notes.append(f"Left out of a mean where a category does not define it: {', '.join(names)}.")
    notes += [*pixel_error_notes(section), *_mask_notes(section), *_interpolation_notes(section)]
    if not others:
        return notes
    return [*notes, *_setup_notes(section, others), *_split_notes(section), *published_notes(others)]


def published_notes(rows: Sequence[PublishedRow]) -> list[str]:
    """What is wrong with published numbers, or not stated about them."""
    return [f"{_place(row)}: {row.note}." for row in rows if row.note]


def _place(row: PublishedRow) -> str:
    return row.method if row.item == MEAN else f"{row.method} on {row.item}"


def pixel_error_notes(section: Section) -> list[str]:
    """Which of our rows have pixel metrics that are not exact."""
    notes = []
    for label, group in section.labelled_groups:
        error = group.pixel_error(group.items)
        if error is not None:
            count = sum(group.pixel_error([item]) is not None for item in group.items)
            notes.append(
                f"{label}: pixel metrics of {count} of {len(group.items)} categories come from bins, off by at most "
                f"{points_at_most(error)} points."
            )
    return notes


def _mask_notes(section: Section) -> list[str]:
    """Which of our rows take which pixels for defective, if they differ in it."""
    rules = _rows_by(section, "mask_threshold", "mask > {:g}")
    return [f"Pixel metrics are not comparable between rows that count other pixels as defect: {rules}."] if rules else []


def _interpolation_notes(section: Section) -> list[str]:
    """Which of our rows saw images that were resized in which way, if they differ in it."""
    rules = _rows_by(section, "interpolation", "{}")
    return [f"The images of these rows were resized otherwise: {rules}."] if rules else []


def _rows_by(section: Section, key: str, form: str) -> str:
    """The values of a flag, each with the rows that have it; nothing if all have the same."""
    labels: dict[float | str, list[str]] = {}
    for label, group in section.labelled_groups:
        labels.setdefault(group.parts[0].run.config[key], []).append(label)
    if len(labels) == 1:
        return ""
    return "; ".join(f"{form.format(value)}: {', '.join(labels[value])}" for value in sorted(labels))


def _setup_notes(section: Section, others: list[PublishedRow]) -> list[str]:
    """What the published rows were measured with, and which of our runs have another encoder or other sizes.

    Rows on maps of different sizes are no reference for each other: each of our runs is compared with those of its size.
    """
    by_size: dict[tuple[int, str], list[PublishedRow]] = {}
    for row in others:
        by_size.setdefault((row.metric_size, row.host), []).append(row)
    notes = []
    for (size, host), rows in by_size.items():
        where = f" on maps of {f'{size} px' if size else 'the size of the images'}" if len(by_size) > 1 else ""
        groups = [
            (label, group) for label, group in section.labelled_groups if group.metric_size == size and host in ("", group.host)
        ]
        notes += _setup_notes_of(rows, groups, f"Published{where}")
    if len(by_size) > 1:
        notes.append("Published rows on maps of different sizes are not comparable, nor is a run with those of another size.")
    return notes


def _setup_notes_of(rows: Sequence[PublishedRow], groups: Sequence[tuple[str, Group]], title: str) -> list[str]:
    setups = [row for row in rows if row.encoder and row.input_size]
    if not setups:
        return []
    first = setups[0]  # the file begins with the paper's own rows; larger and smaller networks say so
    sizes = "/".join(size for size in (first.input_size, first.crop_size) if size)
    protocols = [
        f"{method}: {protocol}"
        for method, protocol in _PUBLISHED_PROTOCOLS.items()
        if any(row.kind == "published" and _method_of(row) == method for row in rows)
    ]
    notes = [f"{'; '.join([f'{title}: {first.encoder} at {sizes} px unless the name says otherwise', *protocols])}."]
    for label, group in groups:
        config = group.parts[0].run.config
        own = [row for row in setups if _method_of(row) == group.host]
        if not any(_has_setup_of(row, config) for row in (first, *own)):
            sizes = f"{config['input_size']}/{config['crop_size']}"
            notes.append(f"{label} differs from the published rows: {config['encoder']} at {sizes} px.")
    return notes


def _method_of(row: PublishedRow) -> str:
    """Its method without what it says about the network."""
    return row.method.split(",")[0]


def _has_setup_of(row: PublishedRow, config: dict) -> bool:
    """Whether a run has the encoder and the sizes of a published row; without a crop its images end at whole patches."""
    if row.encoder != config["encoder"]:
        return False
    patch, size = patch_size_of(row.encoder), int(row.input_size)
    expected = (size, int(row.crop_size)) if row.crop_size else (size // patch * patch,) * 2
    return (config["input_size"], config["crop_size"]) == expected


def _split_notes(section: Section) -> list[str]:
    """Which of our runs saw another split of Real-IAD than the published rows."""
    splits = [(label, group.parts[0].run) for label, group in section.labelled_groups]
    return [
        f"{label} is not comparable with the published rows: split {run.config['realiad_json']} of Real-IAD, theirs is "
        f"{_PAPERS_SPLIT}."
        for label, run in splits
        if "Real-IAD" in run.datasets and run.config["realiad_json"] != _PAPERS_SPLIT
    ]
