"""One model of many categories in two processes: trained, measured and reported as by one."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.commands import joint_errors
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from tests.test_distributed import metrics
from utils.checkpoint import load_checkpoint

ITEMS = ("bottle", "nut")
FLAGS = {
    "Binary_INP_Multi_Class": ("--total_iters", "4", "--clb_stage", "0"),
    "Binary_INP_Few_Shot": ("--total_iters", "4", "--clb_stage", "1", "--shot", "2", "--cache_features", "off"),
}


@pytest.fixture(params=FLAGS)
def script(request) -> str:
    return request.param


@pytest.fixture
def single(script, train_multi, train_few):
    """The same script in this process, with as many threads as each of the two has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train_few if script == "Binary_INP_Few_Shot" else train_multi
    torch.set_num_threads(threads)


def folder_of(tmp_path: Path, script: str, save_name: str) -> Path:
    return run_folder(tmp_path, f"{save_name}-2" if script == "Binary_INP_Few_Shot" else save_name)


def assert_told_once(errors: str, log: str) -> None:
    """Both processes write to one terminal: it shows every message of the log as often as the log itself does."""
    messages = re.findall(r"^\S+ \S+ (?:INFO|WARNING) (.+)", log, flags=re.MULTILINE)
    assert any("iteration 4, loss" in message for message in messages)
    told = Counter(line for line in re.split(r"[\r\n]", errors) if line in messages)
    assert told == Counter(messages)
    assert "process 1:" not in errors


def test_two_processes_train_and_measure_as_one(script, single, commands, tmp_path):
    data = make_mvtec(tmp_path / "data", items=ITEMS, train=5, good=4)
    flags = (*FLAGS[script], "--save_name", "together", "--batch_size", "2")
    processes = commands.start_two(f"{script}.py", *command_line(tmp_path, data, "Folder", *flags))
    assert single(*FLAGS[script], "--save_name", "alone", "--batch_size", "4", data=data) == 0
    errors = joint_errors(processes)
    together, alone = (folder_of(tmp_path, script, name) for name in ("together", "alone"))
    assert_told_once(errors, (together / "log.txt").read_text())

    first, second = (metrics(folder / "metrics.jsonl") for folder in (alone, together))
    assert [line["iteration"] for line in first] == [line["iteration"] for line in second] == [4]
    assert second[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)
    assert load_checkpoint(together / "model.pth")["items"] == list(ITEMS)

    tables = [together / "results.csv", *(together / item / "scores.csv" for item in ITEMS)]
    sharded = [table.read_bytes() for table in tables]
    for table in tables:
        table.unlink()
    assert single("--phase", "test", *flags, data=data) == 0
    assert [table.read_bytes() for table in tables] == sharded
