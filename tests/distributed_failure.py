"""A command of which process 1 fails while the main one waits for it, for the tests of several processes under torchrun."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import UserError
from utils.command import run_command
from utils.distributed import mean_over_processes, rank


def fail(arguments: argparse.Namespace) -> int:
    """The work of the command."""
    if rank() == 1:
        raise UserError("this file is broken")
    mean_over_processes(torch.ones(1))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(argparse.ArgumentParser(), None, fail))
