"""Read small files that somebody else may have written: text, JSON, YAML and tables, or one sentence on why not.

Whatever a file holds, these functions return what their docstrings say or raise `DamagedFile`: nothing is executed, and no
size, depth or number in a file can stop the process otherwise.
"""

import csv
import io
import json
import math
import os
import stat
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from common.errors import UserError
from common.schema import Check

LARGEST_TEXT = 200_000_000  # bytes; the largest published index of a data set has a few million
LARGEST_YAML = 200_000  # bytes; settings have a few thousand, and the parser needs seconds for a megabyte
_DEEPEST = 50  # lists and objects in one another; our own files have three


class DamagedFile(UserError):
    """A file that is absent, cannot be read, or does not hold what it should."""


@dataclass(frozen=True)
class Source:
    """A file to read, and the words for it.

    Attributes:
        what: what it is, as a sentence begins with it ("results", "Real-IAD index").
        advice: what to do if it is unusable, the end of a sentence.
    """

    path: Path
    what: str
    advice: str

    def damaged(self, reason: str, place: str = "", problem: str = "damaged") -> DamagedFile:
        """The error to raise: `<what> damaged: <place of> '<path>' <reason>; <advice>`."""
        return DamagedFile(f"{self.what} {problem}: {place}{str(self.path)!r} {reason}; {self.advice}")

    def checked(self, content: Any, check: Check) -> Any:
        """`content` if it passes a check of `common.schema`; raises DamagedFile with what differs."""
        try:
            check(content, "")
        except ValueError as error:
            raise self.damaged(f"does not hold what it should: {error}") from error
        return content


def brief(error: Exception) -> str:
    """What an exception says, as part of a sentence: one line of at most 300 characters, all of which can be printed."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text[:300])


def read_bytes(source: Source, largest: int = LARGEST_TEXT) -> bytes:
    """Content of a regular file; raises DamagedFile if there is none, it cannot be read or it is larger than `largest`."""
    try:
        descriptor = os.open(
            source.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        )  # opening a pipe would wait for its writer
        with open(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise source.damaged("is no regular file", problem="unreadable")
            if found.st_size > largest:
                raise source.damaged(
                    f"has {found.st_size} bytes, the limit is {largest}; is it the right file?", problem="too large"
                )
            return file.read(largest)
    except FileNotFoundError as error:
        raise source.damaged("does not exist", problem="not found") from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise source.damaged(f"cannot be read ({reason})", problem="unreadable") from error


def read_text(source: Source, largest: int = LARGEST_TEXT, any_bytes: bool = False) -> str:
    """Text in UTF-8 without its byte-order mark; raises DamagedFile also for other bytes and an empty file.

    `any_bytes`: bytes that are no UTF-8, as file names may have, become surrogates as Python's own file names do.
    """
    content = read_bytes(source, largest)
    if not content.strip():
        raise source.damaged("is empty")
    try:
        return content.decode("utf-8-sig", "surrogateescape" if any_bytes else "strict")
    except UnicodeDecodeError as error:
        raise source.damaged(f"is no UTF-8 text (byte {error.start})", problem="unreadable") from error


def parse_json(text: str | bytes) -> Any:
    """Content of JSON text.

    Raises:
        ValueError: it is no JSON, has a name twice in one object, a number that is not finite, or is nested too deeply.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_float=_finite, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(content)
    return content


def read_json(source: Source, kind: type = dict) -> Any:
    """Content of a JSON file, of type `kind` (`object` for any); raises DamagedFile if it is not that."""
    try:
        content = parse_json(read_text(source))
    except ValueError as error:
        raise source.damaged(f"is no JSON ({brief(error)})") from error
    if not isinstance(content, kind):
        raise source.damaged(f"must hold {_KINDS[kind]}")
    return content


