"""Trainings of a miniature network, forked from this process, that write slowly, say where they are and can be killed there.

Used by `scripts.benchmark_crashes` and by tests; a training reads its images from the neighbour `data` of its folder.
"""

import contextlib
import mmap
import os
import runpy
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import CommandError
from utils import checkpoint, experiment, train_phase, training

_REPOSITORY = Path(__file__).resolve().parent.parent
_TINY = ["--encoder", "random_vit_tiny_14", "--input_size", "64", "--crop_size", "56", "--batch_size", "4"]
_COMMON = ["--dataset", "Folder", "--data_path", "../data", "--save_dir", "runs", "--device", "cpu", "--save_every", "2"]
SYSTEMS = {  # entry script and its flags beside _COMMON
    "INP": ["Binary_INP_Single_Class", *_TINY, "--total_iters", "7"],
    "Dinomaly": ["Binary_Dinomaly", *_TINY, "--total_iters", "7"],
    "VarAD": ["VarAD", *_TINY, "--m", "1", "--total_iters", "7"],
    "RAAD": [
        *("RAAD", "--encoder", "pdn_tiny", "--teacher_weights", "random", "--image_size", "64", "--batch_size", "2"),
        *("--holdout", "0.4", "--total_iters", "5", "--finetune_iters", "5", "--recon_iters", "4"),
        *("--recon_activation_iters", "2", "--recon_batch_size", "4", "--recon_crops", "8", "--calibration_images_count", "4"),
    ],
}
COMPARED = ("model.pth", "results.csv", "scores.csv")
START, BEFORE_SAVE, BETWEEN, EVALUATION = (
    "before the training",
    "before the first save",
    "between two saves",
    "in the evaluation",
)
LAST, MODEL, OTHER = "within a save of last.pth", "within a save of model.pth", "within a save of another file"
PLACES = (START, BEFORE_SAVE, BETWEEN, LAST, MODEL, OTHER, EVALUATION)
PATIENCE = 300.0  # seconds that a command may take
_SECONDS_TO_END = 30.0  # that the other processes of a killed command may take to notice
_SLOW_WRITE, _SLOW_END = 0.01, 0.005  # seconds for some pieces of a file, and for its synchronisation and renaming
_PIECES = 500  # that torch.save writes between two pauses


@dataclass(frozen=True)
class Moment:
    """A command kills itself when it comes to a place for the `number`th time."""

    place: str
    number: int = 1


