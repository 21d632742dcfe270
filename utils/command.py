"""Run a command and turn every expected failure into one sentence and an exit code."""

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from common.errors import CommandError, Interrupted, ResourceError
from utils.arguments import parse
from utils.distributed import PeerLost, announcement, is_loss_of_peer, is_main, process_group, started_processes
from utils.logs import log_to_terminal

_STOPPED = "stopped by SIGTERM; torchrun sends it, too, when another process of this command has ended"


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], int]) -> int:
    """Parse the command line, do the work, and return its exit code (see `common.errors`).

    Under torchrun every process does the work, joined in a process group; a failure is printed once.
    """
    arguments = None
    previous = signal.signal(signal.SIGTERM, _raise_interrupted)
    try:
        arguments = _parsed(parser, argv)
        log_to_terminal(getattr(arguments, "quiet", False))
        with process_group():
            return work(arguments)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, Interrupted, KeyboardInterrupt) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when another process ends: the sentence comes first
        return _report(error, getattr(arguments, "debug", False))
    finally:
        if started_processes() == 1:
            signal.signal(signal.SIGTERM, previous)


def _report(error: BaseException, debug: bool) -> int:
    """Print what went wrong, unless another process does; returns the exit code. A bug of one process alone is raised."""
    sentence, code = _sentence(error)
    if sentence is None and started_processes() == 1:
        raise error
    details = "".join(traceback.format_exception(error)) if sentence is None or (sentence and debug) else ""
    sentence = f"unexpected {type(error).__name__}: {error}" if sentence is None else sentence
    if sentence:
        before = announcement(sentence, isinstance(error, PeerLost | Interrupted) or is_loss_of_peer(error))
        if before is not None:
            print(f"{details}error: {before}{sentence}", file=sys.stderr)
    return code


def _sentence(error: BaseException) -> tuple[str | None, int]:
    """What to tell the user, "" for nothing and None for a bug, and the exit code."""
    if isinstance(error, CommandError):
        return str(error), error.exit_code
    if isinstance(error, Interrupted | KeyboardInterrupt):
        code = error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT
        return (_STOPPED if code == 128 + signal.SIGTERM and started_processes() > 1 else ""), code
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory; lower --batch_size, or in training give --cache_features disk", ResourceError.exit_code
    if is_loss_of_peer(error):
        return str(PeerLost()), PeerLost.exit_code
    return None, 1


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
