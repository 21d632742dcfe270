"""Seconds and memory of the selective scan's backends on the CPU, forward and with all six gradients.

python -m scripts.benchmark_scan                   # 5329 tokens (73 x 73), 768 channels, 16 and 64 states

Seconds are CPU time of one thread. Memory is the peak of a fresh process above what it holds with the inputs, results included.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models import scan_compiled
from models.selective_scan import describe_backend, selective_scan
from utils.command import run_command
from utils.converters import number
from utils.parser import tool_parser
from utils.tables import format_rows
from utils.timing import describe_machine, interleaved_medians

LENGTH, CHANNELS = 5329, 768
_WARM_LENGTH = 64


def example(length: int, channels: int, states: int) -> list[Tensor]:
    """Six tensors of one image and one direction, sized as in a VarAD block before training, and the gradient of y."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    decay = -torch.arange(1.0, states + 1).repeat(1, channels, 1)
    matrices = [normal(1, 1, length, states) for _ in range(2)]
    step = F.softplus(normal(1, 1, length, channels) - 4)
    tensors = [normal(1, 1, length, channels), step, decay, *matrices, normal(1, channels)]
    return [*(values.requires_grad_() for values in tensors), normal(1, 1, length, channels)]


def forward(backend: str, tensors: list[Tensor]) -> None:
    """The scan as inference runs it."""
    with torch.no_grad():
        selective_scan(*tensors[:-1], backend=backend)


def with_gradients(backend: str, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The scan and all its gradients."""
    outputs = selective_scan(*tensors[:-1], backend=backend)
    return (outputs, *torch.autograd.grad(outputs, tensors[:-1], tensors[-1]))


def _report_peak(channel: Connection, backend: str, length: int, channels: int, states: int) -> None:
    torch.set_num_threads(1)
    with_gradients(backend, example(min(length, _WARM_LENGTH), channels, states))  # loads and sets up what all share
    tensors = example(length, channels, states)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status_kilobytes("VmRSS")
    results = with_gradients(backend, tensors)
    channel.send(_status_kilobytes("VmHWM") - before)
    del results


def _status_kilobytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def peak_megabytes(backend: str, length: int, channels: int, states: int) -> float:
    """Peak memory of forward and backward in a fresh process, above what it holds with the inputs; needs Linux."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(sender, backend, length, channels, states))
    process.start()
    sender.close()
    try:
        return receiver.recv() * 1024 / 1e6
    finally:
        process.join()


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure every backend that runs here and print one table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [("backend", "states", "forward s", "forward+backward s", "of compiled", "peak MB")]
    backends = ["torch"] if scan_compiled.load_library() is None else ["torch", "compiled"]
    for states in arguments.states:
        tensors = example(arguments.length, arguments.channels, states)
        calls = {(backend, work): partial(work, backend, tensors) for backend in backends for work in (forward, with_gradients)}
        seconds = interleaved_medians(calls, arguments.runs)
        for backend in backends:
            alone, both = seconds[backend, forward], seconds[backend, with_gradients]
            ratio = f"{both / seconds['compiled', with_gradients]:.2f}" if "compiled" in backends else "-"
            peak = peak_megabytes(backend, arguments.length, arguments.channels, states)
            rows.append((backend, str(states), f"{alone:.3f}", f"{both:.3f}", ratio, f"{peak:.0f}"))
    print(*describe_machine()[:2], f"auto on this CPU: {describe_backend(torch.device('cpu'))}", sep="\n")
    print(f"{arguments.length} tokens, {arguments.channels} channels, one image and direction, median of {arguments.runs}")
    print(format_rows(rows))
    torch.set_num_threads(threads)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = tool_parser(__doc__)
    parser.add_argument("--length", type=number(int, 1), default=LENGTH, help="tokens")
    parser.add_argument("--channels", type=number(int, 1), default=CHANNELS)
    parser.add_argument("--states", nargs="+", type=number(int, 1), default=[16, 64], help="per channel")
    parser.add_argument("--runs", type=number(int, 1), default=3)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, benchmark)


if __name__ == "__main__":
    sys.exit(main())
