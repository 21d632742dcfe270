"""Mutations of files: of bytes, and of what JSON, YAML, CSV, zip, safetensors, .npy and PNG files are made of."""

import copy
import csv
import io
import json
import math
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from tests.test_packed import rewritten
from utils.checkpoint import save_checkpoint

INTERESTING = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


@dataclass(frozen=True)
class Source:
    """A valid file and another one of its kind; `marker` is what an attack makes, `outside` a file that must not be read."""

    content: bytes
    other: bytes
    marker: Path
    outside: Path


Change = Callable[[Source, random.Random], bytes]


@dataclass(frozen=True)
class Mutation:
    """A way to change a file; a `forged` one has the right hash, so that it is valid if it makes sense."""

    name: str
    change: Change
    forged: bool = False


def _place(content: bytes, draw: random.Random) -> int:
    """Any place, but more often near the ends, where headers and directories are."""
    if not content:
        return 0
    near = min(len(content), 400)
    return draw.choice([draw.randrange(len(content)), draw.randrange(near), len(content) - 1 - draw.randrange(near)])


def _block(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = _place(content, draw)
    return start, min(len(content), start + draw.choice([1, 2, 4, 8, 16, 64, 512, 4096]))


def _replaced(content: bytes, start: int, stop: int, by: bytes) -> bytes:
    return content[:start] + by + content[stop:]


def flip_bit(source: Source, draw: random.Random) -> bytes:
    place = _place(source.content, draw)
    return _replaced(source.content, place, place + 1, bytes([source.content[place] ^ 1 << draw.randrange(8)]))


def change_byte(source: Source, draw: random.Random) -> bytes:
    place = _place(source.content, draw)
    return _replaced(source.content, place, place + 1, bytes([draw.randrange(256)]))


def truncate(source: Source, draw: random.Random) -> bytes:
    return source.content[: draw.choice([0, 1, _place(source.content, draw), len(source.content) - 1])]


def extend(source: Source, draw: random.Random) -> bytes:
    return source.content + draw.choice([b"\0", b"\n", b"x" * 1000, bytes(70_000), source.content, draw.randbytes(64)])


def insert(source: Source, draw: random.Random) -> bytes:
    place = _place(source.content, draw)
    return _replaced(source.content, place, place, draw.randbytes(draw.choice([1, 2, 7, 100])))


def delete(source: Source, draw: random.Random) -> bytes:
    return _replaced(source.content, *_block(source.content, draw), b"")


def duplicate_block(source: Source, draw: random.Random) -> bytes:
    start, stop = _block(source.content, draw)
    return _replaced(source.content, stop, stop, source.content[start:stop])


def zero_block(source: Source, draw: random.Random) -> bytes:
    start, stop = _block(source.content, draw)
    return _replaced(source.content, start, stop, bytes(stop - start))


def swap_blocks(source: Source, draw: random.Random) -> bytes:
    content = source.content
    (a, b), (c, d) = sorted([_block(content, draw), _block(content, draw)])
    if b > c:
        return _replaced(content, a, d, content[c:d] + content[a:c])
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def interesting_integer(source: Source, draw: random.Random) -> bytes:
    place, size = _place(source.content, draw), draw.choice([1, 2, 4, 8])
    number = (draw.choice(INTERESTING) % 2 ** (8 * size)).to_bytes(size, draw.choice(["little", "big"]))
    return _replaced(source.content, place, place + size, number)


def splice(source: Source, draw: random.Random) -> bytes:
    other = source.other
    if draw.random() < 0.5:
        place = _place(source.content[: len(other)], draw)
        return source.content[:place] + other[place:]
    (start, stop), place = _block(other, draw), _place(source.content, draw)
    return _replaced(source.content, place, place + stop - start, other[start:stop])


BYTES = [
    flip_bit, change_byte, truncate, extend, insert, delete, duplicate_block, zero_block, swap_blocks, interesting_integer, splice,
]  # fmt: skip


# ---- nested values


def evil_value(source: Source, draw: random.Random) -> object:
    """What nobody would write where a number or a name belongs."""
    return draw.choice(
        [
            None, True, False, 0, -1, 1, 2, 1.5, -0.5, 1e308, 10**400, 2**63, -(2**31), math.nan, math.inf, -math.inf,
            "", " ", "nan", "x" * 100_000, "../" * 8 + "etc/passwd", f"../outside/{source.outside.name}", str(source.outside),
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


def _places(tree: object) -> list[tuple[object, object]]:
    """(container, key) of every value in nested dicts and lists."""
    found, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            waiting.append(node[key])
    return found


def change_tree(tree: object, evil: object, draw: random.Random) -> object:
    """A copy of nested dicts and lists with one thing changed: a value, its key, its place or its number."""
    tree = copy.deepcopy(tree)
    places = _places(tree)
    if not places or draw.random() < 0.03:
        return evil
    node, key = draw.choice(places)
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
        other, place = draw.choice(places)
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
            b"[" * 100_000, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"", b"null", b"[]", b"{}",
            b"1" * 5000, b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), content + b"\0", content + content,
            content.replace(b'"', b"'"), content.replace(b"\n", b"\r"), b"<html>404 Not Found</html>", content.replace(b",", b",,", 1),
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
            f"!!python/object/apply:os.system ['touch {source.marker}']", f"!!python/object/apply:builtins.open ['{source.marker}', 'w']",
            "!!python/name:os.system", "2020-01-01", "2020-01-01 10:00:00", "!!binary aGVsbG8=", "!!set {a, b}", "!!omap [a: 1]",
            ".inf", ".nan", "0x1F", "1_000", "12:30:45", "on", "~", "|\n  a\n  b", "&a [*a]", "!unknown x", "'\\x1b[31m'", "*missing",
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
    text = evil if isinstance(evil, str) else "" if evil is None else str(evil)
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
        [content.replace(b"\n", b"\r"), b'"' + content, content + b'"', content.decode().encode("utf-16"), b"", b"\n", b"\n\n\n",
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


# ---- torch files


class Attack:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def _entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return stream.getvalue()


def zip_entry(source: Source, draw: random.Random) -> bytes:
    """Bytes of an entry changed and packed again, so that its checksum is right."""
    entries = _entries(source.content)
    name = draw.choice([name for name, content in entries.items() if content])
    change = draw.choice(BYTES[:-1])
    return _zipped({**entries, name: change(Source(entries[name], b"", source.marker, source.outside), draw)})


def zip_entries(source: Source, draw: random.Random) -> bytes:
    """Entries missing, under other names, swapped, compressed or too many."""
    entries = _entries(source.content)
    one, other = draw.choice(list(entries)), draw.choice(list(entries))
    root = next(iter(entries)).split("/")[0]
    return draw.choice(
        [
            lambda: _zipped({name: content for name, content in entries.items() if name != one}),
            lambda: _zipped({name if name != one else f"{name}x": content for name, content in entries.items()}),
            lambda: _zipped({**entries, one: entries[other], other: entries[one]}),
            lambda: _zipped(entries, zipfile.ZIP_DEFLATED),
            lambda: _zipped({**entries, f"{root}/../../marker": b"x", f"{root}/data/999999": b"x" * 100}),
            lambda: _zipped({**entries, f"{root}/constants.pkl": pickle.dumps(Attack(source.marker))}),
            lambda: _zipped({f"other/{name.partition('/')[2]}": content for name, content in entries.items()}),
        ]
    )()


def pickle_attack(source: Source, draw: random.Random) -> bytes:
    """A pickle that runs something, in the archive, beside the tensors, or as the whole file."""
    attack, entries = Attack(source.marker), _entries(source.content)
    pickled = pickle.dumps(attack, protocol=draw.choice([0, 2, 4]))
    main = next(name for name in entries if name.endswith("data.pkl"))
    beside = io.BytesIO()
    with torch.serialization.safe_globals([]):
        torch.save({**torch.load(io.BytesIO(source.content), weights_only=True), "attack": attack}, beside)
    source.marker.unlink(missing_ok=True)
    return draw.choice([_zipped({**entries, main: pickled}), beside.getvalue(), pickled, pickled + source.content])


def evil_tensor(value: torch.Tensor, draw: random.Random) -> object:
    """Of another shape, type, place or size than what a name promises; some of few bytes that fill a memory."""
    return draw.choice(
        [
            lambda: value.flatten()[:0], lambda: value.double(), lambda: value.to(torch.complex64), lambda: value[None],
            lambda: torch.full_like(value, math.nan) if value.is_floating_point() else value + 1, lambda: value.bool(),
            lambda: torch.zeros(1, dtype=value.dtype).expand(10**11), lambda: torch.zeros(1).expand(10**5, 10**6),
            lambda: torch.empty(value.shape, device="meta"), lambda: value.flatten().float().to_sparse(), lambda: value.tolist(),
            lambda: value.flatten() if value.ndim != 1 else value.reshape(1, -1), lambda: value.half(), lambda: value.to(torch.int64),
            lambda: -value if value.dtype != torch.bool else ~value, lambda: value.float() * 1e30, lambda: "tensor", lambda: None,
        ]
    )()  # fmt: skip


def _changed_content(source: Source, draw: random.Random) -> object:
    content = torch.load(io.BytesIO(source.content), weights_only=True)
    places = [(node, key) for node, key in _places(content) if isinstance(node[key], torch.Tensor)]
    if places and draw.random() < 0.4:
        node, key = draw.choice(places)
        node[key] = evil_tensor(node[key], draw)
        return content
    evil = evil_value(source, draw)
    evil = "x" if isinstance(evil, str) and "\ud800" in evil else evil  # no torch file can hold it
    return change_tree(content, evil, draw)


def torch_tree(source: Source, draw: random.Random) -> bytes:
    """The content of a torch file changed and saved as torch does."""
    stream = io.BytesIO()
    torch.save(_changed_content(source, draw), stream)
    return stream.getvalue()


def checkpoint_forged(source: Source, draw: random.Random) -> bytes:
    """The content of a checkpoint changed and saved with the right hash, where it can have one."""
    content = _changed_content(source, draw)
    path = source.marker.with_name("inside") / "forged"
    try:
        save_checkpoint(path, content)
        return path.read_bytes()
    except Exception:  # what cannot be saved as a checkpoint is no forgery of one
        return zip_entry(source, draw)
    finally:
        path.unlink(missing_ok=True)


# ---- safetensors and .binaryad


def _header(content: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:end]), content[end:]


def _with_header(header: object, data: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def header_tree(source: Source, draw: random.Random) -> bytes:
    """Shapes, types, offsets or texts of the header changed, its length right."""
    header, data = _header(source.content)
    return _with_header(change_tree(header, evil_value(source, draw), draw), data)


def header_length(source: Source, draw: random.Random) -> bytes:
    """Another length before the header."""
    length = struct.unpack("<Q", source.content[:8])[0]
    number = draw.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**40, 2**63, 2**64 - 1, 99_999_999])
    return struct.pack("<Q", number) + source.content[8:]


def tensor_bytes(source: Source, draw: random.Random) -> bytes:
    """Bytes behind the header changed."""
    end = 8 + struct.unpack("<Q", source.content[:8])[0]
    place = draw.randrange(end, len(source.content))
    return _replaced(source.content, place, place + 1, bytes([source.content[place] ^ 1 << draw.randrange(8)]))


def packed_forged(source: Source, draw: random.Random) -> bytes:
    """Header or description of a .binaryad file changed, its hash right."""

    def change(header: dict, entry: dict) -> None:
        changed = header if draw.random() < 0.3 else entry
        tree = change_tree(changed, evil_value(source, draw), draw)
        if isinstance(tree, dict):
            changed.clear()
            changed.update(tree)

    return rewritten(source.content, change)


# ---- arrays and images


def array_header(source: Source, draw: random.Random) -> bytes:
    """Another shape, type or order in the header of a .npy file, or objects, which are pickles."""
    length = struct.unpack("<H", source.content[8:10])[0]
    text, data = source.content[10 : 10 + length].decode(), source.content[10 + length :]
    shape = text[text.index("(") : text.index(")") + 1]
    if draw.random() < 0.15:
        text, data = text.replace(text[text.index(": '") + 3 : text.index("', ")], "|O"), pickle.dumps([Attack(source.marker)])
    else:
        numbers = [int(number) for number in shape.strip("()").split(",") if number.strip()]
        numbers[draw.randrange(len(numbers))] = draw.choice([0, 1, 2, 10**9, 10**12, -1, 3])
        others = (f"({', '.join(map(str, numbers))},)", "()", "(1,)", f"({2**62}, 4)", "('a',)", "[1]")
        kinds = [text.replace(shape, other) for other in others]
        kinds += [
            text.replace("<f2", "<f4"),
            text.replace("<f2", ">f2"),
            text.replace("|u1", "|i1"),
            text.replace("False", "True"),
        ]
        kinds += [text.replace("descr", "descx"), "(" * 200, "__import__('os')", text.replace("{", "{'a': 1, ")]
        text = draw.choice(kinds)
    padded = text.strip().encode()
    padded += b" " * (-(len(padded) + 11) % 64) + b"\n"
    return source.content[:8] + struct.pack("<H", len(padded)) + padded + data


def png_chunk(source: Source, draw: random.Random) -> bytes:
    """Content of a chunk changed, its checksum right; or the chunk repeated, removed, or one of text put before it."""
    chunks, place = [], 8
    while place < len(source.content):
        (length,) = struct.unpack(">I", source.content[place : place + 4])
        chunks.append((source.content[place + 4 : place + 8], source.content[place + 8 : place + 8 + length]))
        place += 12 + length
    number = draw.randrange(len(chunks))
    kind, content = chunks[number]
    action = draw.choice(["bytes"] * 5 + ["size", "delete", "copy", "text", "rename"])
    if action == "size":
        chunks[0] = (
            b"IHDR",
            struct.pack(">II", draw.choice(INTERESTING) % 2**31, draw.choice(INTERESTING) % 2**31) + chunks[0][1][8:],
        )
    elif action == "delete":
        del chunks[number]
    elif action == "copy":
        chunks.insert(number, chunks[number])
    elif action == "text":
        bomb = b"Comment\0\0" + zlib.compress(bytes(20_000_000), 9)
        chunks.insert(
            max(1, number), draw.choice([(b"zTXt", bomb), (b"iCCP", bomb), (b"tRNS", b"\0" * 6), (b"eXIf", b"MM\0*junk")])
        )
    elif action == "rename":
        chunks[number] = (draw.choice([b"IHDR", b"IDAT", b"PLTE", b"acTL", b"fdAT", b"xxxx"]), content)
    elif content:
        chunks[number] = (kind, draw.choice(BYTES[:-1])(Source(content, b"", source.marker, source.outside), draw))
    written = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return source.content[:8] + written


def _mutations(*changes: Change, forged: Change | None = None, repeat: int = 3) -> list[Mutation]:
    """Those of bytes, and the others several times as often as each of these."""
    own = [Mutation(change.__name__, change) for change in changes] * repeat
    own += [Mutation(forged.__name__, forged, forged=True)] * (2 * repeat) if forged else []
    return [*(Mutation(change.__name__, change) for change in BYTES), *own]


MUTATIONS = {
    "bytes": _mutations(),
    "json": _mutations(json_tree, json_tree, json_text, repeat=4),
    "json lines": _mutations(json_line, repeat=10),
    "yaml": _mutations(yaml_tree, yaml_tree, yaml_text, repeat=4),
    "csv": _mutations(csv_cells, csv_cells, csv_text, repeat=4),
    "lines": _mutations(line_words, repeat=8),
    "torch": _mutations(zip_entry, zip_entries, pickle_attack, torch_tree, torch_tree),
    "checkpoint": _mutations(zip_entry, zip_entries, pickle_attack, torch_tree, forged=checkpoint_forged),
    "safetensors": _mutations(header_tree, header_length, tensor_bytes),
    "packed": _mutations(header_tree, header_length, tensor_bytes, forged=packed_forged),
    "array": _mutations(array_header, repeat=6),
    "png": _mutations(png_chunk, repeat=8),
}
