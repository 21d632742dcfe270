"""Decode every image and mask of a data set and say what is wrong with it.

python -m scripts.check_dataset --dataset MVTec-AD --data_path ./datasets/mvtec
python -m scripts.check_dataset --dataset Folder --data_path my_parts --item bracket
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from common.errors import UserError
from datasets.catalog import LAYOUTS, choose_items, data_root
from datasets.check import mask_faults, shared_images, undecodable
from utils.arguments import add_data_arguments
from utils.command import run_command
from utils.tables import format_rows


@dataclass
class Finding:
    """What was found in one category: counts, errors that would stop a run, warnings that would not."""

    item: str
    counts: tuple[int, int, int] = (0, 0, 0)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_category(dataset: str, root, item: str, max_pixels: int, allow_missing_masks: bool) -> Finding:
    """Read one category completely."""
    finding, layout = Finding(item), LAYOUTS[dataset]
    try:
        train, test = layout.train(root, item), layout.test(root, item, allow_missing_masks)
    except UserError as error:
        finding.errors.append(str(error))
        return finding
    defective = sum(record.label for record in test)
    finding.counts = (len(train), len(test) - defective, defective)
    bad = undecodable(tqdm([*train, *test], desc=item, unit="image", disable=None), max_pixels)
    finding.errors += [reason for _, reason in bad]
    broken = {record for record, _ in bad}
    for record in test:
        if record not in broken:
            errors, warnings = mask_faults(record, max_pixels)
            finding.errors += errors
            finding.warnings += warnings
    finding.warnings += [
        f"the same image is in train and test: {str(trained)!r} and {str(tested)!r}"
        for trained, tested in shared_images(train, test)
    ]
    published = layout.published_counts.get(item)
    if published and published != finding.counts:
        finding.warnings.append(f"counts differ from the published ones {published}")
    return finding


def show(dataset: str, findings: list[Finding]) -> None:
    """Print the table of counts, then every finding."""
    rows = [("item", "train", "test good", "test defective", "published", "errors", "warnings")]
    for finding in findings:
        published = LAYOUTS[dataset].published_counts.get(finding.item)
        comparison = "-" if published is None else "same" if published == finding.counts else "/".join(map(str, published))
        cells = (*finding.counts, comparison, len(finding.errors), len(finding.warnings))
        rows.append((finding.item, *map(str, cells)))
    print(format_rows(rows))
    for finding in findings:
        for kind, sentences in (("error", finding.errors), ("warning", finding.warnings)):
            for sentence in sentences:
                print(f"{kind}: {finding.item}: {sentence}")


def check(arguments: argparse.Namespace) -> int:
    """Check all wanted categories; exit code 2 if any has an error."""
    root = data_root(arguments.dataset, arguments.data_path)
    findings = [
        check_category(arguments.dataset, root, item, arguments.max_pixels, arguments.allow_missing_masks)
        for item in choose_items(arguments.dataset, root, arguments.item)
    ]
    show(arguments.dataset, findings)
    return 2 if any(finding.errors for finding in findings) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_arguments(parser.add_argument_group("data"))
    return run_command(parser, argv, check)


if __name__ == "__main__":
    sys.exit(main())
