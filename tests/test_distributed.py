"""Several processes under torchrun: the numbers of one process, and orderly ends."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from common.errors import Interrupted, ResourceError, UserError
from tests import distributed_work
from tests.commands import joint_errors
from tests.conftest import REPOSITORY, command_line, run_folder
from tests.miniature import make_mvtec
from tests.test_dinomaly_training import mining_weights
from tests.test_inp_former import slow_distance
from tests.test_losses import finite_differences, normal, slow_global_cosine_distance, slow_weights
from utils import devices, distributed
from utils.checkpoint import load_checkpoint
from utils.loading import default_worker_count
from utils.stopping import StopRequest
from utils.training import ShuffledBatches, iterations_per_epoch

PATIENCE = 180  # seconds, on a busy machine
ITERATIONS = (
    "--clb_stage",
    "0",
    "--total_iters",
    "42",
    "--save_every",
    "3",
)  # 18 images, global batches of 4: epochs of 4 iterations
LOST = "another process of this command ended"


def start(*words: str) -> subprocess.Popen:
    """Two processes of a Python script under torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def errors_of(process: subprocess.Popen) -> str:
    """What the processes wrote to stderr, once all have ended."""
    try:
        return process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        raise


@pytest.fixture(scope="module")
def shared(commands, tmp_path_factory) -> Path:
    """Folder with what two processes computed, and in its folder `one` what one process computed."""
    folder = tmp_path_factory.mktemp("shared")
    target = normal(4, 3, 5)
    rebuilt = np.concatenate([target[:2] + 0.1 * normal(2, 3, 5, seed=1), normal(2, 3, 5, seed=2)])  # the first half is easy
    np.savez(folder / "mining.npz", target=target, reconstruction=rebuilt)
    processes = commands.start_two("tests/distributed_work.py", str(folder))
    (folder / "one").mkdir()
    for kind in distributed_work.KINDS:
        distributed_work.train(folder / "one", kind)
    assert "Warning" not in joint_errors(processes)
    return folder


@pytest.mark.parametrize("mining", ["soft", "hard"])
def test_mining_over_two_processes_is_that_of_the_joined_batch(shared, mining):
    target, reconstruction = (np.load(shared / "mining.npz")[name] for name in ("target", "reconstruction"))
    parts = [np.load(shared / f"{mining}_mining_{number}.npz") for number in range(2)]
    assert np.mean([part["loss"] for part in parts]) == pytest.approx(
        slow_global_cosine_distance(target, reconstruction), abs=1e-12
    )
    unweighted = finite_differences(lambda values: slow_global_cosine_distance(target, values), reconstruction)
    weights = slow_weights(target, reconstruction, 3.0)
    if mining == "hard":
        weights = mining_weights(slow_distance(target, reconstruction), distributed_work.HARD_SHARE, 0.1)
    expected = unweighted * weights[:, :, None]
    gradient = np.concatenate([part["gradient"] for part in parts]) / 2  # DistributedDataParallel takes the mean
    np.testing.assert_allclose(gradient, expected, atol=1e-9)


def metrics(path: Path) -> list[dict]:
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "training"]


@pytest.mark.parametrize("seeds", [("float",), ("stage-2", "stage-2, another seed"), ("constant-gates",)], ids=lambda it: it[0])
def test_two_processes_train_as_one_with_the_doubled_batch(shared, seeds):
    found = [differences(shared, kind) for kind in seeds]
    assert [] in found, found


def differences(shared: Path, kind: str) -> list[str]:
    """Where two processes trained otherwise than one."""
    alone, together = (metrics(folder / f"{kind}.jsonl") for folder in (shared / "one", shared))
    assert len(alone) == len(together) == distributed_work.ITERATIONS
    names = ("loss", "reconstruction", "coherence", "lr")
    lines = zip(alone, together, strict=True)
    found = [f"{name} {a[name]} {b[name]}" for a, b in lines for name in names if b[name] != pytest.approx(a[name], rel=1e-5)]
    alone, first, second = (
        torch.load(path, weights_only=True)
        for path in (shared / "one" / f"{kind}_0.pth", shared / f"{kind}_0.pth", shared / f"{kind}_1.pth")
    )
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        if not torch.allclose(value.double(), first[name].double(), rtol=0, atol=1e-5):
            found.append(name)
    return found


@pytest.mark.parametrize("kind", ["stage-2", "constant-gates"])
def test_thresholds_come_from_the_whole_batch(shared, kind):
    paths = [shared / "one" / f"{kind}_thresholds_0.npz", *(shared / f"{kind}_thresholds_{number}.npz" for number in (0, 1))]
    alone, first, second = map(np.load, paths)
    assert len(alone) > 0
    for name, threshold in alone.items():
        np.testing.assert_allclose(first[name], threshold, atol=1e-6)
        np.testing.assert_array_equal(first[name], second[name])


