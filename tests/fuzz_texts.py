"""Mutations of JSON, YAML, CSV and other texts, by their structure."""

import csv
import io
import json
import math
import random

import yaml

from tests.fuzz_bytes import Source


def evil_value(source: Source, draw: random.Random) -> object:
    """What nobody would write where a number or a name belongs."""
    return draw.choice(
        [
            None, True, False, 0, -1, 1, 2, 1.5, -0.5, 1e308, 10**400, 2**63, -(2**31), math.nan, math.inf, -math.inf,
            "", " ", "NaN", "x" * 100_000, "../" * 8 + "etc/passwd", f"../outside/{source.outside.name}", str(source.outside),
            "=cmd|'/c calc'!A0", "a\nb", "\x1b[31mred", "\0", "\ud800", "\N{RIGHT-TO-LEFT OVERRIDE}gnp", "None", "[]",
            [], {}, [[]], [None], {"a": 1}, ["x"] * 1000, deep(60),
        ]
    )  # fmt: skip


def deep(depth: int) -> list:
    """A list in a list in a list."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def places(tree: object) -> list[tuple[object, object]]:
    """(container, key) of every value in nested dicts and lists."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def copied(tree: object) -> object:
    """Other dicts and lists with the very same leaves."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    return [copied(value) for value in tree] if isinstance(tree, list) else tree


def change_tree(tree: object, evil: object, draw: random.Random) -> object:
    """A copy of nested dicts and lists with one thing changed: a value, its key, its place or its number."""
    tree = copied(tree)
    found = places(tree)
    if not found or draw.random() < 0.03:
        return evil
    node, key = draw.choice(found)
    kind = draw.choice(["value", "value", "value", "number", "number", "delete", "rename", "copy", "swap", "nest"])
    value = node[key]
    if kind == "number" and isinstance(value, (int, float)):
        node[key] = draw.choice([-value, value + 1, value * 1000, float(value), str(value), not value])
    elif kind == "delete":
        del node[key]
    elif kind == "rename" and isinstance(node, dict):
        node[draw.choice([f"{key}x", "", "x" * 5000, "a\nb"])] = node.pop(key)
    elif kind == "copy" and isinstance(node, list):
        node.insert(key, value)
    elif kind == "swap":
        other, place = draw.choice(found)
        node[key], other[place] = other[place], value
        if _has_cycle(tree):
            node[key], other[place] = value, node[key]
            node[key] = evil
    elif kind == "nest":
        node[key] = draw.choice([[value], {"value": value}])
    else:
        node[key] = evil
    return tree


def _has_cycle(tree: object, above: tuple[int, ...] = ()) -> bool:
    if not isinstance(tree, (dict, list)):
        return False
    if id(tree) in above or len(above) > 90:
        return True
    return any(_has_cycle(value, (*above, id(tree))) for value in (tree.values() if isinstance(tree, dict) else tree))


def json_tree(source: Source, draw: random.Random) -> bytes:
    return json.dumps(change_tree(json.loads(source.content), evil_value(source, draw), draw)).encode()


def json_text(source: Source, draw: random.Random) -> bytes:
    """What is no JSON, hardly JSON, or JSON that a parser chokes on."""
    content = source.content
    return draw.choice(
        [
            b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"", b"null",
            b"[]", b"{}",
            b"1" * 5000, b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), content + b"\0", content + content,
            content.replace(b'"', b"'"), content.replace(b"\n", b"\r"), b"<html>404 Not Found</html>",
            content.replace(b",", b",,", 1),
        ]
    )  # fmt: skip


def json_line(source: Source, draw: random.Random) -> bytes:
    """One line of several JSON lines changed."""
    lines = source.content.splitlines()
    place = draw.randrange(len(lines))
    change = draw.choice([json_tree, json_tree, json_text])
    lines[place] = change(Source(lines[place], source.other, source.marker, source.outside), draw)
    return b"\n".join(lines) + b"\n"


def yaml_tree(source: Source, draw: random.Random) -> bytes:
    evil = evil_value(source, draw)
    evil = "x" if isinstance(evil, str) and "\ud800" in evil else evil  # no YAML can hold it
    tree = change_tree(yaml.safe_load(source.content), evil, draw)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode()


def yaml_text(source: Source, draw: random.Random) -> bytes:
    """Tags that would run code, names that expand, kinds of values that only YAML has."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    key, _, rest = source.content.partition(b":")
    first = key.decode("utf-8", "replace")
    value = draw.choice(
        [
            f"!!python/object/apply:os.system ['touch {source.marker}']",
            f"!!python/object/apply:builtins.open ['{source.marker}', 'w']",
            "!!python/name:os.system", "2020-01-01", "2020-01-01 10:00:00", "!!binary aGVsbG8=", "!!set {a, b}",
            "!!omap [a: 1]", ".inf", ".nan", "0x1F", "1_000", "12:30:45", "on", "~", "|\n  a\n  b", "&a [*a]",
            "!unknown x", "'\\x1b[31m'", "*missing",
        ]
    )  # fmt: skip
    changed = f"{first}: {value}\n".encode() + rest.partition(b"\n")[2]
    others = (
        bomb.encode(),
        b"\t" + source.content,
        b"---\n---\n",
        b"[" * 5000,
        b"{a: " * 3000,
        b"? [a, b]\n: 1\n" + source.content,
    )
    return draw.choice([changed, changed, changed, source.content + b"1: 2\n", *others])


