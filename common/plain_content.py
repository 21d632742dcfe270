"""Nested plain values and tensors: that they are no more than that, and one hash of all of it."""

import hashlib
import struct
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from common.torch_files import check_tensors, is_ordinary_tensor

_DEEPEST = 32
_PLAIN = (type(None), bool, int, float, str)


def check_plain(content: object, size: int) -> None:
    """Raise ValueError unless content is plain values and ordinary tensors, and no more than a file of `size` bytes can hold.

    Lists in a file may hold one another many times over, so that a walk through few bytes would never end.
    """
    tensors = []
    for count, (place, value, depth) in enumerate(_walk(content, "", 0)):
        if count > size or depth > _DEEPEST:
            raise ValueError("it is nested without end")
        if isinstance(value, Tensor):
            tensors.append((place, value))
        elif not isinstance(value, (*_PLAIN, list, tuple, dict)):
            raise ValueError(f"{place!r} is a {type(value).__name__}")
    check_tensors(tensors, size)


def _walk(value: object, place: str, depth: int) -> Iterator[tuple[str, object, int]]:
    yield place, value, depth
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"{place}[key]", key, depth
            yield from _walk(part, f"{place}.{key}" if place else str(key), depth + 1)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _walk(part, f"{place}[{index}]", depth + 1)


def content_sha256(content: Mapping) -> str:
    """Hash of all keys, values, types, and tensors' shapes and bytes, whatever the order of keys.

    Raises:
        TypeError: there is something that is neither a plain value nor an ordinary tensor.
    """
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest, value: object) -> None:
    """Every value begins with its type and its length, so that no two contents are the same bytes."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            value = value.cpu()
        if not is_ordinary_tensor(value):
            raise TypeError(f"a tensor of type {value.dtype} and layout {value.layout} has no hash")
        digest.update(f"tensor {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value, key=lambda key: (type(key).__name__, str(key))):
            _add(digest, key)
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"{'tuple' if isinstance(value, tuple) else 'list'} {len(value)}\n".encode())
        for part in value:
            _add(digest, part)
    elif type(value) in _PLAIN:
        plain = struct.pack("<d", value) if isinstance(value, float) else str(value).encode("utf-8", "surrogatepass")
        digest.update(f"{type(value).__name__} {len(plain)}\n".encode() + plain)
    else:
        raise TypeError(f"a {type(value).__name__} has no hash")
