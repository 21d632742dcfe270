"""One process at a time writes into a run folder."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ResourceError
from utils.array_file import runs_beside_us

logger = logging.getLogger(__name__)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder against a second process; a lock whose process is gone on this machine is taken over.

    Raises:
        ResourceError: another process holds it, or the folder cannot be written.
    """
    path = folder / "run.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_stale_lock(path)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError as error:
        if not folder.is_dir():
            raise ResourceError(f"cannot use {str(folder)!r} as run folder: it is a file; choose another --save_dir") from error
        raise ResourceError(
            f"{str(folder)!r} is in use by {path.read_text().strip() or 'another process'}; wait for it, or remove "
            f"{path.name} if no such process runs"
        ) from error
    except OSError as error:
        raise ResourceError(
            f"cannot write into {str(folder)!r}: {error.strerror or error}; choose another --save_dir"
        ) from error
    with os.fdopen(descriptor, "w") as file:
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _remove_stale_lock(path: Path) -> None:
    """Remove a lock whose process no longer runs on this machine."""
    try:
        _, process, _, host = path.read_text().split()
    except (OSError, ValueError):
        return
    if host != socket.gethostname():
        return
    if process.isdecimal() and not runs_beside_us(int(process)):
        logger.warning("took over the lock of process %s, which is gone", process)
        path.unlink(missing_ok=True)
