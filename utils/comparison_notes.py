"""What a reader must know about a table of results: sentences below it."""

from datasets.catalog import ListingOptions
from utils.comparison import Section
from utils.published import PublishedRow
from utils.report import points_at_most

FEWER_MARK = "†"
_PAPERS_SPLIT = ListingOptions().realiad_json
# what the authors' published pixel metrics come from, where it is not what ours do
_PUBLISHED_PROTOCOLS = {
    "INP-Former": "P-AP and P-F1 of masks > 0",
    "Dinomaly": "pixel metrics of masks > 0, AUPRO of 200 thresholds (biased low)",
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
    notes += [*pixel_error_notes(section), *_mask_notes(section)]
    return [*notes, *_setup_notes(section, others), *_split_notes(section)] if others else notes


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
    labels: dict[float, list[str]] = {}
    for label, group in section.labelled_groups:
        labels.setdefault(group.parts[0].run.config["mask_threshold"], []).append(label)
    if len(labels) == 1:
        return []
    rules = "; ".join(f"mask > {threshold:g}: {', '.join(labels[threshold])}" for threshold in sorted(labels))
    return [f"Pixel metrics are not comparable between rows that count other pixels as defect: {rules}."]


def _setup_notes(section: Section, others: list[PublishedRow]) -> list[str]:
    """What the published rows were measured with, and which of our runs have another encoder or other sizes."""
    setups = [(row.encoder, row.input_size, row.crop_size) for row in others if row.encoder and row.input_size]
    if not setups:
        return []
    encoder, size, crop = setups[0]  # the file begins with the paper's own rows; larger and smaller networks say so
    protocols = [
        f"{method}: {protocol}"
        for method, protocol in _PUBLISHED_PROTOCOLS.items()
        if any(row.kind == "published" and row.method.split(",")[0] == method for row in others)
    ]
    notes = [f"{'; '.join([f'Published: {encoder} at {size}/{crop} px unless the name says otherwise', *protocols])}."]
    for label, group in section.labelled_groups:
        config = group.parts[0].run.config
        ours = (config["encoder"], str(config["input_size"]), str(config["crop_size"]))
        if ours != setups[0]:
            notes.append(f"{label} differs from the published rows: {ours[0]} at {ours[1]}/{ours[2]} px.")
    return notes


def _split_notes(section: Section) -> list[str]:
    """Which of our runs saw another split of Real-IAD than the published rows."""
    splits = [(label, group.parts[0].run) for label, group in section.labelled_groups]
    return [
        f"{label} is not comparable with the published rows: split {run.config['realiad_json']} of Real-IAD, theirs is "
        f"{_PAPERS_SPLIT}."
        for label, run in splits
        if "Real-IAD" in run.datasets and run.config["realiad_json"] != _PAPERS_SPLIT
    ]
