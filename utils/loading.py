"""Batches from loader processes that neither die with a signal to the whole group nor outlive an error."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

from torch.utils.data import DataLoader, Dataset

from common.errors import ResourceError
from common.startup import end_start
from utils.distributed import processes_on_this_machine

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS_AFTER_SIGTERM = 60
_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*?)(?:\. |\.?$)")  # a plain RuntimeError of torch


@contextmanager
def loaded_batches(data: Dataset, num_workers: int, **options) -> Iterator[Iterator]:
    """Iterate over a DataLoader and end its workers when the block ends, however it ends.

    An error keeps the iterator alive through its traceback; its workers would then hold up the end of the process.

    Raises:
        ResourceError: a worker ended, as when the system kills it; torch notices anywhere within the block.
    """
    iterator = None
    try:
        with _signals_held() if num_workers else nullcontext():
            options["persistent_workers"] = num_workers > 0  # so that they end below alone, and not with the last batch
            iterator = iter(DataLoader(data, num_workers=num_workers, worker_init_fn=_outlast_signals, **options))
        yield iterator
    except RuntimeError as error:
        lost = [found for found in map(_lost_worker, (error, error.__cause__)) if found]
        if not lost:
            raise
        raise ResourceError(
            f"loader process {lost[-1]}; if memory or /dev/shm is short, lower --num_workers, with 0 no such process "
            "is needed; a training goes on with --resume"
        ) from error
    finally:
        if num_workers and iterator is not None:
            with _signals_held():  # broken off halfway, it leaves workers that nobody tells to end
                iterator._shutdown_workers()


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait until the block ends.

    Blocked, they do not end a worker that begins, which inherits that. This process may have threads that do not block them,
    and Python runs the handler in the main one all the same: so that the handler waits, too.
    """
    received = []
    with ExitStack() as stack:
        stack.callback(lambda: [signal.raise_signal(number) for number in received])
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        if threading.current_thread() is threading.main_thread():  # no other one may change handlers
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):  # and not "ignore", as for a job in the background
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, lambda number, frame: received.append(number))
        yield


def _lost_worker(error: BaseException | None) -> str:
    """Number of the worker that ended and how, as far as an error says it."""
    found = _LOST_WORKER.search(" ".join(str(error).split()))
    return " ".join(found.groups()) if found else ""


def _outlast_signals(worker: int) -> None:
    """Signals often reach the whole process group: the parent decides what they mean and may still save a checkpoint."""
    end_start()  # a worker that is not forked has imported everything itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_SECONDS_AFTER_SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def default_worker_count() -> int:
    """Four loader workers as the papers, fewer where the processors are few or shared by several processes of torchrun."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, processors // processes_on_this_machine()))
