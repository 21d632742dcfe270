"""SIGINT and SIGTERM as wishes that a loop fulfils where it can, in all processes at the same place."""

import signal
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common.errors import Interrupted
from utils.distributed import mean_over_processes, world_size

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, so that the loop can save; the second one ends at once.

    With several processes a second one is no second wish: torchrun signals all of them as soon as one has ended.
    """

    signal_number: int | None = None
    _previous: dict = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agree(self, values: Tensor) -> tuple[list[float], int | None]:
        """Means of some values (n,) over all processes, and the signal that any of them has received."""
        received = torch.tensor([self.signal_number == number for number in _SIGNALS], dtype=torch.float64)
        *means, interrupt, terminate = mean_over_processes(torch.cat([values.double().cpu(), received])).tolist()
        return means, signal.SIGINT if interrupt else signal.SIGTERM if terminate else None

    def _receive(self, number: int, frame) -> None:
        if self.signal_number is not None and world_size() == 1:
            raise Interrupted(number)
        self.signal_number = number
