"""State dicts from files, read without running code and verified against every hash that there is for them."""

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError
from common.torch_files import check_tensors, not_finite, read_torch_file

HASH_KEY = "sha256"  # of a safetensors file's metadata: what `state_sha256` gives for its tensors
_WRAPPERS = ("model", "state_dict")  # names under which programs put the tensors, beside other things
_REMEDY = "download it again, or give a .safetensors or .pth file of a state dict"
_LONGEST_SOURCE = 500


def state_sha256(state: dict[str, Tensor]) -> str:
    """Hash of names, shapes, types and bytes of a state dict, independent of the file that held it."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_state_dict(path: Path, kind: str, flag: str) -> tuple[dict[str, Tensor], str]:
    """Tensors of a .safetensors or .pth file and a sentence on their origin.

    A hash in the metadata of a .safetensors file, and one in `<file>.sha256` beside any file, must be right.

    Args:
        kind: what the file holds, for messages: "encoder weights".
        flag: how the user names such a file: "--encoder_weights".

    Raises:
        UserError: the file is absent, damaged, unsafe or holds no plain tensors.
    """
    if not path.is_file():
        raise UserError(f"{kind} not found: {str(path)!r} is no file; give {flag} FILE (.safetensors or .pth)")
    _check_neighbour(path, kind)
    is_safetensors = path.suffix == ".safetensors"
    state, source = _read_safetensors(path, kind) if is_safetensors else _read_pickled(path, kind)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{kind} unusable: {str(path)!r} holds no flat state dict of tensors")
    try:
        check_tensors(state.items(), path.stat().st_size)
    except ValueError as error:
        raise UserError(f"{kind} unusable: in {str(path)!r} {error}; {_REMEDY}") from error
    damaged = not_finite(state)
    if damaged:
        raise UserError(f"{kind} unusable: {str(path)!r} has values that are not finite in {damaged[:3]}; use another copy")
    return state, "".join(letter if letter.isprintable() else "?" for letter in source)[:_LONGEST_SOURCE]


def with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file with sorted metadata: their order is random otherwise, and equal runs shall give equal files."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of eight bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def check_file_hash(path: Path, expected: str, kind: str, said_by: str) -> None:
    """Raise UserError unless the sha256 of a file begins with what is expected.

    Args:
        said_by: where that is from, for the message.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected.lower()):
        raise UserError(
            f"{kind} damaged: {str(path)!r} has the sha256 {found[:16]}..., {said_by} says {expected[:16]}; delete that file "
            "and download it again"
        )


def _check_neighbour(path: Path, kind: str) -> None:
    """Of a file that came with its hash in `<file>.sha256`, as sha256sum writes it."""
    neighbour = path.with_name(f"{path.name}.sha256")
    if neighbour.is_file():
        words = neighbour.read_bytes()[:200].decode("ascii", "replace").split()
        if not words or len(words[0]) != 64:
            raise UserError(f"{kind} refused: {str(neighbour)!r} holds no sha256; correct or remove that file")
        check_file_hash(path, words[0], kind, repr(str(neighbour)))


def _read_safetensors(path: Path, kind: str) -> tuple[dict[str, Tensor], str]:
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        state = safetensors.torch.load_file(path)
    except Exception as error:  # every reader has its own exceptions for a damaged file
        raise UserError(
            f"{kind} unreadable: {str(path)!r} is damaged or no .safetensors file ({type(error).__name__}); {_REMEDY}"
        ) from error
    if HASH_KEY in metadata and metadata[HASH_KEY] != state_sha256(state):
        raise UserError(f"{kind} damaged: the tensors in {str(path)!r} do not match the sha256 in it; {_REMEDY}")
    return state, metadata.get("source", path.name)


def _read_pickled(path: Path, kind: str) -> tuple[object, str]:
    state = read_torch_file(path, kind, _REMEDY, allow_old_format=True)
    for wrapper in _WRAPPERS:
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    return state, path.name
