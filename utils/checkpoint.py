"""Files that are either whole or not there, and checkpoints that are read without running code."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch

from common.errors import ResourceError, UserError
from models.encoder import state_sha256

FORMAT_VERSION = 1
_KIND = "binaryad-checkpoint"
_REQUIRED = {"kind", "format_version", "model", "model_sha256", "stage", "config", "encoder", "encoder_sha256"}


def atomic_write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file through a temporary neighbour: after a crash either the old or the new content is there.

    Raises:
        ResourceError: the disk is full or the folder is not writable; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except Exception as error:
        cause = _operating_system_error(error)
        if cause is None:
            raise
        raise ResourceError(explain_write_error(path, cause, _removed_bytes(temporary))) from error
    finally:
        with contextlib.suppress(OSError):  # as where the folder is a file
            temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _operating_system_error(error: BaseException | None) -> OSError | None:
    """The OSError behind an exception: torch.save hides it in the context of a RuntimeError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _removed_bytes(path: Path) -> int:
    """Size of a file, which is removed; 0 if there is none."""
    with contextlib.suppress(OSError):
        size = path.stat().st_size
        path.unlink()
        return size
    return 0


def explain_write_error(path: Path, error: OSError, written: int = 0) -> str:
    """One sentence on why a file could not be written, of which `written` bytes had been and are removed again."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free / 1e6
            needs = f"needs more than {written / 1e6:.1f} MB" if written else "could not be written"
            return f"disk full: {str(path)!r} {needs}, {free:.1f} MB are free; make room and run the command again"
    return f"cannot write {str(path)!r}: {error.strerror or error}; check the folder and its permissions"


def check_writable(path: Path) -> None:
    """Raise ResourceError now if a file could not be written there later; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ResourceError(explain_write_error(path, error)) from error
    if path.is_dir():
        raise ResourceError(f"cannot write {str(path)!r}: it is a folder; choose another name")


def write_text(path: Path, text: str) -> None:
    """Atomic UTF-8 text file."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def save_checkpoint(path: Path, content: dict) -> None:
    """Save plain tensors and types atomically, with the format's name and the hash of `content["model"]`."""
    model = {name: value.cpu() for name, value in content["model"].items()}  # so that any machine can open it
    complete = {
        "kind": _KIND,
        "format_version": FORMAT_VERSION,
        **content,
        "model": model,
        "model_sha256": state_sha256(model),
    }
    atomic_write(path, lambda file: torch.save(complete, file))


def load_checkpoint(path: Path) -> dict:
    """Content of a checkpoint, on the CPU, verified against its hash.

    Raises:
        UserError: the file is absent, empty, damaged, foreign, unsafe or of a newer format; each has its own sentence.
    """
    if not path.is_file():
        raise UserError(f"checkpoint not found: {str(path)!r} is no file; train that model first or correct the path")
    if path.stat().st_size == 0:
        raise UserError(f"checkpoint damaged: {str(path)!r} is empty; use another copy or train again")
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise UserError(
                f"checkpoint damaged: {str(path)!r} is no torch file (no zip archive); use another copy or train again"
            )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common class for what a broken or hostile file raises
        if "weights_only" in str(error).lower() or "unsupported global" in str(error).lower():
            raise UserError(
                f"checkpoint refused: {str(path)!r} holds Python objects besides tensors and is not opened"
            ) from error
        raise UserError(
            f"checkpoint damaged: {str(path)!r} cannot be read ({type(error).__name__}); use another copy or train again"
        ) from error
    if not isinstance(content, dict) or content.get("kind") != _KIND or not content.keys() >= _REQUIRED:
        raise UserError(f"not a BinaryAD checkpoint: {str(path)!r} is a torch file of another program")
    if content["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"checkpoint too new: {str(path)!r} has format {content['format_version']}, this program reads up to "
            f"{FORMAT_VERSION}; update the program"
        )
    if state_sha256(content["model"]) != content["model_sha256"]:
        raise UserError(
            f"checkpoint damaged: the tensors in {str(path)!r} do not match their hash; use another copy or train again"
        )
    return content