def csv_cells(source: Source, draw: random.Random) -> bytes:
    """A cell, a row, a column or the heads of columns changed."""
    rows = list(csv.reader(io.StringIO(source.content.decode())))
    row = draw.randrange(len(rows))
    column = draw.randrange(len(rows[row])) if rows[row] else 0
    kind = draw.choice(
        ["cell"] * 6 + ["delete column", "copy column", "delete row", "copy row", "rename", "shorten", "lengthen"]
    )
    evil = evil_value(source, draw)
    text = evil if isinstance(evil, str) else "" if evil is None else str(evil).title()  # NaN, so that nan is of a format
    if kind == "cell" and rows[row]:
        rows[row][column] = text
    elif kind == "delete column":
        rows = [[cell for place, cell in enumerate(cells) if place != column] for cells in rows]
    elif kind == "copy column":
        rows = [[*cells, *cells[column : column + 1]] for cells in rows]
    elif kind == "delete row":
        del rows[row]
    elif kind == "copy row":
        rows.insert(row, rows[row])
    elif kind == "rename" and rows[0]:
        rows[0][draw.randrange(len(rows[0]))] = text
    elif kind == "shorten":
        rows[row] = rows[row][:column]
    else:
        rows[row] = [*rows[row], text]
    written = io.StringIO()
    csv.writer(written, lineterminator=draw.choice(["\n", "\n", "\r\n"])).writerows(rows)
    return written.getvalue().encode("utf-8", "surrogatepass")


def csv_text(source: Source, draw: random.Random) -> bytes:
    content = source.content
    wide = content.replace(b"\n", b"," + b"y" * 200_000 + b"\n", 1)
    return draw.choice(
        [content.replace(b"\n", b"\r"), b'"' + content, content + b'"', content.decode().encode("utf-16"), b"", b"\n",
         b"\n\n\n",
         b"\xef\xbb\xbf" + content, content.replace(b",", b";"), content.rstrip(b"\n"), content + b"\xff\xfe\n", wide,
         content.replace(b",", b"\0,", 1), b"<html>404 Not Found</html>\n"]
    )  # fmt: skip


def line_words(source: Source, draw: random.Random) -> bytes:
    """A word of a text replaced, or a line moved, removed, repeated."""
    lines = [line.split(" ") for line in source.content.decode().split("\n")]
    line = draw.randrange(len(lines))
    evil = evil_value(source, draw)
    kind = draw.choice(["word"] * 4 + ["delete", "copy", "empty"])
    if kind == "word":
        lines[line][draw.randrange(len(lines[line]))] = evil if isinstance(evil, str) else str(evil)
    elif kind == "delete":
        del lines[line]
    else:
        lines.insert(line, lines[line] if kind == "copy" else [])
    return "\n".join(map(" ".join, lines)).encode("utf-8", "surrogatepass")
