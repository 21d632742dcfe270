"""Memory of training and evaluation as a category grows: the real command on synthetic images, watched from outside.

python -m scripts.benchmark_memory --images 2000 20000                      # needs Linux and a few hundred MB of disk
python -m scripts.benchmark_memory --images 2000 --variant exact            # pixel metrics from every single value
python -m scripts.benchmark_memory --images 2000 20000 --variant images     # resized images on disk, features nowhere

Anonymous memory is the command's own; file-backed memory (caches, libraries) is taken back by the system when it needs room.
Pages that processes share count once (proportional set size of the command and all its loader workers).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import ResourceError
from utils.command import run_command
from utils.converters import number
from utils.parser import tool_parser

_REPOSITORY = Path(__file__).resolve().parent.parent
_SECONDS_BETWEEN_SAMPLES = 0.05
_POOL = 48  # distinct images of each kind; all others are links to them
_SIDE = 64
_ITERATIONS = 20
_BINNED = ["--metrics_memory", "0.05"]
VARIANTS = {
    "binned": ("features on disk, binned pixel metrics", ["--cache_features", "disk", *_BINNED]),
    "exact": ("features on disk, exact pixel metrics", ["--cache_features", "disk", "--metrics_memory", "1000"]),
    "images": ("images on disk, binned pixel metrics", ["--cache_features", "off", "--cache_images", "disk", *_BINNED]),
    "uncached": ("nothing cached, binned pixel metrics", ["--cache_features", "off", *_BINNED]),
}
_KINDS = {"Pss_Anon": "anonymous", "Pss_File": "file-backed", "Pss_Shmem": "shared"}
# what a log line says about what begins with it
_PHASES = {" cache: ": "caching", f"{_ITERATIONS} iterations of": "training", f"iteration {_ITERATIONS},": "evaluation"}


@dataclass(frozen=True)
class Measurement:
    """One run: peak bytes of each kind of memory, overall and by phase, its seconds, and the bytes of its cache files."""

    peaks: dict[str, int]
    anonymous_by_phase: dict[str, int]
    seconds: float
    cache_bytes: int


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = tool_parser(__doc__)
    parser.add_argument("--images", nargs="+", type=number(int, 100), default=[2000, 20000], help="training, and as many test")
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=["binned"])
    parser.add_argument("--num_workers", type=number(int, 0), default=2, help="loader processes")
    parser.add_argument("--folder", type=Path, help="where the images and caches are made (default: temporary files)")
    return parser


def benchmark(arguments: argparse.Namespace) -> int:
    """Run every variant at every size and print one table."""
    phases = ["start", *_PHASES.values()]
    columns = ["images", "variant", *_KINDS.values(), *(f"anonymous, {phase}" for phase in phases), "cache files", "seconds"]
    print(f"Peaks in MB; {arguments.num_workers} loader workers, {_ITERATIONS} iterations, {_SIDE}-pixel images\n")
    print(_line(columns), _line(["---:"] * len(columns)), sep="\n")
    for variant in arguments.variant:
        title, flags = VARIANTS[variant]
        for count in arguments.images:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                make_category(Path(folder) / "data" / "part", count)
                measured = measure(Path(folder), flags, arguments.num_workers)
            sizes = [measured.peaks[kind] for kind in _KINDS.values()]
            sizes += [measured.anonymous_by_phase.get(phase, 0) for phase in phases]
            sizes.append(measured.cache_bytes)
            cells = [f"2 x {count}", title, *(f"{size / 1e6:.0f}" for size in sizes), f"{measured.seconds:.0f}"]
            print(_line(cells), flush=True)
    return 0


def make_category(root: Path, count: int) -> None:
    """`count` training images and as many test images, a tenth of them defective with masks."""
    generator = np.random.default_rng(0)
    _fill(root / "train" / "good", count, "", lambda: _texture(generator))
    _fill(root / "test" / "good", count - count // 10, "", lambda: _texture(generator))
    mask = np.zeros((_SIDE, _SIDE), np.uint8)
    mask[20:36, 20:36] = 255
    _fill(root / "test" / "spot", count // 10, "", lambda: np.maximum(_texture(generator), mask[..., None]))
    _fill(root / "ground_truth" / "spot", count // 10, "_mask", lambda: mask)


def _texture(generator: np.random.Generator) -> np.ndarray:
    return generator.integers(90, 160, (_SIDE, _SIDE, 3), dtype=np.uint8)


def _fill(folder: Path, count: int, suffix: str, picture: Callable[[], np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        path = folder / f"{index:06d}{suffix}.png"
        if index < _POOL:
            Image.fromarray(picture()).save(path)
        else:
            os.link(folder / f"{index % _POOL:06d}{suffix}.png", path)


def measure(folder: Path, flags: list[str], num_workers: int) -> Measurement:
    """Train and evaluate on `folder/data` and watch the memory of the command and its workers.

    Raises:
        ResourceError: the command failed; its last lines are in the message.
    """
    command = [sys.executable, str(_REPOSITORY / "Binary_INP_Single_Class.py"), "--dataset", "Folder", "--data_path"]
    command += [str(folder / "data"), "--encoder", "random_vit_tiny_14", "--input_size", "64", "--crop_size", "56"]
    command += ["--total_iters", str(_ITERATIONS), "--num_workers", str(num_workers), "--device", "cpu", "--clb_stage", "1"]
    command += ["--save_dir", str(folder / "runs"), *flags]
    started = time.perf_counter()
    lines: list[str] = []
    peaks: dict[str, int] = defaultdict(int)
    by_phase: dict[str, int] = defaultdict(int)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # beside the loader workers
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as process:
        reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)
        reader.start()
        while process.poll() is None:
            usage, phase = memory_of_tree(process.pid), _phase(lines)
            for kind, size in (usage or {}).items():
                peaks[kind] = max(peaks[kind], size)
                if kind == "anonymous":
                    by_phase[phase] = max(by_phase[phase], size)
            time.sleep(_SECONDS_BETWEEN_SAMPLES)
        reader.join()
    if process.returncode:
        raise ResourceError(f"the command to be measured ended with code {process.returncode}: {' '.join(lines[-3:]).strip()}")
    caches = [path.stat().st_size for name in ("feature_cache", "image_cache") for path in (folder / "runs" / name).glob("*")]
    return Measurement(peaks, by_phase, time.perf_counter() - started, sum(caches))


def _phase(lines: Sequence[str]) -> str:
    begun = (phase for line in reversed(lines) for sign, phase in _PHASES.items() if sign in line)
    return next(begun, "start")


def memory_of_tree(process: int) -> dict[str, int] | None:
    """Bytes by kind of memory of a process and all below it, shared pages counted once.

    None if processes began or ended meanwhile: pages that they share would be counted twice or not at all.
    """
    members = _tree(process)
    usage = dict.fromkeys(_KINDS.values(), 0)
    try:
        for member in members:
            for line in Path(f"/proc/{member}/smaps_rollup").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in _KINDS:
                    usage[_KINDS[name]] += int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return None
    return usage if members == _tree(process) else None


def _tree(process: int) -> list[int]:
    try:
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return []
    return [process, *(member for words in lists for child in words.split() for member in _tree(int(child)))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, benchmark)


if __name__ == "__main__":
    sys.exit(main())