def test_processes_share_each_batch_of_one_permutation():
    whole = list(ShuffledBatches(11, 4, seed=1, start=1, total=7))
    parts = [list(ShuffledBatches(11, 2, seed=1, start=1, total=7, part=part, parts=2)) for part in range(2)]
    assert [first + second for first, second in zip(*parts, strict=True)] == whole


@pytest.fixture
def two_processes(monkeypatch):
    """Make this process believe that it is number 1 of two that have not met."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")


def test_epochs_count_batches_of_all_processes(monkeypatch):
    monkeypatch.setattr("utils.training.world_size", lambda: 2)
    assert iterations_per_epoch(11, 2, "bottle") == 2
    with pytest.raises(UserError, match=r"11 training images, fewer than 2 processes x --batch_size 6.* --batch_size 5 or"):
        iterations_per_epoch(11, 6, "bottle")
    with pytest.raises(UserError, match="give fewer processes"):
        iterations_per_epoch(1, 6, "bottle")


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [("auto", 2, "cuda:1"), ("cuda", 3, "cuda:1"), ("cpu", 2, "cpu"), ("auto", 0, "cpu"), ("cpu", 1, "cpu")],
)
def test_every_process_has_its_own_gpu(two_processes, monkeypatch, name, gpus, expected):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert devices.choose_device(name) == torch.device(expected)
    assert chosen == ([torch.device("cuda:1")] if expected == "cuda:1" else [])


@pytest.mark.parametrize(("name", "gpus", "hint"), [("auto", 1, "--nproc_per_node 1"), ("cuda:0", 2, "give --device cuda")])
def test_processes_do_not_share_a_gpu(two_processes, monkeypatch, name, gpus, hint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=hint):
        devices.choose_device(name)


def test_processes_share_the_loader_workers(two_processes, monkeypatch):
    for processors, workers in ((16, 4), (4, 2), (1, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, count=processors: range(count))
        assert default_worker_count() == workers


def test_only_the_loss_of_a_peer_is_taken_for_one():
    with pytest.raises(ResourceError, match="another process"), distributed.peers_expected():
        raise RuntimeError("[/build/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1")
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), torch.OutOfMemoryError("CUDA out of memory")):
        with pytest.raises(type(error), match=str(error)), distributed.peers_expected():
            raise error


@pytest.fixture
def board(two_processes, monkeypatch):
    """What the processes of this test read and write in place of torchrun's store."""
    store = HashStore()
    monkeypatch.setattr(distributed, "_failure_board", lambda: store)
    for name in ("_SECONDS_TO_START", "_SECONDS_TO_FOLLOW"):
        monkeypatch.setattr(distributed, name, 0.1)
    return store


def said_by(monkeypatch, number: int, *failure) -> str | None:
    monkeypatch.setenv("RANK", str(number))
    return distributed.announcement(*failure)


def test_main_process_speaks_for_all_that_fail_alike(board, monkeypatch):
    assert said_by(monkeypatch, 0, "no data", False) == ""
    assert said_by(monkeypatch, 1, "no data", False) is None
    assert said_by(monkeypatch, 1, "disk full", False) == "process 1: "


def test_process_speaks_for_itself_where_the_main_one_says_nothing(board, monkeypatch):
    assert said_by(monkeypatch, 1, "no data", False) == "process 1: "
    assert said_by(monkeypatch, 0, LOST, True) is None  # the cause has been said


def test_unexplained_end_of_a_process_is_said_once(board, monkeypatch):
    assert [said_by(monkeypatch, number, LOST, True) for number in (2, 0, 1)] == ["", None, None]


def test_processes_without_the_store_of_torchrun_speak_for_themselves(two_processes, monkeypatch):
    monkeypatch.setattr(distributed, "_SECONDS_TO_START", 0.1)
    assert said_by(monkeypatch, 1, "no data", False) == "process 1: "


@pytest.mark.parametrize("main_says_it", [True, False])
def test_wrong_flag_is_said_by_the_main_process(board, train, capsys, main_says_it):
    if main_says_it:
        board.set("main", "command line")
    with pytest.raises(SystemExit) as stop:
        train("--total_iters", "many")
    assert stop.value.code == 2
    assert ("invalid int value: 'many'" in capsys.readouterr().err) != main_says_it


@pytest.mark.parametrize(
    ("error", "sentence", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "process 1: out of memory; lower --batch_size", 4),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection reset by peer"), LOST, 4),
        (Interrupted(signal.SIGTERM), "stopped by SIGTERM", 143),
        (Interrupted(signal.SIGINT), None, 130),
        (ValueError("a bug"), "process 1: unexpected ValueError: a bug", 1),
    ],
)
def test_errors_of_one_of_several_processes(board, train, capsys, monkeypatch, error, sentence, code):
    def raise_error(settings, host):
        raise error

    monkeypatch.setattr("utils.command.process_group", contextlib.nullcontext)
    monkeypatch.setattr("Binary_INP_Single_Class.run_experiment", raise_error)
    assert train() == code
    errors = capsys.readouterr().err
    assert (f"error: {sentence}" in errors) if sentence else errors == ""
    assert "Traceback" not in errors


