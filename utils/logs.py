"""Log lines: to the terminal without tearing the progress bar, and to `log.txt`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import ResourceError
from common.progress import ProgressBar
from utils.checkpoint import explain_write_error
from utils.distributed import is_main, rank


class _BesideProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        ProgressBar.write(self.format(record), file=sys.stderr)


def log_to_terminal(quiet: bool) -> None:
    """Show log lines on stderr, warnings only if quiet; of a process beside the main one warnings with its number."""
    handler = _BesideProgressBar(level=logging.WARNING if quiet or not is_main() else logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s" if is_main() else f"process {rank()}: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for library in ("httpx", "httpx2", "huggingface_hub", "timm", "PIL"):
        logging.getLogger(library).setLevel(logging.WARNING)


class _LogFile(logging.FileHandler):
    """A file that ceases to be written, with one warning, when the disk is full: the log must not end a training."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="surrogateescape")  # as the names of files in our tables

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging for whatever went wrong with a line."""
        self.setLevel(logging.CRITICAL + 1)
        logging.getLogger(__name__).warning(
            "%s is not continued: %s; what follows is shown here alone", self.baseFilename, sys.exc_info()[1]
        )

    def close(self) -> None:
        """Close the file; what could not be written before cannot be written now either."""
        with suppress(OSError):
            super().close()


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append log lines of the main process to a file as well; raises ResourceError if it cannot be opened."""
    if not is_main():
        yield
        return
    try:
        handler = _LogFile(path)
    except OSError as error:
        raise ResourceError(explain_write_error(path, error)) from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
