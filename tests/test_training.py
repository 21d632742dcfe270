"""The order of batches, mixed precision, and what the loop writes while it runs."""

import json

import pytest
import torch

import utils.training
from tests.conftest import run_folder
from utils.training import ShuffledBatches


def test_every_epoch_is_another_permutation_without_its_incomplete_batch():
    batches = list(ShuffledBatches(10, 3, seed=1, start=0, total=9))
    assert [len(batch) for batch in batches] == [3] * 9
    epochs = [[index for batch in batches[start : start + 3] for index in batch] for start in (0, 3, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(ShuffledBatches(10, 3, seed=2, start=0, total=3)) != batches[:3]


@pytest.mark.parametrize("start", [0, 1, 4, 8, 9])
def test_order_does_not_depend_on_where_training_resumes(start):
    batches = list(ShuffledBatches(10, 3, seed=1, start=0, total=9))
    resumed = ShuffledBatches(10, 3, seed=1, start=start, total=9)
    assert list(resumed) == batches[start:]
    assert len(resumed) == 9 - start


def test_bfloat16_trains_close_to_float32(train, tmp_path, mvtec):
    losses = {}
    for precision in ("fp32", "bf16"):
        assert train("--total_iters", "10", "--precision", precision, "--save_name", precision, data=mvtec) == 0
        lines = map(json.loads, (run_folder(tmp_path, precision) / "metrics.jsonl").read_text().splitlines())
        losses[precision] = next(line["loss"] for line in lines if line["kind"] == "training")
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_checkpoints_come_at_their_interval_and_go_when_the_category_is_done(train, tmp_path, mvtec, monkeypatch):
    saved = []
    original = utils.training.save_training_state

    def save(path, detector, optimizer, iteration, identity):
        saved.append(iteration)
        original(path, detector, optimizer, iteration, identity)

    monkeypatch.setattr(utils.training, "save_training_state", save)
    assert train("--total_iters", "8", "--save_every", "3", data=mvtec) == 0
    assert saved == [3, 6, 8]
    assert not (run_folder(tmp_path) / "bottle" / "last.pth").exists()


def test_stored_model_is_on_the_cpu_and_opens_without_pickle(train, tmp_path, mvtec):
    assert train("--total_iters", "4", data=mvtec) == 0
    content = torch.load(run_folder(tmp_path) / "bottle" / "model.pth", weights_only=True)
    assert all(value.device.type == "cpu" for value in content["model"].values())
    assert content["config"]["crop_size"] == 56
    assert content["calibration"]["map_median"] < content["calibration"]["map_limit"]
