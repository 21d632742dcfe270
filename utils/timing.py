"""Fair timing on a noisy machine: variants take turns, medians are compared within one run."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from binarize.kernels.engine import describe_path

_TOLD_FLAGS = ("avx2", "avx512f", "avx512_vpopcntdq", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimd", "asimddp")


def interleaved_medians(variants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each call, one warm-up and then `repeats` rounds in which every variant runs once.

    With one thread it is the thread's CPU time, which other programs do not lengthen; else wall-clock time.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats + 1):
        for name, call in variants.items():
            started = clock()
            call()
            seconds = clock() - started
            if turn:
                samples[name].append(seconds)
    return {name: statistics.median(values) for name, values in samples.items()}


def describe_machine() -> list[str]:
    """CPU, its flags that matter here, threads, versions and the path of the 1-bit kernels, a line each."""
    threads = torch.get_num_threads()
    clock = "CPU time of the thread" if threads == 1 else "wall-clock time"
    return [
        f"CPU: {_cpu_name()}, {platform.machine()}, flags: {' '.join(_cpu_flags()) or 'unknown'}",
        f"torch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()}), {threads} thread(s), medians of {clock}",
        f"1-bit layers: {describe_path()}",
    ]


def _cpu_information(key: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == key), "")


def _cpu_name() -> str:
    return _cpu_information("model name") or platform.processor() or "unknown"


def _cpu_flags() -> list[str]:
    present = set((_cpu_information("flags") or _cpu_information("Features")).split())
    return [flag for flag in _TOLD_FLAGS if flag in present]
