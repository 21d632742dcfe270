"""SIGINT and SIGTERM at any place, to a process and to its group: saved, no orphans, and the same files in the end."""

import signal
from functools import cache
from pathlib import Path

import pytest

from tests.entry_scripts import DINOMALY, INP_SINGLE, RAAD, VARAD, EntryScript
from tests.miniature import make_mvtec
from tests.test_faults_of_processes import every_host, plug
from utils.checkpoint import load_checkpoint
from utils.killed_trainings import members_of_session

OF_ITS_TIME = ("env.json", "log.txt", "metrics.jsonl")  # they say when a command ran, and how long it took
ALL_STAGES = (
    *("--stage", "all", "--finetune_iters", "4", "--recon_iters", "4", "--recon_activation_iters", "2"),
    *("--recon_batch_size", "4", "--recon_crops", "8", "--calibration_images_count", "4"),
)
FURTHER = {INP_SINGLE: (), DINOMALY: (), VARAD: (), RAAD: ALL_STAGES}


class Place:
    """Working folders beside one data set, in each of which the same command line gives the same files."""

    def __init__(self, commands, root: Path):
        self._commands, self.root = commands, root
        make_mvtec(root / "data", good=2, defective=2)
        self.whole = cache(self._whole)

    def start(self, name: str, script: EntryScript, *flags: str, **options):
        """The script's tiny run in a working folder; what it writes is checked by `files`."""
        (self.root / name).mkdir(exist_ok=True)
        words = script.words(Path(), Path("../data"), *FURTHER[script], *flags)
        return self._commands.start(*words, cwd=self.root / name, **options)

    def files(self, name: str) -> dict[str, bytes]:
        """Content of all files whose bytes the command line alone decides."""
        runs = self.root / name / "runs"
        found = (path for path in runs.rglob("*") if path.is_file() and path.name not in OF_ITS_TIME)
        return {str(path.relative_to(runs)): path.read_bytes() for path in found if "cache" not in path.parent.name}

    def _whole(self, script: EntryScript) -> dict[str, bytes]:
        finished = self.start(f"whole-{script.name}", script).wait()
        assert finished.code == 0, finished.err
        return self.files(f"whole-{script.name}")


@pytest.fixture(scope="module")
def place(commands, tmp_path_factory):
    return Place(commands, tmp_path_factory.mktemp("place"))


def different(first: dict[str, bytes], second: dict[str, bytes]) -> list[str]:
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


@every_host
def test_same_command_gives_the_same_files_byte_for_byte(place, script):
    assert place.start(f"again-{script.name}", script).wait().code == 0
    whole = place.whole(script)
    assert {Path(name).name for name in whole} >= {"model.pth", "results.csv", "scores.csv", "config.yaml"}
    assert different(whole, place.files(f"again-{script.name}")) == []


def test_number_of_loader_processes_changes_nothing(place):
    tables = {}
    for workers in ("0", "2"):
        name = f"workers-{workers}"
        assert place.start(name, INP_SINGLE, "--num_workers", workers, "--cache_features", "off").wait().code == 0
        tables[workers] = {
            path: content for path, content in place.files(name).items() if path.endswith((".pth", ".csv", ".jpg"))
        }
    assert different(tables["0"], tables["2"]) == []


@pytest.mark.parametrize(
    ("script", "work", "call", "number", "target", "workers"),
    [
        (INP_SINGLE, "training", 3, "SIGINT", "process", 0),
        (INP_SINGLE, "training", 3, "SIGTERM", "process", 2),
        (INP_SINGLE, "training", 3, "SIGINT", "group", 2),
        (INP_SINGLE, "training", 3, "SIGTERM", "group", 2),
        (INP_SINGLE, "loading", 1, "SIGTERM", "group", 2),
        (INP_SINGLE, "unloading", 1, "SIGTERM", "group", 2),  # of what computes features for the cache
        (INP_SINGLE, "unloading", 3, "SIGTERM", "process", 2),  # of the training
        (INP_SINGLE, "evaluation", 1, "SIGTERM", "process", 0),
        (INP_SINGLE, "evaluation", 3, "SIGTERM", "group", 2),
        (RAAD, "quantization", 2, "SIGTERM", "group", 2),
    ],
)
def test_stopped_and_resumed_command_leaves_the_same_files(place, script, work, call, number, target, workers):
    name = f"{script.name}-{work}-{call}-{number}-{target}-{workers}"
    flags = ("--num_workers", str(workers))
    running = place.start(name, script, *flags, plug=plug("signal_in", work, call, number, target))
    stopped = running.wait(60)
    assert stopped.code == 128 + signal.Signals[number], stopped.err
    assert "Traceback" not in stopped.err
    assert "error: " not in stopped.err
    assert members_of_session(running.pid) == []
    left = {path.name for path in (place.root / name / "runs").rglob("*")}
    assert not [each for each in left if each.endswith((".tmp", ".lock"))]
    if work == "training":
        assert "--resume" in stopped.err
        (last,) = (place.root / name / "runs").rglob("last.pth")
        assert load_checkpoint(last)["iteration"] == (3 if script is INP_SINGLE else 2)
    resumed = place.start(name, script, *flags, "--resume").wait()
    assert resumed.code == 0, resumed.err
    found, whole = (
        {path: content for path, content in files.items() if not path.endswith("config.yaml")}
        for files in (place.files(name), place.whole(script))
    )
    assert different(found, whole) == []
