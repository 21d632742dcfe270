"""Bad input: one clear sentence, the right exit code, and nothing lost."""

import csv
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

import Binary_INP_Single_Class
import models.encoder
from models.inp_former import INPFormer
from tests.commands import Finished
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from utils.checkpoint import load_checkpoint

ITERATIONS = ("--total_iters", "4")


@pytest.fixture
def run(commands, tmp_path):
    """Run the single-class script as a user does. Outputs go to tmp_path/runs."""

    def call(*flags: str, data: Path | None = None, dataset: str = "Folder") -> Finished:
        return commands.run("Binary_INP_Single_Class.py", *command_line(tmp_path, data, dataset, *flags))

    return call


@pytest.fixture
def train(run):
    """Exit code of `run`."""
    return lambda *flags, **options: run(*flags, **options).code


@pytest.fixture
def fails(run):
    """A command that must fail; returns its one sentence."""

    def call(*flags: str, code: int = 2, **options) -> str:
        finished = run(*ITERATIONS, *flags, **options)
        assert finished.code == code, finished.err
        return finished.sentence

    return call


@pytest.fixture
def train_here(tmp_path):
    """`train` in this process, whose functions a test replaces."""
    return lambda *flags, data: Binary_INP_Single_Class.main(command_line(tmp_path, data, "Folder", *flags))


@pytest.fixture
def fails_here(train_here, capsys):
    """`fails` in this process."""

    def call(*flags: str, data: Path, code: int = 2) -> str:
        assert train_here(*ITERATIONS, *flags, data=data) == code
        (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        return sentence

    return call


def results(tmp_path, **options) -> dict[str, dict]:
    return {row["item"]: row for row in csv.DictReader((run_folder(tmp_path, **options) / "results.csv").open())}


def test_missing_data(fails, tmp_path, mvtec):
    assert "--data_path" in fails()
    message = fails(dataset="MVTec-AD", data=mvtec)
    assert str(mvtec / "carpet" / "train" / "good") in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("good", "defective"), [(3, 0), (0, 3)])
def test_one_class_alone_gives_empty_cells(run, tmp_path, good, defective):
    finished = run(*ITERATIONS, data=make_mvtec(tmp_path / "data", good=good, defective=defective))
    assert finished.code == 0, finished.err
    for row in results(tmp_path).values():
        assert (row["I-AUROC"], row["I-AP"], row["I-F1"]) == ("", "", "")
        assert (row["AUPRO"] == "") == (defective == 0)
    assert "n/a" in finished.err
    assert "one class" in finished.err


def test_photographs_without_test_set_train_a_model(train, tmp_path):
    data = make_mvtec(tmp_path / "data", good=0, defective=0)
    assert train(*ITERATIONS, data=data) == 0
    assert (run_folder(tmp_path) / "bottle" / "model.pth").is_file()
    assert set(results(tmp_path)["bottle"].values()) == {"bottle", ""}


def break_text(path: Path) -> None:
    path.write_text("this is no image")


def test_error_in_a_loader_process_ends_the_command(commands, tmp_path, mvtec):
    bad = mvtec / "bottle" / "test" / "good" / "001.png"
    break_text(bad)
    words = command_line(tmp_path, mvtec, "Folder", *ITERATIONS, "--num_workers", "2")
    finished = commands.run("Binary_INP_Single_Class.py", *words)
    assert finished.code == 2
    assert repr(str(bad)) in finished.sentence


def test_two_images_of_one_stem_cannot_share_a_mask(fails, mvtec):
    folder = mvtec / "bottle" / "test" / "hole"
    Image.open(folder / "001.png").save(folder / "001.jpg")
    assert "share one stem" in fails(data=mvtec)


def test_stage_2_needs_a_stage_1_model(fails, train, tmp_path, mvtec):
    assert "--load_checkpoint" in fails("--clb_stage", "2", data=mvtec)
    assert "no model for 'absent'" in fails("--clb_stage", "2", "--load_checkpoint", "absent", data=mvtec)
    assert train(*ITERATIONS, "--clb_stage", "0", data=mvtec) == 0
    name = "INP-Former-Single-Class-FP"
    message = fails("--clb_stage", "2", "--load_checkpoint", name, data=mvtec)
    assert "needs a model of CLB stage 1" in message
    assert "is of CLB stage 0" in message
    model = str(run_folder(tmp_path, name) / "bottle" / "model.pth")
    message = fails("--clb_stage", "1", "--load_checkpoint", model, "--INP_num", "4", data=mvtec)
    assert "INP_num: expected 4, found 6" in message
    assert "takes no --load_checkpoint" in fails("--clb_stage", "0", "--load_checkpoint", model, data=mvtec)
    assert "--distill needs a float model" in fails("--distill", "1", data=mvtec)