def read_yaml(source: Source) -> dict[str, Any]:
    """Settings of a YAML file by name; raises DamagedFile if it holds no `name: value` lines, a name twice or an alias."""
    text = read_text(source, LARGEST_YAML)
    try:
        content = yaml.load(text, _PlainLoader)  # noqa: S506 - a safe loader that refuses more
        _check_depth(content)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:  # what tags raise
        reason = "nested too deeply" if isinstance(error, RecursionError) else brief(error)
        raise source.damaged(f"cannot be read as YAML ({reason})") from error
    if content is None:
        raise source.damaged("is empty")
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise source.damaged("is no list of `name: value` lines")
    return content


@dataclass(frozen=True)
class Line:
    """One row of a table: where it ends in the file (from 1, the header is 1), and its cells by column."""

    number: int
    cells: dict[str, str]

    @property
    def place(self) -> str:
        """The line in a sentence of `Source.damaged`."""
        return f"line {self.number} of "

    def number_in(self, source: Source, column: str) -> float:
        """The number in a cell; raises DamagedFile if there is none, or one that is not finite once it is multiplied."""
        try:
            value = float(self.cells[column])
        except ValueError:
            value = math.nan
        if not abs(value) < 1e300:  # finite also once it is multiplied
            raise source.damaged(f"has the {column} {self.cells[column]!r:.50}", self.place)
        return value


def read_table(source: Source, columns: Sequence[str], further: bool = False, own: bool = True) -> tuple[list[str], list[Line]]:
    """Columns and rows of a CSV file.

    Args:
        columns: what its first line begins with, and all of it unless `further`.
        own: whether this program wrote it, with any bytes in file names; one that does not end a line was then cut short.

    Raises:
        DamagedFile: another header, a row with more or fewer cells, a broken quote, or a table cut short.
    """
    text = read_text(source, any_bytes=own)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        cut = "; it is cut short" if own and not text.endswith("\n") else ""
        raise source.damaged(f"is no csv ({brief(error)}{cut})") from error
    if own and not text.endswith("\n"):
        raise source.damaged(f"is cut short in line {rows[-1][0]}")
    names = rows[0][1] if rows else []
    if (names if not further else names[: len(columns)]) != list(columns) or len(set(names)) < len(names):
        raise source.damaged(f"has unknown columns in line 1; it must begin with the line {','.join(columns)}")
    for number, cells in rows[1:]:
        if len(cells) != len(names):
            raise source.damaged(f"has {len(cells)} of {len(names)} cells", Line(number, {}).place)
    return names, [Line(number, dict(zip(names, cells, strict=True))) for number, cells in rows[1:]]


_KINDS = {dict: "an object", list: "a list"}


def _unique(pairs: list[tuple[Hashable, Any]]) -> dict:
    """The object of these pairs; raises ValueError for a name that is there twice, of which one would be ignored."""
    content = dict(pairs)
    if len(content) < len(pairs):
        _refuse_repeated(name for name, _ in pairs)
    return content


def _refuse_repeated(names: Iterable[Hashable]) -> NoReturn:
    seen: set[Hashable] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"{name!r} is there twice")
        seen.add(name)
    raise AssertionError("no name is there twice")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _check_depth(content: object) -> None:
    """Raise ValueError for content that functions which call themselves could not walk."""
    level, depth = [content], 0
    while level:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
        level = [child for each in level for child in _children(each)]


def _children(content: object) -> Iterable[object]:
    if isinstance(content, dict):
        return (value for value in content.values() if isinstance(value, dict | list))
    return (value for value in content if isinstance(value, dict | list)) if isinstance(content, list) else ()


class _PlainLoader(yaml.SafeLoader):
    """Plain values only: an alias could make a short file enormous, a repeated name hides a setting."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("it has an alias (*name); write the value itself")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        pairs = [(self.construct_object(key, deep=True), value) for key, value in node.value]
        if len({key for key, _ in pairs if isinstance(key, Hashable)}) < len(pairs):
            names = [key for key, _ in pairs]
            if all(isinstance(name, Hashable) for name in names):
                _refuse_repeated(names)
        return super().construct_mapping(node, deep=deep)
