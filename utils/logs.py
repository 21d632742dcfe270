"""Log lines: to the terminal without tearing the progress bar, and to `log.txt`."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from utils.distributed import is_main, rank


class _BesideProgressBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def log_to_terminal(quiet: bool) -> None:
    """Show log lines on stderr, warnings only if quiet; of a process beside the main one warnings with its number."""
    handler = _BesideProgressBar(level=logging.WARNING if quiet or not is_main() else logging.INFO)
    handler.setFormatter(logging.Formatter("%(message)s" if is_main() else f"process {rank()}: %(message)s"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for library in ("httpx", "httpx2", "huggingface_hub", "timm", "PIL"):
        logging.getLogger(library).setLevel(logging.WARNING)


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append log lines of the main process to a file as well."""
    if not is_main():
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