def test_stage_1_of_another_category_is_refused(fails, train, tmp_path):
    data = make_mvtec(tmp_path / "data", items=("bottle", "nut"))
    assert train(*ITERATIONS, "--item", "bottle", "--clb_stage", "0", data=data) == 0
    model = str(run_folder(tmp_path, "INP-Former-Single-Class-FP") / "bottle" / "model.pth")
    message = fails("--item", "nut", "--load_checkpoint", model, data=data)
    assert "item: expected 'nut', found 'bottle'" in message


def test_damaged_model_is_refused_in_the_test_phase(fails, train, tmp_path, mvtec):
    assert train(*ITERATIONS, data=mvtec) == 0
    model = run_folder(tmp_path) / "bottle" / "model.pth"
    content = bytearray(model.read_bytes())
    largest = max(load_checkpoint(model)["model"].values(), key=torch.numel).numpy().tobytes()
    content[content.index(largest) + len(largest) // 2] ^= 1  # elsewhere the format has padding, which nobody reads
    model.write_bytes(content)
    assert "damaged" in fails("--phase", "test", data=mvtec)
    assert model.read_bytes() == bytes(content)


def test_test_phase_without_a_run(fails, tmp_path, mvtec):
    assert "no run to test" in fails("--phase", "test", data=mvtec)
    assert not (tmp_path / "runs").exists()


def test_nothing_trained_is_lost(fails, train, tmp_path, mvtec):
    assert train(*ITERATIONS, data=mvtec) == 0
    folder = run_folder(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert "already holds training of bottle" in fails(data=mvtec)
    assert "seed 1 there, 2 here" in fails("--seed", "2", data=mvtec)
    stage = ("--clb_stage", "0", "--save_name", "INP-Former-Single-Class")
    assert "a stage never overwrites another" in fails(*stage, data=mvtec)
    assert "a stage never overwrites another" in fails(*stage, "--overwrite", data=mvtec)
    assert "give one of them" in fails("--resume", "--overwrite", data=mvtec)
    assert {path: path.read_bytes() for path in before} == before
    assert train(*ITERATIONS, "--seed", "2", "--overwrite", data=mvtec) == 0
    assert load_checkpoint(folder / "bottle" / "model.pth")["config"]["seed"] == 2


def test_overwrite_deletes_nothing_before_the_new_run_can_start(fails, train, tmp_path, mvtec):
    assert train(*ITERATIONS, "--clb_stage", "0", data=mvtec) == 0
    assert train(*ITERATIONS, data=mvtec) == 0
    folder = run_folder(tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "log.txt"}
    name = "INP-Former-Single-Class"
    for flags in (("--load_checkpoint", name), ("--load_checkpoint", "absent"), ("--seed", "3", "--load_checkpoint", name)):
        fails(*flags, "--overwrite", data=mvtec)
    break_text(mvtec / "bottle" / "test" / "good" / "001.png")
    for flags in ((), ("--seed", "3")):
        fails(*flags, "--overwrite", data=mvtec)
    assert {path: path.read_bytes() for path in before} == before


def test_resume_without_results_only_evaluates(train, tmp_path, mvtec):
    assert train(*ITERATIONS, data=mvtec) == 0
    folder = run_folder(tmp_path)
    model, table = (folder / "bottle" / "model.pth").read_bytes(), (folder / "results.csv").read_bytes()
    (folder / "results.csv").unlink()
    assert train(*ITERATIONS, "--resume", data=mvtec) == 0
    assert (folder / "bottle" / "model.pth").read_bytes() == model
    assert (folder / "results.csv").read_bytes() == table


def test_another_protocol_is_measured_beside_the_training_results(train, tmp_path, mvtec):
    assert train(*ITERATIONS, data=mvtec) == 0
    folder = run_folder(tmp_path)
    table = (folder / "results.csv").read_bytes()
    assert train(*ITERATIONS, "--phase", "test", "--pro_mode", "dinomaly", "--max_ratio", "0", data=mvtec) == 0
    assert (folder / "results.csv").read_bytes() == table
    other = folder / "test_max_ratio=0.0_pro_mode=dinomaly"
    assert (other / "results.csv").read_bytes() != table
    assert "200 thresholds" in (other / "report.html").read_text()
    assert "exact up to FPR 0.3" in (folder / "report.html").read_text()


def test_damaged_feature_cache_is_made_anew(train, tmp_path, mvtec):
    assert train(*ITERATIONS, data=mvtec) == 0
    for path in (tmp_path / "runs" / "feature_cache").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    assert train(*ITERATIONS, "--save_name", "again", data=mvtec) == 0
    assert "is damaged or of an earlier version, and is made anew" in (run_folder(tmp_path, "again") / "log.txt").read_text()
    first, second = (run_folder(tmp_path, name) / "results.csv" for name in ("INP-Former-Single-Class", "again"))
    assert first.read_bytes() == second.read_bytes()


def test_full_disk_under_the_metrics_log(fails, tmp_path, mvtec):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    folder = run_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    (folder / "config.yaml").write_text("clb_stage: 1\n")
    assert "metrics.jsonl" in fails(data=mvtec, code=4)


def test_folder_of_something_else_is_not_used(fails, tmp_path, mvtec):
    folder = run_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("two years of work")
    assert "is no run folder" in fails("--overwrite", data=mvtec)
    assert (folder / "thesis.txt").read_text() == "two years of work"


def test_output_that_cannot_be_written(fails, tmp_path, mvtec):
    (tmp_path / "runs").write_text("a file")
    assert str(tmp_path / "runs") in fails(data=mvtec, code=4)


def test_loss_that_is_not_finite(fails_here, tmp_path, mvtec, monkeypatch):
    original, calls = INPFormer.training_loss, iter(range(100))

    def training_loss(self, inputs):
        loss, parts = original(self, inputs)
        return (loss * float("nan") if next(calls) == 5 else loss), parts

    monkeypatch.setattr(INPFormer, "training_loss", training_loss)
    message = fails_here("--total_iters", "9", "--save_every", "2", data=mvtec, code=3)
    assert "iteration 5" in message
    assert str(mvtec / "bottle" / "train" / "good") in message
    content = load_checkpoint(run_folder(tmp_path) / "bottle" / "last.pth")
    assert content["iteration"] == 4
    assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tpu"])
def test_absent_device(fails, mvtec, device):
    assert "choose from auto cpu" in fails("--device", device, data=mvtec)


def test_encoder_without_network_and_cache(fails_here, tmp_path, mvtec, monkeypatch):
    monkeypatch.setattr(models.encoder, "_hub_is_reachable", lambda: False)
    monkeypatch.setattr(models.encoder, "LOCAL_WEIGHTS_FOLDER", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    message = fails_here("--encoder", "dinov2reg_vit_small_14", data=mvtec)
    assert "model.safetensors of https://huggingface.co/timm/vit_small_patch14_reg4_dinov2.lvd142m" in message
    assert "--encoder_weights FILE" in message
    assert "scripts.fetch_encoder" in fails_here("--encoder", "dinov2_vit_small_14", data=mvtec)


def test_other_encoder_weights_do_not_mix_in_one_run(fails, train, tmp_path, mvtec):
    assert train(*ITERATIONS, data=mvtec) == 0
    environment = run_folder(tmp_path) / "env.json"
    sha256 = load_checkpoint(run_folder(tmp_path) / "bottle" / "model.pth")["encoder_sha256"]
    environment.write_text(environment.read_text().replace(sha256, "0" * 64))
    assert "encoder weights of sha256 0000000000000000 there" in fails("--resume", data=mvtec)


def test_disk_full_keeps_what_is_there(fails_here, train_here, tmp_path, mvtec, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    assert train_here(*ITERATIONS, data=mvtec) == 0
    model = run_folder(tmp_path) / "bottle" / "model.pth"
    before = model.read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    assert "disk full" in fails_here("--phase", "test", data=mvtec, code=4)
    assert model.read_bytes() == before
    assert not list((tmp_path / "runs").rglob("*.tmp"))


def test_debug_adds_the_traceback(run, tmp_path):
    finished = run("--debug", data=tmp_path / "nowhere")
    assert finished.code == 2
    assert "Traceback" in finished.err
    assert finished.err.splitlines()[-1].startswith("error: data not found")
