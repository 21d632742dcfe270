"""The C sources under AddressSanitizer and UndefinedBehaviorSanitizer: the sizes of the tests, and random ones for a while.

    python -m tests.sanitizers --random 600 --seed 1

compiles both sources with the sanitizers, runs every operator on every path of this CPU, compares each result with the slow
formula (kernel_cases.py, scan_cases.py), and prints how often each was called. A finding, or a wrong result, ends it with 1.
"""

import argparse
import ctypes
import itertools
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.c_library import CompilationError, compile_sources, find_compiler
from tests import kernel_cases, scan_cases

REPOSITORY = Path(__file__).resolve().parent.parent
_KERNELS = REPOSITORY / "binarize" / "kernels"
SOURCES = {
    "kernels": [_KERNELS / "kernels.c", *sorted(_KERNELS.glob("*.h"))],
    "scan": [REPOSITORY / "models" / name for name in ("scan_kernel.c", "scan_path.h")],
}
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]
FINDINGS = ("ERROR: AddressSanitizer", "runtime error:")


@dataclass(frozen=True)
class Sanitizer:
    """A compiler, the address sanitizer's library, which must be loaded before the process starts, and the flags for that."""

    compiler: str
    runtime: str
    flags: list[str] = field(default_factory=list)

    def compile(self, name: str, folder: Path, sources: list[Path] | None = None) -> Path:
        """One of the two libraries, or what a test has made of its sources."""
        options = [*FLAGS, *self.flags]
        try:  # as for users, threads are used where they can be
            return compile_sources(name, sources or SOURCES[name], self.compiler, folder, ["-fopenmp", *options])
        except CompilationError:
            return compile_sources(name, sources or SOURCES[name], self.compiler, folder, options)

    def run(self, libraries: dict[str, Path], *flags: str) -> subprocess.CompletedProcess[str]:
        """Run the cases of some libraries in a process that is watched."""
        command = [sys.executable, "-m", "tests.sanitizers", *flags]
        command += [word for name, path in libraries.items() for word in ("--library", f"{name}={path}")]
        environment = {**os.environ, "LD_PRELOAD": self.runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def find_sanitizer() -> tuple[Sanitizer | None, str]:
    """What this machine has, and a sentence if it lacks something."""
    compiler = find_compiler()
    if compiler is None:
        return None, "there is no C compiler"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    name, flags = "libasan.so", []
    if "clang" in version:
        name, flags = f"libclang_rt.asan-{platform.machine()}.so", ["-shared-libasan"]
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file() or Path(found).read_bytes()[:4] != b"\x7fELF":
        return None, f"{compiler} has no address sanitizer ({name})"
    return Sanitizer(compiler, found, flags), ""


def near(random: np.random.Generator, most: int, *steps: int) -> int:
    """A number from 1 to `most`, as often as not within one of a multiple of one of the steps."""
    if random.random() < 0.5:
        return int(random.integers(1, most + 1))
    step = int(random.choice(steps))
    return int(np.clip(step * random.integers(0, most // step + 1) + random.integers(-1, 2), 1, most))


def random_sizes(random: np.random.Generator) -> dict[str, tuple]:
    """One size of each kind, under the names that the cases look up; products of them stay small."""
    rows, width = int(random.choice([0, near(random, 100, 8, 32)], p=[0.02, 0.98])), near(random, 700, 16, 32, 64)
    heads, tokens = int(random.integers(1, 4)), near(random, 200, 16)
    return {
        "ROWS": (rows,),
        "INPUTS": (int(random.choice([width, near(random, 3000, 32, 64)], p=[0.9, 0.1])),),
        "OUTPUTS": (near(random, 200, 32, 64),),
        "VECTOR_WIDTHS": (width,),
        "PROTOTYPES": (near(random, 64, 8, 16),),
        "HEAD_WIDTHS": (near(random, 100, 4, 8, 16),),
        "TOKENS": (near(random, 60, 16),),
        "ATTENDED_IMAGES": (int(random.integers(1, 4)),),
        "WIDE_PROTOTYPE_ATTENTION": (),
        "LINEAR_ROWS": ((int(random.integers(1, 4)), tokens),),
        "LINEAR_HEAD_WIDTHS": (near(random, 100, 4, 8, 16, 32),),
        "WIDE_LINEAR_ATTENTION": (),
        "PROJECTED_ROWS": ((int(random.integers(0, 3)), near(random, 100, 16)),),
        "PROJECTED_HEADS": ((heads, 32 * int(random.integers(1, 4))),),
        "BLOCK_WIDTHS": ((near(random, 200, 32, 64), near(random, 300, 32, 64)),),
        "SOFTMAX_TOKENS": (tokens,),
        "SOFTMAX_HEAD_WIDTHS": (32 * int(random.integers(1, 5)),),
        "NORM_ERROR": 1e-4,
        "MOST_UNDECIDED": 1.0,  # of few numbers, all may be
    }


SIZED = {  # cases that look up sizes, and how small their rows may be: layer norm of a few numbers is badly conditioned
    **dict.fromkeys(("pack", "linear", "linear_in_place", "linear_to_bits", "quantize", "gelu_quantize", "rescale"), 1),
    **dict.fromkeys(("prototype_attention", "linear_attention", "project_and_attend", "softmax_attention"), 1),
    **dict.fromkeys(("layer_norm_pack", "layer_norm_quantize", "project_and_transform"), 32),
}


class CountingKernels(kernel_cases.CKernels):
    """One path of the kernels that counts what it computes, by operator."""

    def __init__(self, library: ctypes.CDLL, path: str, threads: int, counts: Counter[str]):
        super().__init__(library, path, threads)
        self._counts = counts

    def _run(self, name: str, *arguments: np.ndarray | int | float | None) -> None:
        super()._run(name, *arguments)
        self._counts[name] += 1


def fixed_kernels(library: ctypes.CDLL, counts: Counter[str]) -> None:
    """Every case with the sizes of the tests."""
    paths = kernel_cases.PATHS_OF_BEST[library.binaryad_best_isa()]
    for threads, path, case in itertools.product(kernel_cases.THREADS, paths, kernel_cases.CASES_FOR_C):
        case(CountingKernels(library, path, threads, counts))


def random_kernels(library: ctypes.CDLL, random: np.random.Generator, counts: Counter[str]) -> None:
    """One case on one path with sizes of its own."""
    path = str(random.choice(kernel_cases.PATHS_OF_BEST[library.binaryad_best_isa()]))
    case = random.choice([case for case in kernel_cases.CASES_FOR_C if case.__name__ in SIZED])
    sizes, least = random_sizes(random), SIZED[case.__name__]
    for name in ("INPUTS", "VECTOR_WIDTHS"):
        sizes[name] = (max(sizes[name][0], least),)
    sizes["BLOCK_WIDTHS"] = tuple((max(width, least), hidden) for width, hidden in sizes["BLOCK_WIDTHS"])
    usual = {name: getattr(kernel_cases, name) for name in sizes}
    vars(kernel_cases).update(sizes)
    try:
        case(CountingKernels(library, path, int(random.choice(kernel_cases.THREADS)), counts))
    finally:
        vars(kernel_cases).update(usual)
    for function in vars(kernel_cases).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def fixed_scans(library: ctypes.CDLL, counts: Counter[str]) -> None:
    """The scan and its gradients around the sizes of its chunks, blocks and vectors."""
    for path, threads, sizes in itertools.product(scan_cases.paths(library), scan_cases.THREADS, scan_cases.SIZES):
        scan_cases.check(scan_cases.CScan(library, path, threads), np.random.default_rng(list(sizes)), sizes)
        counts["selective_scan"] += 1


def random_scans(library: ctypes.CDLL, random: np.random.Generator, counts: Counter[str]) -> None:
    """The scan and its gradients on one path with sizes of their own."""
    path, threads = str(random.choice(scan_cases.paths(library))), int(random.choice(scan_cases.THREADS))
    length, channels, states = near(random, 60, 16), near(random, 300, 4, 8, 16, 128), near(random, 24, 16)
    sizes = (int(random.integers(1, 4)), int(random.integers(1, 5)), length, channels, states)
    scan_cases.check(scan_cases.CScan(library, path, threads), random, sizes)
    counts["selective_scan"] += 1


FIXED = {"kernels": fixed_kernels, "scan": fixed_scans}
RANDOM = {"kernels": random_kernels, "scan": random_scans}
SHARES = {"kernels": 0.9, "scan": 0.1}  # of the random cases; the kernels are more operators


def run_cases(libraries: dict[str, ctypes.CDLL], options: argparse.Namespace) -> Counter[str]:
    """All cases of the tests unless `--no-fixed`, then random ones; how many calls each operator had.

    Raises:
        kernel_cases.Mismatch: a result is wrong.
    """
    counts: Counter[str] = Counter()
    for name, library in libraries.items() if options.fixed else ():
        FIXED[name](library, counts)
    random = np.random.default_rng(options.seed)
    names, shares = list(libraries), np.array([SHARES[name] for name in libraries])
    end, done = time.monotonic() + options.random, 0
    while done < options.count or time.monotonic() < end:
        name = random.choice(names, p=shares / shares.sum())
        RANDOM[name](libraries[name], random, counts)
        done += 1
    return counts


def watched_main(options: argparse.Namespace) -> int:
    """Run the cases of the libraries in this process, which must have the sanitizer loaded."""
    paths = dict(word.split("=", 1) for word in options.library)
    libraries = {name: ctypes.CDLL(path) for name, path in paths.items()}
    try:
        counts = run_cases(libraries, options)
    except kernel_cases.Mismatch as error:
        print(error, file=sys.stderr)
        return 1
    names = {"kernels": "binaryad_best_isa", "scan": "scan_best_path"}
    best = {name: getattr(library, names[name])() for name, library in libraries.items()}
    found = [f"kernels on {' '.join(kernel_cases.PATHS_OF_BEST[best['kernels']])}"] if "kernels" in best else []
    found += [f"scan on {' '.join(scan_cases.paths(libraries['scan']))}"] if "scan" in best else []
    shapes = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    print(f"no findings, seed {options.seed}, {', '.join(found)}: {sum(counts.values())} calls: {shapes}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Compile, run, and print what the watched process said."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--random", type=float, default=0, metavar="SECONDS", help="random sizes for so long (default: 0)")
    parser.add_argument("--count", type=int, default=0, help="at least so many random sizes (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random sizes (default: 0)")
    parser.add_argument("--no-fixed", dest="fixed", action="store_false", help="not the sizes of the tests")
    parser.add_argument("--library", action="append", default=[], metavar="NAME=PATH", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.library:
        return watched_main(options)
    sanitizer, reason = find_sanitizer()
    if sanitizer is None:
        print(reason, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        libraries = {name: sanitizer.compile(name, Path(folder)) for name in SOURCES}
        done = sanitizer.run(libraries, *(sys.argv[1:] if arguments is None else arguments))
    print(done.stderr, end="", file=sys.stderr)
    print(done.stdout, end="")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