def test_signals_repeated_by_torchrun_do_not_break_off_the_saving(monkeypatch):
    monkeypatch.setattr("utils.stopping.world_size", lambda: 2)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A miniature data set, and in it the run `whole` of two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("command")
    make_mvtec(folder / "data", train=18)
    process = start_command(folder, "whole")
    errors = errors_of(process)
    assert process.returncode == 0, errors
    assert errors.count("iteration 42,") == 1
    return folder


def start_command(folder: Path, save_name: str, *flags: str) -> subprocess.Popen:
    """The single-class script with two processes, `--batch_size 2` each."""
    words = command_line(folder, folder / "data", "Folder", *ITERATIONS, "--save_name", save_name, "--batch_size", "2", *flags)
    return start(str(REPOSITORY / "Binary_INP_Single_Class.py"), *words)


def weights(folder: Path, save_name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_folder(folder, save_name) / "bottle" / "model.pth")["model"]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def process_number(torchrun: subprocess.Popen, number: int) -> int:
    """Process id of one of torchrun's processes."""
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    by_number = {}
    for child in children:
        environment = dict(pair.split("=", 1) for pair in Path(f"/proc/{child}/environ").read_text().split("\0") if "=" in pair)
        by_number[environment.get("RANK")] = int(child)
    return by_number[str(number)]


def test_command_with_two_processes_matches_one_process(folder, train):
    """Rounding differences grow with every iteration, as after a change of one process's weights by 4e-16; so do the limits."""
    flags = (*ITERATIONS, "--save_name", "one", "--save_dir", str(folder / "runs"))  # --batch_size 4
    assert train(*flags, data=folder / "data") == 0
    together, alone = (metrics(run_folder(folder, name) / "metrics.jsonl") for name in ("whole", "one"))
    assert [line["iteration"] for line in together] == [line["iteration"] for line in alone] == [10, 20, 30, 40, 42]
    for first, second, limit in zip(alone, together, (1e-5, 1e-4, 1e-3, 1e-2, 1e-2), strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=limit)


def test_stopped_and_killed_runs_resume_to_the_same_weights(folder, train, capsys):
    last = run_folder(folder, "stopped") / "bottle" / "last.pth"
    process = start_command(folder, "stopped")
    wait_for(last, process)
    os.kill(process_number(process, 1), signal.SIGTERM)  # the main process hears of it from the other one
    errors = errors_of(process)
    assert process.returncode != 0
    assert "exitcode  : 143" in errors
    stopped = re.findall(r"stopped at iteration (\d+); \S+ is saved, go on with --resume", errors)
    assert [load_checkpoint(last)["iteration"]] == [int(number) for number in stopped]

    flags = (*ITERATIONS, "--save_name", "stopped", "--batch_size", "2", "--save_dir", str(folder / "runs"), "--resume")
    assert train(*flags, data=folder / "data") == 2
    assert "processes" in capsys.readouterr().err

    saved = last.stat().st_mtime_ns
    process = start_command(folder, "stopped", "--resume")
    while last.stat().st_mtime_ns == saved and process.poll() is None:
        time.sleep(0.02)
    os.kill(process_number(process, 0), signal.SIGKILL)  # the one that writes
    began = time.monotonic()
    errors = errors_of(process)
    assert time.monotonic() - began < 25  # torchrun kills after 30 seconds what does not end by itself
    assert process.returncode != 0
    assert "resumed from" in errors
    assert errors.count(f"error: {LOST}") == errors.count("error: ") == 1, errors
    assert 3 < load_checkpoint(last)["iteration"] < 42

    process = start_command(folder, "stopped", "--resume")
    errors = errors_of(process)
    assert process.returncode == 0, errors
    resumed, whole = weights(folder, "stopped"), weights(folder, "whole")
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []
    assert [line["iteration"] for line in metrics(run_folder(folder, "stopped") / "metrics.jsonl")] == [10, 20, 30, 40, 42]


def test_failure_of_one_process_is_said_under_its_number():
    process = start(str(REPOSITORY / "tests" / "distributed_failure.py"))
    errors = errors_of(process)
    assert process.returncode != 0
    assert errors.count("error: process 1: this file is broken") == errors.count("error: ") == 1, errors
    assert "exitcode  : 2 " in errors
    assert "exitcode  : 4 " in errors  # the main process, which waited for it


def test_missing_data_is_said_once(folder):
    """Of VarAD, whose --m torchrun would take for itself without the two dashes."""
    words = command_line(folder, folder / "nowhere", "Folder", "--m", "1")
    process = start("--", str(REPOSITORY / "VarAD.py"), *words)
    errors = errors_of(process)
    assert process.returncode != 0
    assert errors.count("error: ") == errors.count(str(folder / "nowhere")) == 1, errors
