"""Several processes on one command, as torchrun starts them: who is who, and what they tell each other.

Without torchrun there is one process, the main one, and every function here is free. Only the main process writes files.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import CommandError, ResourceError, UserError

Result = TypeVar("Result")

_TIMEOUT = timedelta(hours=2)  # the longest that one process may work alone, as on the metrics of a large category
_PIECE = 1 << 24  # elements sent at a time, so that gathering needs little memory


def rank() -> int:
    """Number of this process, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes work on the command."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True for the process that writes."""
    return rank() == 0


def local_rank() -> int:
    """Number of this process on its machine: the GPU that is its own."""
    return int(os.environ.get("LOCAL_RANK", 0))


def started_by_torchrun() -> bool:
    """True if the environment describes a group of processes."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of torchrun for the length of the block; nothing without torchrun.

    Raises:
        UserError: the processes are spread over several machines.
    """
    if not started_by_torchrun():
        yield
        return
    if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
        raise UserError("torchrun over several machines is not supported; give each machine some categories with --item")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def peers_expected() -> Iterator[None]:
    """Around communication: the loss of another process becomes one sentence."""
    try:
        yield
    except CommandError:
        raise
    except RuntimeError as error:  # gloo and NCCL have no common class of their own
        raise ResourceError(
            f"process {rank()}: another process of this command ended, so all end; its own message says why; "
            f"repeat the command with --resume ({' '.join(str(error).split())[:120]})"
        ) from error


def on_main(work: Callable[[], Result]) -> Result:
    """Let the main process do some work; all processes get its result (plain objects), or raise its error."""
    if world_size() == 1:
        return work()
    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except CommandError as error:
            outcome[1] = error
    with peers_expected():
        dist.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes."""
    if world_size() == 1:
        return values
    with peers_expected():
        values = values.clone()
        dist.all_reduce(values)
    return values / world_size()


def gather_to_main(array: np.ndarray) -> Iterator[np.ndarray]:
    """On the main process its own array and then those of the others, in order of rank; nothing elsewhere.

    Arrays may differ in length but not in type; they arrive one after the other, in pieces.
    """
    if is_main():
        yield array
    for source in range(1, world_size()):
        if not is_main() and rank() != source:
            continue
        with peers_expected():
            if is_main():
                yield _received(array, source)
            else:
                _send(array)


def _send(array: np.ndarray) -> None:
    dist.send(torch.tensor(array.shape, dtype=torch.int64), 0)
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    for piece in flat.split(_PIECE):
        dist.send(piece, 0)


def _received(like: np.ndarray, source: int) -> np.ndarray:
    shape = torch.empty(like.ndim, dtype=torch.int64)
    dist.recv(shape, source)
    array = np.empty(shape.tolist(), like.dtype)
    for piece in torch.from_numpy(array.reshape(-1).view(np.uint8)).split(_PIECE):
        dist.recv(piece, source)
    return array
