"""What all layouts share: how a listing is asked for, and how names and files from elsewhere are kept harmless."""

import os
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from common.errors import UserError
from common.readers import Source
from datasets.records import Record

_NAMED = 10


def refuse(sentence: str) -> None:
    """Raise UserError with the sentence."""
    raise UserError(sentence)


@dataclass(frozen=True)
class ListingOptions:
    """How to read a data set.

    Attributes:
        allow_missing_masks: defective images without a mask are listed without one.
        realiad_json: json folder of Real-IAD.
        on_fault: called with a sentence for every fault after which listing could go on, as `scripts.check_dataset` wants
            it; the default raises UserError.
    """

    allow_missing_masks: bool = False
    realiad_json: str = "realiad_jsons"
    on_fault: Callable[[str], None] = refuse


DEFAULT_OPTIONS = ListingOptions()


def enumerated(names: Iterable) -> str:
    """The first ten names and dots for the others, quoted."""
    names = list(names)
    return ", ".join(repr(str(name)) for name in names[:_NAMED]) + (" ..." if len(names) > _NAMED else "")


def leaves_folder(name: str) -> bool:
    """True for a relative path that could point out of the folder it is joined to, on any system; symbolic links are not followed."""
    path = PureWindowsPath(name)  # knows both kinds of slashes
    return bool(path.drive or path.root) or ".." in path.parts


def has_control_characters(name: str) -> bool:
    """True for a name with line ends or escape sequences, which could forge lines of a log."""
    return any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name)


def joined(folder: Path, name: str, where: str) -> Path:
    """`folder / name`, for a name read from the file or line `where`; raises UserError if it is absolute, has `..` or is none."""
    if leaves_folder(name):
        raise UserError(
            f"path refused: {where} points outside the data set: {name!r:.200}; it must be relative to {str(folder)!r}"
        )
    try:
        possible = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        raise UserError(f"path refused: {where} has {name!r:.200}, which no file can be called; download it again")
    return folder / name


class Inside:
    """Whether files lie below one of some folders after all symbolic links are followed; remembers the folders between."""

    def __init__(self, *folders: Path):
        self._roots = [os.path.realpath(folder) for folder in folders]
        self._parents: dict[str, str] = {}

    def holds(self, path: Path) -> bool:
        """True for a path below a folder, whether or not there is such a file."""
        parent, name = os.path.split(path)
        if parent not in self._parents:
            self._parents[parent] = os.path.realpath(parent)
        found = os.path.join(self._parents[parent], name)
        if os.path.islink(found):
            found = os.path.realpath(found)
        return any(os.path.commonpath([root, found]) == root for root in self._roots)


def index_source(path: Path, what: str) -> Source:
    """A file that came with a data set, to be read."""
    return Source(path, what, "download it again or correct --data_path")


def defective_record(image: Path, mask: Path | None, item: str, kind: str) -> Record:
    """Record of a defective image that an index names with its mask, which may be missing."""
    return Record(image, 1, item, (mask,) if mask is not None and os.path.isfile(mask) else (), kind)


def report_unmasked(records: list[Record], images: str, options: ListingOptions) -> None:
    """Tell `options.on_fault` of the defective ones among `images` (words for them) without a mask, unless that is allowed."""
    unmasked = [record.path for record in records if not record.has_pixel_truth]
    if unmasked and not options.allow_missing_masks:
        options.on_fault(
            f"{len(unmasked)} defective {images} have no mask: {enumerated(unmasked)}; add them or give "
            "--allow_missing_masks (pixel metrics on the rest)"
        )
