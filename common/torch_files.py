"""Files of torch.save, opened without running code and without taking much more memory than they have bytes."""

import re
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError

_SAFE_TORCH = (2, 10)  # before it, weights_only could be made to run code (CVE-2025-32434, CVE-2026-24747)
_LARGEST_SHARE = 4  # bytes of all tensors for one of the file: tied weights share theirs
_SMALL = 1_000_000


def read_torch_file(path: Path, kind: str, remedy: str, allow_old_format: bool = False) -> object:
    """What torch.save put into a file, on the CPU.

    Args:
        kind: what the file is, for messages: "checkpoint".
        remedy: what to do about a damaged one: "use another copy".
        allow_old_format: read files of torch before 1.6, which are no zip archives.

    Raises:
        UserError: the file is empty, damaged, no torch file, holds Python objects, or would swell beyond its size.
    """
    _check_torch_version(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"{kind} unreadable: {str(path)!r} ({error.strerror}); check its permissions") from error
    if not size:
        raise UserError(f"{kind} damaged: {str(path)!r} is empty; {remedy}")
    if start == b"PK":
        _refuse_compression(path, size, kind, remedy)
    elif not (allow_old_format and start == b"\x80\x02"):  # a pickle
        raise UserError(f"{kind} damaged: {str(path)!r} is no torch file (no zip archive); {remedy}")
    try:
        with warnings.catch_warnings(action="ignore"):  # about other protocols of pickles, which it reads or does not
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for what a broken or hostile file raises
        if "weights_only" in str(error).lower() or "unsupported global" in str(error).lower():
            raise UserError(
                f"{kind} refused: {str(path)!r} holds Python objects besides tensors and is not opened; give one "
                "of tensors alone, as of a state_dict()"
            ) from error
        raise UserError(f"{kind} damaged: {str(path)!r} cannot be read ({type(error).__name__}); {remedy}") from error


def _check_torch_version(path: Path) -> None:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found < _SAFE_TORCH:
        raise UserError(
            f"{str(path)!r} is not opened: torch {torch.__version__} can be made to run code by such files; "
            "pip install -r requirements.txt"
        )


def _refuse_compression(path: Path, size: int, kind: str, remedy: str) -> None:
    """torch stores what it writes: a compressed or repeated entry is a bomb or nobody's checkpoint."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # as for torch.load
        raise UserError(f"{kind} damaged: {str(path)!r} cannot be read ({type(error).__name__}); {remedy}") from error
    swollen = sum(entry.file_size for entry in entries)
    if swollen > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(
            f"{kind} refused: {str(path)!r} has {size:,} bytes and would become {swollen:,} (compressed entries, which torch "
            "does not write); save it with torch.save"
        )


def check_tensors(values: Iterable[tuple[str, object]], size: int) -> None:
    """Raise ValueError unless all values are ordinary tensors that together are not much larger than a file of `size` bytes.

    A view may claim a shape far beyond the memory behind it; a copy of it would take that memory.
    """
    total = 0
    for name, value in values:
        if not is_ordinary_tensor(value):
            raise ValueError(f"{name!r} is no ordinary tensor")
        total += value.nbytes
        if value.nbytes > value.untyped_storage().nbytes() or total > _LARGEST_SHARE * size + _SMALL:
            raise ValueError(f"{name!r} with shape {tuple(value.shape)} is larger than the file")


def is_ordinary_tensor(value: object) -> bool:
    """A dense tensor of real numbers on the CPU."""
    return (
        type(value) in (Tensor, nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_complex()
    )


def not_finite(state: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity."""
    return sorted(name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all())
