"""Run a command and turn every failure into one sentence and an exit code."""

import argparse
import contextlib
import errno
import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

import torch

from common.errors import CommandError, Interrupted, ResourceError
from common.startup import end_start
from utils.arguments import parse
from utils.distributed import PeerLost, announcement, is_loss_of_peer, is_main, process_group, started_processes
from utils.logs import log_to_terminal
from utils.streams import protect_standard_streams

_STOPPED = "stopped by SIGTERM; torchrun sends it, too, when another process of this command has ended"
_OUT_OF_MEMORY = "out of memory; lower --batch_size, or in training give --cache_features disk"
_NO_MEMORY_SIGNS = ("can't allocate memory", "Cannot allocate memory", "_ALLOC_FAILED")  # of torch's plain RuntimeErrors
_ENVIRONMENT = (  # errors of the system that no other flag and no other file mends
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
)


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], int]) -> int:
    """Parse the command line, do the work, and return its exit code (see `common.errors`).

    Under torchrun every process does the work, joined in a process group; a failure is printed once.
    """
    arguments = None
    end_start()
    protect_standard_streams()
    with _interruptible():
        try:
            arguments = _parsed(parser, argv)
            log_to_terminal(getattr(arguments, "quiet", False))
            with process_group():
                code = work(arguments)
            sys.stdout.flush()  # here a failure still gets its sentence
            return code
        except (Exception, Interrupted, KeyboardInterrupt) as error:
            for number in (signal.SIGINT, signal.SIGTERM):  # also torchrun's, when another process ends
                signal.signal(number, signal.SIG_IGN)  # the sentence comes first
            return _report(error, getattr(arguments, "debug", False))


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Interrupted within the block."""
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:  # as for a job in the background
            signal.signal(number, _raise_interrupted)
    try:
        yield
    finally:
        for number, handler in previous.items():
            if number == signal.SIGINT or started_processes() == 1:  # torchrun's SIGTERM must not change the exit code
                signal.signal(number, handler)


def _report(error: BaseException, debug: bool) -> int:
    """Print what went wrong, unless another process does; returns the exit code."""
    sentence, code = _sentence(error, debug)
    if sentence:
        before = announcement(sentence, isinstance(error, PeerLost | Interrupted) or is_loss_of_peer(error))
        if before is not None:
            details = "".join(traceback.format_exception(error)) if debug else ""
            print(f"{details}error: {before}{sentence}", file=sys.stderr)
    return code


def _sentence(error: BaseException, debug: bool) -> tuple[str, int]:
    """What to tell the user, "" for nothing, and the exit code."""
    if isinstance(error, CommandError):
        return str(error), error.exit_code
    if isinstance(error, Interrupted | KeyboardInterrupt):
        code = error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT
        return (_STOPPED if code == 128 + signal.SIGTERM and started_processes() > 1 else ""), code
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _is_lack_of_memory(error):
        return _OUT_OF_MEMORY, ResourceError.exit_code
    if is_loss_of_peer(error):
        return str(PeerLost()), PeerLost.exit_code
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        where = f"{error.filename!r}: " if error.filename else ""
        return f"the system refused: {where}{error.strerror}; mend that and run the command again", ResourceError.exit_code
    message = " ".join(str(error).split())
    advice = "" if debug else "; run again with --debug for the traceback"
    return f"unexpected {type(error).__name__}{': ' if message else ''}{message}{advice}", 1


def _is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY_SIGNS)


def _parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; what argparse prints before it ends the process comes from the main process alone."""
    printed = io.StringIO()
    try:
        if is_main():
            return parse(parser, argv)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            return parse(parser, argv)
    except SystemExit:
        if announcement("command line", is_consequence=False):
            sys.stderr.write(printed.getvalue())
        raise


def _raise_interrupted(number: int, frame) -> None:
    raise Interrupted(number)
