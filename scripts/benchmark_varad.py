"""Seconds and memory of VarAD for one image as images grow: encoder, scan and the rest of the head apart.

python -m scripts.benchmark_varad                                             # ViT-S/14 at 504, 1022 and 2044 pixels
python -m scripts.benchmark_varad --image_size 1024 --preset paper --runs 5

Weights are random, one thread, the best of the runs. Memory is the peak of a fresh process with everything in it (Linux).
"""

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

import torch

from models import state_space
from models.build import ENCODERS, build_encoder_without_weights, build_varad
from models.selective_scan import describe_backend
from models.state_space import PRESETS
from models.varad import VarADOptions
from utils.command import run_command
from utils.converters import number
from utils.parser import tool_parser
from utils.tables import format_rows
from utils.timing import describe_machine

_HEADER = ("pixels", "tokens", "preset", "encoder s", "scan s", "rest of the head s", "image s", "peak MB")


class _Stopwatch:
    """Sums the seconds that a function takes."""

    def __init__(self, function: Callable):
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments):
        started = time.perf_counter()
        result = self.function(*arguments)
        self.seconds += time.perf_counter() - started
        return result


def _measure(channel: Connection, encoder_name: str, size: int, preset: str, runs: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = build_encoder_without_weights(encoder_name, size, "random weights", "", 0, "thirds")
    detector = build_varad(encoder, VarADOptions(preset=preset)).eval()
    scan = state_space.selective_scan = _Stopwatch(state_space.selective_scan)
    image, best = torch.randn(1, 3, size, size), None
    with torch.no_grad():
        for _ in range(runs):
            scan.seconds, started = 0.0, time.perf_counter()
            features = detector.encode(image)
            encoded = time.perf_counter()
            detector.anomaly_map(features)
            head = time.perf_counter() - encoded
            times = (encoded - started, scan.seconds, head - scan.seconds)
            best = times if best is None or sum(times) < sum(best) else best
    channel.send((best, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6))


def measured_row(encoder_name: str, size: int, preset: str, runs: int) -> tuple[str, ...]:
    """One row of the table, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, encoder_name, size, preset, runs))
    process.start()
    sender.close()
    try:
        times, peak = receiver.recv()
    finally:
        process.join()
    tokens = (size // ENCODERS[encoder_name].patch_size) ** 2
    return (str(size), str(tokens), preset, *(f"{seconds:.2f}" for seconds in (*times, sum(times))), f"{peak:.0f}")


def benchmark(arguments: argparse.Namespace) -> int:
    """Measure every size and preset and print one table."""
    patch = ENCODERS[arguments.encoder].patch_size
    sizes = [max(1, size // patch) * patch for size in arguments.image_size]
    rows = [measured_row(arguments.encoder, size, preset, arguments.runs) for preset in arguments.preset for size in sizes]
    print(*describe_machine()[:2], f"scan: {describe_backend(torch.device('cpu'))}", sep="\n")
    print(f"{arguments.encoder}, one image, one thread, float32, best of {arguments.runs}")
    print(format_rows([_HEADER, *rows]))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = tool_parser(__doc__)
    parser.add_argument("--encoder", choices=list(ENCODERS), default="dinov2_vit_small_14", metavar="NAME")
    parser.add_argument("--image_size", nargs="+", type=number(int, 1), default=[512, 1024, 2048], help="as VarAD.py's")
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--runs", type=number(int, 1), default=1)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, benchmark)


if __name__ == "__main__":
    sys.exit(main())
