"""One process at a time writes into a folder."""

import errno
import fcntl
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import ResourceError
from utils.array_file import runs_beside_us
from utils.checkpoint import explain_write_error

logger = logging.getLogger(__name__)

_NAME = "run.lock"
_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
_SECONDS_TO_SIGN = 2.0
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_HOLDER = re.compile(r"process (\d+) on (\S+)\s*")


@contextmanager
def run_lock(folder: Path, flag: str = "--save_dir", name: str = _NAME) -> Iterator[None]:
    """Hold a folder against a second process; the lock of a process that has ended is taken over.

    What counts is the system's lock on the file `name` in the folder: it ends with its process, however that ends, and
    only one of two processes that begin together gets it. The text of the file says who holds it.

    Args:
        folder: made if it does not exist.
        flag: with which the user chooses the folder.

    Raises:
        ResourceError: another process holds it, or held it on another machine; or the folder cannot be written.
    """
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _locked(path)
        try:
            _sign(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
    except FileExistsError as error:
        raise ResourceError(f"cannot use {str(folder)!r} as a folder: it is a file; choose another {flag}") from error
    except OSError as error:
        raise ResourceError(f"{explain_write_error(path, error)}; or choose another {flag}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # of a disk that is gone
            if _is_still(path, descriptor):  # or else a user removed ours, and this is another's
                path.unlink()
        os.close(descriptor)  # only now: what others open before is no longer there, and `_is_still` tells them


def _locked(path: Path) -> int:
    """Descriptor of the lock file, locked for this process."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader processes, as flock would be
        except OSError as error:
            holder = _holder_that_runs(descriptor, patient=error.errno in _HELD)
            if error.errno in _NO_LOCKS and not holder:
                logger.warning("%s: the file system has no locks; start no second command on this folder", path)
                return descriptor
            os.close(descriptor)
            if error.errno in (*_HELD, *_NO_LOCKS):
                raise _in_use(path, holder) from error
            raise
        if _is_still(path, descriptor):
            return descriptor
        os.close(descriptor)  # its holder removed it between our opening and our locking; others may lock a new one


def _is_still(path: Path, descriptor: int) -> bool:
    """True if the path leads to the open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(path: Path, descriptor: int) -> None:
    """Write who we are into the locked file; what stands there is of a process that did not end in order."""
    earlier = _HOLDER.fullmatch(_holder(descriptor))
    if earlier and earlier[2] != socket.gethostname():  # not all network file systems tell machines of each other's locks
        raise _in_use(path, earlier[0].strip())
    if earlier:
        logger.warning("took over the lock of process %s, which is gone", earlier[1])
        if path.name == _NAME:
            _remove_unfinished(path.parent)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _remove_unfinished(folder: Path) -> None:
    """Remove what a process was writing when it was killed: files under their temporary names (see `atomic_write`)."""
    for path in folder.rglob(".*.tmp"):
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").strip()


def _holder_that_runs(descriptor: int, patient: bool) -> str:
    """Who the file says holds it, "" if that process is gone; a new holder is given time to write its number."""
    deadline = time.monotonic() + (_SECONDS_TO_SIGN if patient else 0)
    while True:
        holder = _HOLDER.fullmatch(_holder(descriptor))
        if holder and (holder[2] != socket.gethostname() or runs_beside_us(int(holder[1]))):
            return holder[0].strip()
        if time.monotonic() > deadline:
            return ""
        time.sleep(0.01)


def _in_use(path: Path, holder: str) -> ResourceError:
    found = _HOLDER.fullmatch(holder)
    elsewhere = f"; if that no longer runs there, remove {path.name!r}" if found and found[2] != socket.gethostname() else ""
    return ResourceError(f"{str(path.parent)!r} is in use by {holder or 'another process'}{elsewhere}; wait for its end")
