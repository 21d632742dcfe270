"""Mutations of bytes, whatever they mean."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

INTERESTING = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)


@dataclass(frozen=True)
class Source:
    """A valid file and another one of its kind; `marker` is what an attack makes, `outside` a file that must not be read."""

    content: bytes
    other: bytes
    marker: Path
    outside: Path


Change = Callable[[Source, random.Random], bytes]


def _place(content: bytes, draw: random.Random) -> int:
    """Any place, but more often near the ends, where headers and directories are."""
    if not content:
        return 0
    near = min(len(content), 400)
    return draw.choice([draw.randrange(len(content)), draw.randrange(near), len(content) - 1 - draw.randrange(near)])


def _block(content: bytes, draw: random.Random) -> tuple[int, int]:
    start = _place(content, draw)
    return start, min(len(content), start + draw.choice([1, 2, 4, 8, 16, 64, 512, 4096]))


def replaced(content: bytes, start: int, stop: int, by: bytes) -> bytes:
    return content[:start] + by + content[stop:]


def flip_bit(source: Source, draw: random.Random) -> bytes:
    place = _place(source.content, draw)
    return replaced(source.content, place, place + 1, bytes([source.content[place] ^ 1 << draw.randrange(8)]))


def change_byte(source: Source, draw: random.Random) -> bytes:
    place = _place(source.content, draw)
    return replaced(source.content, place, place + 1, bytes([draw.randrange(256)]))


def truncate(source: Source, draw: random.Random) -> bytes:
    return source.content[: draw.choice([0, 1, _place(source.content, draw), len(source.content) - 1])]


def extend(source: Source, draw: random.Random) -> bytes:
    return source.content + draw.choice([b"\0", b"\n", b"x" * 1000, bytes(70_000), source.content, draw.randbytes(64)])


def insert(source: Source, draw: random.Random) -> bytes:
    place = _place(source.content, draw)
    return replaced(source.content, place, place, draw.randbytes(draw.choice([1, 2, 7, 100])))


def delete(source: Source, draw: random.Random) -> bytes:
    return replaced(source.content, *_block(source.content, draw), b"")


def duplicate_block(source: Source, draw: random.Random) -> bytes:
    start, stop = _block(source.content, draw)
    return replaced(source.content, stop, stop, source.content[start:stop])


def zero_block(source: Source, draw: random.Random) -> bytes:
    start, stop = _block(source.content, draw)
    return replaced(source.content, start, stop, bytes(stop - start))


def swap_blocks(source: Source, draw: random.Random) -> bytes:
    content = source.content
    (a, b), (c, d) = sorted([_block(content, draw), _block(content, draw)])
    if b > c:
        return replaced(content, a, d, content[c:d] + content[a:c])
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def interesting_integer(source: Source, draw: random.Random) -> bytes:
    place, size = _place(source.content, draw), draw.choice([1, 2, 4, 8])
    number = (draw.choice(INTERESTING) % 2 ** (8 * size)).to_bytes(size, draw.choice(["little", "big"]))
    return replaced(source.content, place, place + size, number)


def splice(source: Source, draw: random.Random) -> bytes:
    other = source.other
    if draw.random() < 0.5:
        place = _place(source.content[: len(other)], draw)
        return source.content[:place] + other[place:]
    (start, stop), place = _block(other, draw), _place(source.content, draw)
    return replaced(source.content, place, place + stop - start, other[start:stop])


BYTES = [
    flip_bit, change_byte, truncate, extend, insert, delete, duplicate_block, zero_block, swap_blocks, interesting_integer,
    splice,
]  # fmt: skip