@dataclass(frozen=True)
class Training:
    """A training as the command line starts it.

    Attributes:
        folder: working folder; its neighbour `data` holds the images.
        prepare: called in the command's process before it begins.
    """

    folder: Path
    system: str = "INP"
    workers: int = 0
    ranks: int = 1
    prepare: Callable[[], None] = lambda: None

    def start(self, moment: Moment | None = None) -> "Command":
        """Begin it, or go on where it was stopped."""
        self.folder.mkdir(exist_ok=True)
        place = mmap.mmap(-1, 1)
        environments = environments_of_ranks(self.ranks)
        return Command(self, place, [self._fork(rank, environments[rank], place, moment) for rank in range(self.ranks)])

    def _fork(self, rank: int, environment: dict[str, str], place: mmap.mmap, moment: Moment | None) -> int:
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            code = self._become(rank, environment, place, moment)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _become(self, rank: int, environment: dict[str, str], place: mmap.mmap, moment: Moment | None) -> int:
        """Do in this forked process what the command line does; returns the exit code."""
        os.setsid()
        for each, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            signal.signal(each, handler)
        output = os.open(self.folder / f"output{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.folder)
        os.environ |= environment
        self.prepare()
        _observe(place, moment)
        script, *flags = SYSTEMS[self.system]
        sys.argv = [str(_REPOSITORY / f"{script}.py"), *flags, *_COMMON, "--num_workers", str(self.workers), "--resume"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else 0
        return 0

    def results(self) -> dict[str, bytes]:
        """Content of the compared files of all stages, by path below the folder."""
        paths = sorted(path for name in COMPARED for path in (self.folder / "runs").rglob(name))
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def damaged(self) -> list[str]:
        """Checkpoints that exist and do not load."""
        found = []
        for path in (self.folder / "runs").rglob("*.pth"):
            try:
                checkpoint.load_checkpoint(path)
            except CommandError as error:
                found.append(str(error))
        return found

    def output(self) -> str:
        """Last lines of what the command said."""
        texts = [path.read_text(errors="replace").splitlines()[-3:] for path in sorted(self.folder.glob("output*.txt"))]
        return " | ".join(line for lines in texts for line in lines)


@dataclass
class Command:
    """A running training: its processes by rank, and the shared byte that says where it is."""

    training: Training
    shared: mmap.mmap
    processes: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Where it is now."""
        return PLACES[self.shared[0]]

    def wait(self, seconds: float) -> bool:
        """True once all its processes have ended; `codes` has their exit codes, negative for a signal."""
        deadline = time.monotonic() + seconds
        while len(self.codes) < len(self.processes):
            for process in {*self.processes} - self.codes.keys():
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    self.codes[process] = os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        return len(self.codes) == len(self.processes)

    def send(self, number: signal.Signals, group: bool, rank: int = 0) -> None:
        """Send a signal to one of its processes, or to that one's group."""
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.processes[rank], number)

    def end(self) -> None:
        """Kill all of it."""
        for rank in range(len(self.processes)):
            self.send(signal.SIGKILL, group=True, rank=rank)
        self.wait(_SECONDS_TO_END)

    def orphans(self) -> list[int]:
        """Processes of the command that still run after a while."""
        deadline = time.monotonic() + _SECONDS_TO_END
        while (left := [each for leader in self.processes for each in members_of_session(leader)]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.05)
        return left


def environments_of_ranks(count: int) -> list[dict[str, str]]:
    """What torchrun adds to the environment of each of several processes; nothing to that of one alone."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    counts = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [{**meeting, **counts, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def members_of_session(session: int) -> list[int]:
    """Process numbers of what still runs of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, _, of, *_ = path.read_text().rpartition(") ")[2].split()
            if int(of) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


class _SlowFile:
    """A file that takes its time, so that kills hit it half-written."""

    def __init__(self, file, arrive: Callable[[], None]):
        self._file, self._arrive, self._pieces = file, arrive, 0

    def write(self, data) -> int:
        written = self._file.write(data)
        self._pieces += 1
        if self._pieces == 1:
            self._file.flush()
            self._arrive()
        if self._pieces % _PIECES == 0:
            self._file.flush()
            time.sleep(_SLOW_WRITE)
        return written

    def __getattr__(self, name: str):
        return getattr(self._file, name)


def _observe(shared: mmap.mmap, moment: Moment | None) -> None:
    """Let this process say where it is, write slowly, and kill itself at a moment."""
    counts: Counter[str] = Counter()

    def arrive(place: str) -> None:
        counts[place] += 1
        if moment and (place, counts[place]) == (moment.place, moment.number):
            os.kill(os.getpid(), signal.SIGKILL)

    @contextlib.contextmanager
    def at(place: str) -> Iterator[None]:
        before, shared[0] = shared[0], PLACES.index(place)
        yield
        shared[0] = before

    original_write, original_replace, original_sync = checkpoint.atomic_write, os.replace, os.fsync
    original_backward, original_measure = training._backward, experiment.measure

    def atomic_write(path: Path, write: Callable) -> None:
        place = {"last.pth": LAST, "model.pth": MODEL}.get(path.name, OTHER)
        with at(place):
            original_write(path, lambda file: write(_SlowFile(file, lambda: arrive(place))))
        if place == LAST:
            shared[0] = PLACES.index(BETWEEN)

    def backward(*arguments):
        if shared[0] == PLACES.index(START):
            shared[0] = PLACES.index(BEFORE_SAVE)
        arrive(PLACES[shared[0]])
        return original_backward(*arguments)

    def measure(*arguments):
        with at(EVALUATION):
            arrive(EVALUATION)
            return original_measure(*arguments)

    def slow(original: Callable) -> Callable:
        def act(*arguments):
            time.sleep(_SLOW_END)
            return original(*arguments)

        return act

    checkpoint.atomic_write, training._backward, experiment.measure = atomic_write, backward, measure
    os.replace, os.fsync = slow(original_replace), slow(original_sync)
    train_phase.count_cost = lambda *_: None  # a quarter of the time of so small a training, and nothing depends on it


def make_images(root: Path) -> None:
    """Ten good images for training, two good and two defective ones for the test, of one category."""
    generator = np.random.default_rng(0)
    stripes = 128 + 40 * np.sin(np.linspace(0, 6 * np.pi, 64))[:, None, None]
    for folder, count in (("train/good", 10), ("test/good", 2), ("test/hole", 2)):
        for index in range(count):
            image = np.clip(stripes + generator.normal(0, 6, (64, 64, 3)), 0, 255).astype(np.uint8)
            path = root / "part" / folder / f"{index}.png"
            if folder == "test/hole":
                image[20:32, 20:32] = (250, 30, 30)
                mask = np.zeros((64, 64), np.uint8)
                mask[20:32, 20:32] = 255
                _save(root / "part" / "ground_truth" / "hole" / f"{index}_mask.png", mask)
            _save(path, image)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
