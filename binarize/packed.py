"""The `*.binaryad` file: a safetensors file that holds a whole model, its description, and a hash of both (docs/FORMAT.md)."""

import hashlib
import json
import math
import re
import zlib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError

FORMAT = "binaryad"
FORMAT_VERSION = 1
_ZERO_HASH = b"0" * 64
_HASH_FIELD = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # JSON within a JSON string
_TYPES = (torch.int8, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.float32)
_COMPRESSIBLE = {str(kind).removeprefix("torch."): kind for kind in _TYPES}
_MARKER = b'{"__metadata__":{"binaryad":'
_LARGEST_HEADER = 16_000_000  # of the largest network here it has a hundred thousand
_LARGEST_RATIO = 8  # bytes of all tensors for one of the file: no Huffman code has less than a bit for a byte
_SMALL = 1_000_000
# what a file that was written wrongly, or with bad intent, can lead to
_MALFORMED = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    RuntimeError,
    zlib.error,
    safetensors.SafetensorError,
)
_EXPORT_HINT = "`python -m scripts.export` makes one from a model.pth"


def to_bytes(tensors: dict[str, Tensor], description: dict) -> bytes:
    """The file of some tensors and a description (plain types); what a Huffman code makes smaller is stored compressed."""
    stored, compressed = {}, {}
    for name, value in tensors.items():
        stream = _compressed(value)
        if stream.nbytes < value.nbytes and value.dtype in _TYPES:
            stored[name] = stream
            compressed[name] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
        else:
            stored[name] = value.contiguous()
    # one entry, so that equal models give equal files: safetensors writes several in any order
    entry = {"format_version": FORMAT_VERSION, "sha256": _ZERO_HASH.decode(), **description, "compressed": compressed}
    content = safetensors.torch.save(stored, {FORMAT: json.dumps(entry)})
    return _with_hash(content, hashlib.sha256(content).hexdigest().encode())


def from_bytes(content: bytes, name: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a file's content; `name` is for messages.

    Raises:
        UserError: empty, truncated, foreign, of a newer format or changed since it was written; each has its sentence.
    """
    description = _description(content, name)
    version = description.pop("format_version", None)
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"model too new: {name!r} has format {version}, this program reads up to {FORMAT_VERSION}; update the program"
        )
    field = _HASH_FIELD.search(content[: _header_end(content)])
    if field is None or hashlib.sha256(_with_hash(content, _ZERO_HASH)).hexdigest().encode() != field[1]:
        raise UserError(f"model damaged: {name!r} does not match its own sha256, a byte was changed; copy or export it again")
    try:
        if version != FORMAT_VERSION:
            raise ValueError(f"format {version!r}")
        stored, compressed = safetensors.torch.load(content), description.pop("compressed")
        swollen = sum(_size(**kind) for kind in compressed.values())
        if swollen > _LARGEST_RATIO * len(content) + _SMALL:
            raise ValueError(f"a file of {len(content):,} bytes that would become {swollen:,}")
        for tensor, kind in compressed.items():
            stored[tensor] = _decompressed(stored[tensor], **kind)
    except _MALFORMED as error:
        raise UserError(f"model unusable: {name!r} was written wrongly ({error!r}); export it again") from error
    return stored, description


def read_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and description of a `*.binaryad` file; raises UserError as `from_bytes` does, or if there is no such file."""
    if not path.is_file():
        raise UserError(f"model not found: {str(path)!r} is no file; {_EXPORT_HINT}")
    return from_bytes(path.read_bytes(), str(path))


def _compressed(value: Tensor) -> Tensor:
    compressor = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)  # weights do not repeat, some bytes are just more frequent
    content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    stream = compressor.compress(content) + compressor.flush()
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def _size(dtype: str, shape: list[int]) -> int:
    """Bytes of a tensor; raises ValueError for a side below zero, which would hide the bytes of another in a sum."""
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"shape {shape!r:.100}")
    return math.prod(shape) * _COMPRESSIBLE[dtype].itemsize


def _decompressed(stream: Tensor, dtype: str, shape: list[int]) -> Tensor:
    kind, size = _COMPRESSIBLE[dtype], _size(dtype, shape)
    content = zlib.decompressobj().decompress(stream.numpy().tobytes(), size + 1)
    if len(content) != size:
        raise ValueError(f"{len(content)} bytes instead of {size}")
    return torch.frombuffer(bytearray(content), dtype=kind).reshape(shape)


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _with_hash(content: bytes, digest: bytes) -> bytes:
    """The content with another value in its hash field."""
    field = _HASH_FIELD.search(content[: _header_end(content)])
    return content[: field.start(1)] + digest + content[field.end(1) :]


def _description(content: bytes, name: str) -> dict:
    """What the header says of the model; raises UserError if the file is none of ours, or cut short."""
    if not content:
        raise UserError(f"model damaged: {name!r} is empty; copy it again")
    if content[:2] == b"PK":
        raise UserError(f"not a packed model: {name!r} is a torch file, perhaps a training checkpoint; {_EXPORT_HINT}")
    end = _header_end(content)
    if content[8 : 8 + len(_MARKER)] == _MARKER:
        foreign = UserError(f"model damaged: the header of {name!r} was changed; copy or export it again")
    elif name.endswith(".onnx"):
        foreign = UserError(f"not a packed model: {name!r} is for other runtimes; {_EXPORT_HINT}, with --output FILE.binaryad")
    else:
        foreign = UserError(f"not a packed model: {name!r} is no BinaryAD file; {_EXPORT_HINT}")
    if len(content) < 9 or end - 8 > _LARGEST_HEADER or content[8:9] != b"{":
        raise foreign
    if len(content) < end:
        raise UserError(f"model damaged: {name!r} ends within its header, it was cut short; copy it again")
    try:
        header = json.loads(content[8:end])
        description = json.loads(header["__metadata__"][FORMAT])
        size = end + max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        description["sha256"], description["compressed"]
        is_cut_short = len(content) < size
    except _MALFORMED as error:
        raise foreign from error
    if is_cut_short:
        raise UserError(f"model damaged: {name!r} has {len(content)} bytes of {size}, it was cut short; copy it again")
    return description
