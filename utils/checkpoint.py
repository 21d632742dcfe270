"""Files that are either whole or not there, and checkpoints that are read without running code."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch

from common import schema
from common.errors import ResourceError, UserError
from common.plain_content import check_plain, content_sha256
from common.schema import Check
from common.torch_files import not_finite, read_torch_file
from models.weight_files import state_sha256

FORMAT_VERSION = 2
_KIND = "binaryad-checkpoint"
_REMEDY = "use another copy or train again"
_HASHED: Mapping[str, Check] = {"model": schema.mapping_to(schema.tensor), "model_sha256": schema.sha256}
_WITH_TENSORS = ("model", "optimizer", "statistics")
_ALWAYS: Mapping[str, Check] = {
    "stage": schema.one_of(0, 1, 2, "distillation"),
    "config": schema.mapping,
    "encoder": schema.text,
    "encoder_sha256": schema.text,
}


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
    """Save plain tensors and types atomically, with the format's name and a hash of everything."""
    model = {name: value.cpu() for name, value in content["model"].items()}  # so that any machine can open it
    complete = {
        **content,
        "kind": _KIND,
        "format_version": FORMAT_VERSION,
        "model": model,
        "model_sha256": state_sha256(model),
    }
    complete["content_sha256"] = _sha256_beside_the_model(complete)
    atomic_write(path, lambda file: torch.save(complete, file))


def load_checkpoint(path: Path, needs: Mapping[str, Check] | None = None, may: Mapping[str, Check] | None = None) -> dict:
    """Content of a checkpoint, on the CPU, verified against its hash.

    Args:
        needs: what must be in it for what the caller is about to do; `may`: what it is if it is there.

    Raises:
        UserError: the file is absent, empty, damaged, foreign, unsafe, of a newer format, or lacks what is needed; each has its
            own sentence.
    """
    if not path.is_file():
        raise UserError(f"checkpoint not found: {str(path)!r} is no file; train that model first or correct the path")
    content = read_torch_file(path, "checkpoint", _REMEDY)
    if not isinstance(content, dict) or content.get("kind") != _KIND or "format_version" not in content:
        raise UserError(f"not a BinaryAD checkpoint: {str(path)!r} is a torch file of another program")
    version = content["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint too new: {str(path)!r} has format {version}, this program reads up to {FORMAT_VERSION}; update the "
            "program"
        )
    try:
        schema.whole(1, FORMAT_VERSION)(version, "format_version")
        check_plain(content, path.stat().st_size)
        schema.fields(_HASHED, unknown=True)(content, "")
    except ValueError as error:
        raise UserError(f"checkpoint damaged: in {str(path)!r} {error}; {_REMEDY}") from error
    _check_hashes(content, path)
    described = {key: schema.no_tensors for key in content if key not in _WITH_TENSORS}
    require(content, described, path)
    require(content, {**_ALWAYS, **(needs or {})}, path, may)
    damaged = not_finite(content["model"])
    if damaged:
        raise UserError(f"checkpoint unusable: {str(path)!r} has values that are not finite in {damaged[:3]}; {_REMEDY}")
    return content


def require(content: dict, needs: Mapping[str, Check], path: Path, may: Mapping[str, Check] | None = None) -> None:
    """Raise UserError unless a checkpoint's content has all that is needed, each as it should be (see `load_checkpoint`)."""
    try:
        schema.fields(needs, may, unknown=True)(content, "")
    except ValueError as error:
        raise UserError(f"checkpoint unusable: in {str(path)!r} {error}; {_REMEDY}") from error


def _sha256_beside_the_model(content: dict) -> str:
    """Hash of everything but the model, whose own hash stands for it."""
    return content_sha256({key: value for key, value in content.items() if key not in ("model", "content_sha256")})


def _check_hashes(content: dict, path: Path) -> None:
    """Raise UserError if anything is not as it was saved; format 1 has a hash of the model alone."""
    if state_sha256(content["model"]) != content["model_sha256"]:
        raise UserError(f"checkpoint damaged: the tensors in {str(path)!r} do not match their hash; {_REMEDY}")
    has_hash = content["format_version"] > 1 or "content_sha256" in content
    if has_hash and content.get("content_sha256") != _sha256_beside_the_model(content):
        raise UserError(f"checkpoint damaged: what {str(path)!r} says does not match its hash; {_REMEDY}")
