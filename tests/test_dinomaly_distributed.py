"""Dinomaly in two processes: hard tokens are chosen in the whole batch of all processes, which draw different noise."""

import json
from pathlib import Path

import pytest
import torch

import utils.training
from tests.commands import joint_errors
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from utils.training import _noise_seed

ITERATIONS = 8
FLAGS = ("--clb_stage", "0", "--total_iters", str(ITERATIONS), "--bottleneck_dropout", "0", "--mining_warmup", "2")
SCRIPT = """import sys
import Binary_Dinomaly, utils.settings
utils.settings._LOG_EVERY = 1
sys.exit(Binary_Dinomaly.main())
"""


def losses(folder: Path) -> list[float]:
    lines = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if line["kind"] == "training"]
    assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1))
    return [line["loss"] for line in lines]


def test_two_processes_mine_and_learn_as_one_with_the_doubled_batch(train_dinomaly, commands, tmp_path, monkeypatch):
    data = make_mvtec(tmp_path / "data", train=10, good=1, defective=1)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    flags = (*FLAGS, "--save_name", "dinomaly-together", "--batch_size", "2", "--quiet")
    processes = commands.start_two(str(script), *command_line(tmp_path, data, "Folder", *flags))
    monkeypatch.setattr("utils.settings._LOG_EVERY", 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert train_dinomaly(*FLAGS, "--save_name", "dinomaly-alone", "--batch_size", "4", "--quiet", data=data) == 0
    torch.set_num_threads(threads)
    joint_errors(processes)
    alone, together = (losses(run_folder(tmp_path, f"dinomaly-{name}")) for name in ("alone", "together"))
    assert together == pytest.approx(alone, rel=1e-5)


def test_every_process_iteration_and_seed_draws_its_own_noise(monkeypatch):
    seeds = []
    monkeypatch.setattr(utils.training, "world_size", lambda: 3)
    for process in range(3):
        monkeypatch.setattr(utils.training, "rank", lambda process=process: process)
        seeds += [_noise_seed(seed, iteration) for seed in (1, 2, 2**32 - 1) for iteration in (0, 1, 49_999)]
    assert len(set(seeds)) == 27
    assert max(seeds) < 2**64  # what torch takes
    noise = []
    for seed in seeds[:2]:
        torch.manual_seed(seed)
        noise.append(torch.rand(4))
    assert not torch.equal(*noise)
