"""Mutations of torch, safetensors, .binaryad, .npy and PNG files that keep the form and its checksums."""

import io
import json
import math
import pickle
import random
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import torch

from tests.fuzz_bytes import BYTES, INTERESTING, Source, replaced
from tests.fuzz_texts import change_tree, copied, evil_value, places
from tests.test_packed import rewritten
from utils.checkpoint import save_checkpoint

# ---- torch files


class Attack:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@lru_cache(maxsize=1)  # a mutant gets others
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
    torch.save({**_loaded(source.content), "attack": attack}, beside)
    source.marker.unlink(missing_ok=True)
    return draw.choice([_zipped({**entries, main: pickled}), beside.getvalue(), pickled, pickled + source.content])


def evil_tensor(value: torch.Tensor, draw: random.Random) -> object:
    """Of another shape, type, place or size than what a name promises; some of few bytes that fill a memory."""
    return draw.choice(
        [
            lambda: value.flatten()[:0], lambda: value.double(), lambda: value.to(torch.complex64), lambda: value[None],
            lambda: torch.full_like(value, math.nan) if value.is_floating_point() else value + 1, lambda: value.bool(),
            lambda: torch.zeros(1, dtype=value.dtype).expand(10**11), lambda: torch.zeros(1).expand(10**5, 10**6),
            lambda: torch.empty(value.shape, device="meta"), lambda: value.flatten().float().to_sparse(),
            lambda: value.flatten() if value.ndim != 1 else value.reshape(1, -1), lambda: value.half(), lambda: value.tolist(),
            lambda: -value if value.dtype != torch.bool else ~value, lambda: value.float() * 1e30, lambda: "tensor",
            lambda: value.to(torch.int64), lambda: None,
        ]
    )()  # fmt: skip


@lru_cache(maxsize=1)  # a mutant is changed in a copy
def _loaded(content: bytes) -> dict:
    return torch.load(io.BytesIO(content), weights_only=True)


def _changed_content(source: Source, draw: random.Random) -> object:
    content = copied(_loaded(source.content))
    tensors = [(node, key) for node, key in places(content) if isinstance(node[key], torch.Tensor)]
    if tensors and draw.random() < 0.4:
        node, key = draw.choice(tensors)
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
    return replaced(source.content, place, place + 1, bytes([source.content[place] ^ 1 << draw.randrange(8)]))


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
