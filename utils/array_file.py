"""Large arrays in files that are either complete or absent: made by one or several processes, read memory-mapped.

Reading costs file-backed memory only, which the system takes back whenever it needs room. A file is a `.npy` that ends with the
sha256 of all before it, which is verified before the rows are used: a pass over the file at 0.5 to 2 GB a second.
"""

import hashlib
import json
import logging
import os
import socket
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import ResourceError
from common.progress import ProgressBar
from datasets.records import Record
from utils.distributed import PeerLost, is_main, mean_over_processes, on_main, rank, world_size
from utils.loading import loaded_batches

logger = logging.getLogger(__name__)

_MARK = b"\nsha256 "  # between the rows and their hash; whoever reads a .npy passes over what follows the rows
_END = len(_MARK) + hashlib.sha256().digest_size

Blocks = Callable[[range], Generator[np.ndarray | Tensor, None, None]]


class MappedArray:
    """Rows of a complete array file, read-only; a process that is sent this object gets the path, not the content."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index]

    def __reduce__(self) -> tuple:
        return MappedArray, (self.path,)


@dataclass(frozen=True)
class ArrayFile:
    """A file to be: `count` rows of `row_shape`, one per image.

    Attributes:
        subject: what the rows are, as "feature": names the cache in messages, and its flag `--cache_features`.
        alternatives: what that flag could be instead if the file cannot be written, as "ram or off".
    """

    path: Path
    count: int
    row_shape: tuple[int, ...]
    dtype: type
    subject: str
    alternatives: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.row_shape)) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all rows; header and hash of the file are about two hundred more."""
        return self.count * self.row_bytes

    def make(self, blocks: Blocks, block_rows: int) -> None:
        """Write all rows; under several processes each writes a contiguous part.

        Args:
            blocks: part of the row numbers -> arrays that hold these rows one after the other.
            block_rows: parts begin at multiples of it, so that blocks are the same however many processes there are.

        Raises:
            ResourceError: the file cannot be written.
            PeerLost: another process failed, and says why.
            Exception: whatever `blocks` raises.
        """
        temporary = on_main(self._start)
        failure: Exception | None = None
        try:
            try:
                self._write_part(temporary, _own_part(self.count, block_rows), blocks)
            except Exception as error:
                failure = error
                temporary.unlink(missing_ok=True)  # the others look for it between blocks, and stop
            all_succeeded = mean_over_processes(torch.tensor(float(failure is None))).item() == 1
            if failure is not None:
                raise failure
            if not all_succeeded:
                raise PeerLost
            on_main(lambda: self._publish(temporary))
        finally:
            temporary.unlink(missing_ok=True)

    def _start(self) -> Path:
        """A file of the full size under a temporary name, its disk space taken."""
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.path)
            temporary = self.path.with_name(f".{self.path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
            try:
                np.lib.format.open_memmap(temporary, mode="w+", dtype=self.dtype, shape=(self.count, *self.row_shape))
                if hasattr(os, "posix_fallocate"):
                    with temporary.open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return temporary

    def _write_part(self, temporary: Path, part: range, blocks: Blocks) -> None:
        """Written, not assigned to a mapped array: a full disk is then an error instead of the end of the process."""
        with self._writing():
            try:
                first_row = np.load(temporary, mmap_mode="r").offset
                file = temporary.open("r+b")
            except FileNotFoundError:
                return  # another process failed before this one began; were it not so, there would be nothing to publish
        with file, closing(blocks(part)) as produced:
            file.seek(first_row + part.start * self.row_bytes)
            for block in produced:
                with self._writing():
                    file.write(np.ascontiguousarray(block, self.dtype))
                if not temporary.exists():
                    return
            if file.tell() != first_row + part.stop * self.row_bytes:
                raise RuntimeError(f"rows {part} of {self.path} were not filled by what was computed for them")
            with self._writing():
                file.flush()
                os.fsync(file.fileno())

    def _publish(self, temporary: Path) -> None:
        """Add the hash and give the file its name, which thus always means complete content."""
        with self._writing():
            digest = _sha256(temporary, temporary.stat().st_size)
            with temporary.open("ab") as file:
                file.write(_MARK + digest)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ResourceError(
                f"{self.subject} cache: cannot write {str(self.path)!r} of {self.bytes / 1e6:.1f} MB "
                f"({error.strerror or error}); make room, or give --cache_{self.subject}s {self.alternatives}"
            ) from error


def content_key(records: Iterable[Record], identity: dict) -> str:
    """Name of a file whose rows are made from these images: the hash of their paths, sizes and times, and of `identity`."""
    files = []
    for record in records:
        status = record.path.stat()
        files.append((str(record.path.resolve()), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(json.dumps({**identity, "files": files}, sort_keys=True).encode()).hexdigest()[:32]


def open_array(path: Path, count: int, dtype: type, subject: str) -> MappedArray | None:
    """The rows of a complete file; None if there is none, or one that is cut short, of another kind or not as written."""
    if not path.is_file():
        return None
    try:
        status = path.stat()
        if _is_as_written(path, status.st_size, status.st_mtime_ns, status.st_ino):
            with warnings.catch_warnings(action="ignore"):
                array = MappedArray(path)
            if len(array) == count and array.rows.dtype == dtype:
                return array
    except Exception:  # numpy has no common class for what a broken header raises
        logger.debug("%s", path, exc_info=True)
    logger.warning("%s cache: %s is damaged or of an earlier version, and is made anew", subject, path)
    return None


@cache
def _is_as_written(path: Path, size: int, modified: int, inode: int) -> bool:
    """Whether a file ends with the hash of the rest; a file is read once in a process, unless it has changed."""
    with path.open("rb") as file:
        file.seek(max(0, size - _END))
        end = file.read()
    return end.startswith(_MARK) and end[len(_MARK) :] == _sha256(path, size - _END)


def _sha256(path: Path, size: int) -> bytes:
    """Hash of the first `size` bytes of a file."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while size and (count := file.readinto(buffer[: min(size, len(buffer))])):
            digest.update(buffer[:count])
            size -= count
    return digest.digest()


def loaded_rows(
    row: Callable[[int], Tensor | np.ndarray], part: range, batch_size: int, num_workers: int, description: str
) -> Generator[Tensor, None, None]:
    """`row(index)` for all indices of a part, computed by loader workers, in batches and in order."""
    with (
        loaded_batches(_Rows(row, part), num_workers, batch_size=batch_size) as batches,
        ProgressBar(total=len(part), desc=description, unit="image", disable=None if is_main() else True) as bar,
    ):
        for batch in batches:
            yield batch
            bar.update(len(batch))


class _Rows(Dataset):
    def __init__(self, row: Callable[[int], Tensor | np.ndarray], part: range):
        self.row, self.part = row, part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Tensor | np.ndarray:
        return self.row(self.part[index])


def _own_part(count: int, block_rows: int) -> range:
    """The rows that this process writes: its share of the blocks."""
    blocks = -(-count // block_rows)
    start, stop = (min(count, blocks * number // world_size() * block_rows) for number in (rank(), rank() + 1))
    return range(start, stop)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of `path` whose process is gone from this machine."""
    for temporary in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.tmp"):
        process = temporary.suffixes[-2][1:]
        if process.isdecimal() and not runs_beside_us(int(process)):
            logger.warning("removed %s, left behind by a process that was killed", temporary)
            temporary.unlink(missing_ok=True)


def runs_beside_us(process: int) -> bool:
    """True for another process of this machine that runs."""
    if process == os.getpid():  # the same number again, as after a container's restart
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
