"""Several processes on one command, as torchrun starts them: who is who, and what they tell each other.

Without torchrun there is one process, the main one, and every function here is free. Only the main process writes files.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
_SECONDS_TO_START = 10.0  # that the main process may be later before all have met, and afterwards
_SECONDS_TO_FOLLOW = 3.0
# what gloo and NCCL say when the other side is gone; both raise plain RuntimeErrors, as torch does for wrong shapes
_LOSS_SIGNS = ("gloo/transport", "ncclRemoteError", "ncclSystemError", "NCCL communicator was aborted", "Watchdog caught")
_PEER_LOST = (
    "another process of this command ended, so all end; if it did not say why, the system killed it (out of memory?); "
    "repeat the command with --resume"
)


class PeerLost(ResourceError):
    """Another process of the command ended, and this one cannot go on alone."""

    def __init__(self, message: str = _PEER_LOST):
        super().__init__(message)


def rank() -> int:
    """Number of this process, 0 for the main one; known before the processes meet and after they part."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def world_size() -> int:
    """How many processes work on the command together, 1 before they meet."""
    return dist.get_world_size() if dist.is_initialized() else 1


def started_processes() -> int:
    """How many processes torchrun started, whether they have met or not."""
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def processes_on_this_machine() -> int:
    """How many of them share this machine's processors and GPUs."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", started_processes())) if started_by_torchrun() else 1


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
    """Join the other processes of torchrun for the length of the block; nothing without torchrun, or if that is done.

    Raises:
        UserError: the processes are spread over several machines.
    """
    if not started_by_torchrun() or dist.is_initialized():
        yield
        return
    if processes_on_this_machine() != started_processes():
        raise UserError("torchrun over several machines is not supported; give each machine some categories with --item")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    except dist.DistError as error:
        raise ResourceError(
            f"the processes of torchrun did not find each other at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
            f"({' '.join(str(error).split())[:120]}); start the command anew"
        ) from error
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the others, and may break their sentence off


@contextmanager
def peers_expected() -> Iterator[None]:
    """Around communication: the loss of another process becomes PeerLost; all other errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not is_loss_of_peer(error):
            raise
        raise PeerLost from error


def is_loss_of_peer(error: BaseException) -> bool:
    """True for what gloo and NCCL raise when another process is gone."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOSS_SIGNS)


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


@contextmanager
def only_on_main(manager: AbstractContextManager) -> Iterator[None]:
    """Enter a context manager on the main process alone; if that fails, all processes raise its error."""
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(manager) and None)
        yield


def mean_over_processes(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes."""
    if world_size() == 1:
        return values
    with peers_expected():
        values = values.clone()
        dist.all_reduce(values)
    return values / world_size()


def joined(own: list[str]) -> list[str]:
    """The lists of all processes one after the other, in order of rank, on every process."""
    if world_size() == 1:
        return own
    lists: list = [None] * world_size()
    with peers_expected():
        dist.all_gather_object(lists, own)
    return [text for part in lists for text in part]


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


def announcement(sentence: str, is_consequence: bool) -> str | None:
    """What stands before a failure's sentence, or None if another process says it.

    What all processes fail with is said by the main one; what only some fail with, they say under their number. The
    consequence of another process's end is said once, and only if no process said why it ended.
    """
    if started_processes() == 1:
        return ""
    try:
        board = _failure_board()
        if is_consequence:
            said = _appears(board, "cause", _SECONDS_TO_FOLLOW) or board.add("consequence", 1) > 1
            return None if said else ""
        board.set("cause", "")
        if rank() == 0:
            board.set("main", sentence)
            return ""
        patience = _SECONDS_TO_FOLLOW if dist.is_initialized() else _SECONDS_TO_START
        if _appears(board, "main", patience) and board.get("main").decode() == sentence:
            return None
    except RuntimeError:  # no such board: the processes were not started by torchrun itself
        pass
    return f"process {rank()}: "


def _failure_board() -> dist.Store:
    """Keys and values that torchrun itself keeps, so that they outlive its processes."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_SECONDS_TO_START))
    return dist.PrefixStore(f"failures-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _appears(board: dist.Store, key: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not board.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
