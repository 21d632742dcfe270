"""Run a command and turn every expected failure into one sentence and an exit code."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence

import torch

from common.errors import CommandError, Interrupted
from utils.arguments import parse
from utils.logs import log_to_terminal


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], int]) -> int:
    """Parse the command line, do the work, and return its exit code (see `common.errors`)."""
    arguments = None
    previous = signal.signal(signal.SIGTERM, _raise_interrupted)
    try:
        arguments = parse(parser, argv)
        log_to_terminal(getattr(arguments, "quiet", False))
        return work(arguments)
    except CommandError as error:
        if getattr(arguments, "debug", False):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (MemoryError, torch.OutOfMemoryError):
        print("error: out of memory; lower --batch_size, or in training give --cache_features disk", file=sys.stderr)
        return 4
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        signal.signal(signal.SIGTERM, previous)


def _raise_interrupted(number: int, frame) -> None:
    raise Interrupted(number)
