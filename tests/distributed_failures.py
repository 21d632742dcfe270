"""A command that fails in one of the ways below, for the tests of several processes under torchrun."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import UserError
from utils.command import run_command
from utils.distributed import mean_over_processes, rank


def fail(arguments: argparse.Namespace) -> int:
    """Fail in the wanted way in process 1 while the main one waits for it."""
    if rank() == 1:
        raise UserError("this file is broken") if arguments.failure == "file" else ValueError("this is a bug")
    mean_over_processes(torch.ones(1))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("failure", choices=["file", "bug"])
    sys.exit(run_command(parser, None, fail))
