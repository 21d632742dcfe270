"""Decode every image and mask of a data set and say what is wrong with it.

python -m scripts.check_dataset --dataset MVTec-AD --data_path ./datasets/mvtec
python -m scripts.check_dataset --dataset MVTec-AD+VisA --data_path ./datasets/mvtec ./datasets/VisA_pytorch/1cls
python -m scripts.check_dataset --dataset Folder --data_path my_parts --item bracket

Errors would stop a training or spoil its results, warnings would not. Exit code 2 with errors, 0 otherwise.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.pool import ThreadPool

from common.errors import UserError
from common.progress import ProgressBar
from datasets.catalog import DataSource, ListingOptions, choose_items, data_sources, label_of
from datasets.check import record_faults, shared_images
from datasets.layouts import Lister
from datasets.listing import enumerated
from datasets.records import Record
from utils.arguments import add_data_arguments, listing_options
from utils.command import run_command
from utils.loading import default_worker_count
from utils.parser import tool_parser
from utils.tables import format_rows

HEADER = ("item", "train", "test good", "test defective", "validation", "images", "published", "errors", "warnings")


@dataclass
class Finding:
    """What was found in one category or, without a row of its own, in a data set.

    Attributes:
        counts: train, test good, test defective and, in data sets that have it, validation.
        published: what `counts` should be, where published.
    """

    item: str
    counts: tuple[int, ...] = (0, 0, 0)
    published: tuple[int, ...] | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def compare_counts(self) -> None:
        """Warn if the counts are not the published ones."""
        if self.published is not None and self.published != self.counts:
            self.warnings.append(f"counts differ from the published ones {self.published}")

    def row(self) -> tuple[str, ...]:
        """Cells of the table."""
        validation = str(self.counts[3]) if len(self.counts) > 3 else "-"
        same = "same" if self.published == self.counts else "/".join(map(str, self.published or ("-",)))
        numbers = (*self.counts[:3], validation, sum(self.counts), same, len(self.errors), len(self.warnings))
        return (self.item, *map(str, numbers))


def listed(lister: Lister | None, source: DataSource, item: str, options: ListingOptions) -> list[Record]:
    """Records of one part; what ends the listing is one more fault."""
    try:
        return lister(source.root, item, options) if lister else []
    except UserError as error:
        options.on_fault(str(error))
        return []


def check_category(source: DataSource, item: str, label: str, options: ListingOptions, max_pixels: int) -> Finding:
    """Read one category completely; images are decoded one after another per thread, so memory does not grow."""
    layout, finding = source.layout, Finding(label)
    options = replace(options, on_fault=finding.errors.append)
    train, test, validation = (listed(part, source, item, options) for part in (layout.train, layout.test, layout.validation))
    defective = sum(record.label for record in test)
    finding.counts = (len(train), len(test) - defective, defective, *([len(validation)] if layout.validation else []))
    finding.published = published_counts(source, item)
    examine(source, [*train, *test, *validation], finding, max_pixels)
    finding.warnings += [
        f"the same image is in train and test: {str(trained)!r} and {str(tested)!r}"
        for trained, tested in shared_images(train, ProgressBar(test, desc=f"{label}: copies", unit="image", disable=None))
    ]
    strays = layout.stray_masks(source.root, item, options) if layout.stray_masks and test else []
    if strays:
        finding.warnings.append(f"{len(strays)} masks or folders of masks belong to no defective image: {enumerated(strays)}")
    finding.compare_counts()
    finding.errors = list(dict.fromkeys(finding.errors))  # one damaged index is met by training and test
    return finding


def examine(source: DataSource, records: list[Record], finding: Finding, max_pixels: int) -> None:
    """Decode all files of the records and note what is wrong with them."""
    regions = source.layout.defect_regions
    with ThreadPool(default_worker_count()) as threads:
        results = threads.imap(partial(record_faults, max_pixels=max_pixels), records)
        bar = ProgressBar(results, total=len(records), desc=finding.item, unit="image", disable=None)
        for record, (errors, warnings) in zip(records, bar, strict=True):
            finding.errors += errors
            finding.warnings += warnings
            if regions and not errors:
                try:
                    regions(record, max_pixels)
                except UserError as error:
                    finding.errors.append(str(error))


def published_counts(source: DataSource, item: str) -> tuple[int, ...] | None:
    """Published numbers of a category in the order of `Finding.counts`, if there are any."""
    layout = source.layout
    if item not in layout.published_counts:
        return None
    return (*layout.published_counts[item], *([layout.published_validation[item]] if layout.published_validation else []))


def total(source: DataSource, findings: list[Finding], options: ListingOptions) -> Finding:
    """Sums over all categories of a data set."""
    layout = source.layout
    published = layout.published_total
    if source.dataset == "Real-IAD" and options.realiad_json != ListingOptions().realiad_json:
        published = None  # the other json folders are other splits
    if published is not None and layout.published_validation:
        published = (*published, sum(layout.published_validation.values()))
    counts = tuple(sum(column) for column in zip(*(finding.counts for finding in findings), strict=True))
    finding = Finding(f"{source.dataset} (total)", counts, published)
    finding.compare_counts()
    return finding


def check(arguments: argparse.Namespace) -> int:
    """Check all wanted categories; exit code 2 if any has an error."""
    sources, options = data_sources(arguments.dataset, arguments.data_path), listing_options(arguments)
    chosen = choose_items(sources, arguments.item)
    findings = []
    for source in sources:
        items = [item for owner, item in chosen if owner == source]
        part = [check_category(source, item, label_of(sources, source, item), options, arguments.max_pixels) for item in items]
        findings += part
        if len(part) > 1 and items == source.layout.categories(source.root):
            findings.append(total(source, part, options))
    print(format_rows([HEADER, *(finding.row() for finding in findings)]))
    for finding in findings:
        for kind, sentences in (("error", finding.errors), ("warning", finding.warnings)):
            for sentence in sentences:
                print(f"{kind}: {finding.item}: {sentence}")
    return 2 if any(finding.errors for finding in findings) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    add_data_arguments(parser.add_argument_group("data"))
    return run_command(parser, argv, check)


if __name__ == "__main__":
    sys.exit(main())
