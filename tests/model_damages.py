"""Ways in which the file of a model can be wrong, and what happens to files whatever reads them."""

import io
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@dataclass(frozen=True)
class Damage:
    """What it does to the bytes of a torch file, and what the sentence about it says.

    `make`: content and the file that an attack would make -> new content.
    """

    name: str
    make: Callable[[bytes, Path], bytes]
    said: str

    def __str__(self) -> str:
        return self.name


def flipped(content: bytes, position: int, bit: int = 0) -> bytes:
    """The content with one other bit."""
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


def positions(content: bytes, count: int, seed: int = 0) -> list[int]:
    """Some places in a file, always the same."""
    return sorted(random.Random(seed).sample(range(len(content)), min(count, len(content))))


def saved(content: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _flip_a_tensor(content: bytes, marker: Path) -> bytes:
    """In the middle of the largest entry of the archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
    largest = max(tensors, key=lambda entry: entry.file_size)
    lengths = struct.unpack_from("<HH", content, largest.header_offset + 26)  # of its name and of the padding after it
    return flipped(content, largest.header_offset + 30 + sum(lengths) + largest.file_size // 2, 3)


def _deflated(content: bytes, marker: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in archive.infolist():
            bomb.writestr(entry.filename, archive.read(entry))
    return buffer.getvalue()


def _repeated(content: bytes, marker: Path) -> bytes:
    """A second entry for the same stored bytes, which costs a line of the archive's table alone."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
        archive.filelist += [largest] * 4
        archive._didModify = True
    return buffer.getvalue()


FLIPPED_TENSOR = Damage("flipped bit in a tensor", _flip_a_tensor, "damaged")
ATTACK = Damage("pickle that runs code", lambda content, marker: saved({"model": Attack(marker)}), "refused")
CONTAINER_DAMAGES = (
    Damage("empty", lambda content, marker: b"", "is empty"),
    Damage("one byte", lambda content, marker: content[:1], "damaged"),
    Damage("cut in the first entry", lambda content, marker: content[:100], "damaged"),
    Damage("cut in half", lambda content, marker: content[: len(content) // 2], "damaged"),
    Damage("cut at the end", lambda content, marker: content[:-1], "damaged"),
    Damage("page of a web server", lambda content, marker: b"<!DOCTYPE html><html>404 Not Found</html>", "no torch file"),
    Damage("safetensors", lambda content, marker: safetensors.torch.save({"weight": torch.ones(9)}), "no torch file"),
    Damage("plain pickle that runs code", lambda content, marker: pickle.dumps(Attack(marker), 2), "damaged"),
    Damage("compressed", _deflated, "refused"),
    Damage("repeated entries", _repeated, "refused"),
    ATTACK,
    FLIPPED_TENSOR,
)
