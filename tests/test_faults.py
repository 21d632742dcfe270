"""Bad input: one clear sentence, the right exit code, and nothing lost."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models.encoder
from models.inp_former import INPFormer
from tests.conftest import run_folder
from tests.miniature import make_mvtec, save
from utils.checkpoint import load_checkpoint

ITERATIONS = ("--total_iters", "4")


@pytest.fixture
def fails(train, capsys):
    """Call a command that must fail; returns its one sentence."""

    def call(*flags: str, code: int = 2, **options) -> str:
        assert train(*ITERATIONS, *flags, **options) == code
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        return errors[0]

    return call


def results(tmp_path, **options) -> dict[str, dict]:
    return {row["item"]: row for row in csv.DictReader((run_folder(tmp_path, **options) / "results.csv").open())}


def test_missing_data(fails, tmp_path, mvtec):
    assert "nowhere" in fails(data=tmp_path / "nowhere")
    assert "--data_path" in fails()
    message = fails(dataset="MVTec-AD", data=mvtec)
    assert str(mvtec / "carpet" / "train" / "good") in message
    assert "did you mean 'bottle'?" in fails("--item", "botle", data=mvtec)
    assert not (tmp_path / "runs").exists()


def test_no_training_images(fails, mvtec):
    folder = mvtec / "bottle" / "train" / "good"
    for path in folder.iterdir():
        path.unlink()
    assert str(folder) in fails(data=mvtec)


def test_batch_larger_than_the_set_is_no_empty_epoch(fails, mvtec):
    assert "--batch_size 8 or smaller" in fails("--batch_size", "9", data=mvtec)


@pytest.mark.parametrize(("good", "defective"), [(3, 0), (0, 3)])
def test_one_class_alone_gives_empty_cells(train, tmp_path, capsys, good, defective):
    data = make_mvtec(tmp_path / "data", good=good, defective=defective)
    assert train(*ITERATIONS, data=data) == 0
    for row in results(tmp_path).values():
        assert (row["I-AUROC"], row["I-AP"], row["I-F1"]) == ("", "", "")
        assert (row["AUPRO"] == "") == (defective == 0)
    printed = capsys.readouterr().err
    assert "n/a" in printed
    assert "one class" in printed


def test_photographs_without_test_set_train_a_model(train, tmp_path):
    data = make_mvtec(tmp_path / "data", good=0, defective=0)
    assert train(*ITERATIONS, data=data) == 0
    assert (run_folder(tmp_path) / "bottle" / "model.pth").is_file()
    assert set(results(tmp_path)["bottle"].values()) == {"bottle", ""}


def test_missing_mask(fails, train, tmp_path, mvtec):
    missing = mvtec / "bottle" / "ground_truth" / "hole" / "001_mask.png"
    missing.unlink()
    message = fails(data=mvtec)
    assert f"1 defective images in {str(mvtec / 'bottle' / 'test' / 'hole')!r} have no mask" in message
    assert "001.png" in message
    assert train(*ITERATIONS, "--allow_missing_masks", data=mvtec) == 0
    assert all(results(tmp_path)["bottle"].values())


def test_masks_are_not_paired_by_order(fails, mvtec):
    folder = mvtec / "bottle" / "ground_truth" / "hole"
    (folder / "001_mask.png").rename(folder / "777_mask.png")
    assert "777_mask.png" in fails(data=mvtec)


def test_mask_of_another_size_names_both_sizes(fails, mvtec):
    save(mvtec / "bottle" / "ground_truth" / "hole" / "001_mask.png", np.zeros((64, 48), np.uint8))
    message = fails(data=mvtec)
    assert "48x64" in message
    assert "64x64" in message


def break_empty(path: Path) -> None:
    path.write_bytes(b"")


def break_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def break_text(path: Path) -> None:
    path.write_text("this is no image")


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("break_file", [break_empty, break_truncated, break_text])
@pytest.mark.parametrize("where", ["train/good/002.png", "test/good/001.png", "test/hole/001.png"])
def test_unreadable_image(fails, train, tmp_path, mvtec, break_file, where, workers):
    bad = mvtec / "bottle" / where
    break_file(bad)
    assert repr(str(bad)) in fails("--num_workers", workers, data=mvtec)
    assert train(*ITERATIONS, "--skip_bad_images", "--overwrite", data=mvtec) == 0
    skipped = list(csv.DictReader((run_folder(tmp_path) / "bottle" / "bad_images.csv").open()))
    assert [row["path"] for row in skipped] == [str(bad)]
    assert str(bad) not in (run_folder(tmp_path) / "bottle" / "scores.csv").read_text()


def test_error_in_a_loader_process_ends_the_command(start_process, mvtec):
    bad = mvtec / "bottle" / "test" / "good" / "001.png"
    break_text(bad)
    process = start_process(*ITERATIONS, "--num_workers", "2", data=mvtec)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert repr(str(bad)) in errors
    assert "Traceback" not in errors


def test_enormous_image_is_refused_before_it_is_decoded(fails, mvtec):
    assert "--max_pixels" in fails("--max_pixels", "1000", data=mvtec)


def test_two_images_of_one_stem_cannot_share_a_mask(fails, mvtec):
    folder = mvtec / "bottle" / "test" / "hole"
    Image.open(folder / "001.png").save(folder / "001.jpg")
    assert "share one stem" in fails(data=mvtec)


def test_same_image_in_train_and_test_is_a_warning(train, tmp_path, mvtec):
    twin = mvtec / "bottle" / "test" / "good" / "copy.png"
    twin.write_bytes((mvtec / "bottle" / "train" / "good" / "003.png").read_bytes())
    assert train(*ITERATIONS, data=mvtec) == 0
    log = (run_folder(tmp_path) / "log.txt").read_text()
    assert "the same image is in train and test" in log
    assert str(twin) in log


def test_names_with_unicode_spaces_quotes_and_newlines(train, tmp_path):
    data = make_mvtec(tmp_path / "däta ' \"", items=("=schräube 1",))
    folder = data / "=schräube 1" / "test" / "good"
    (folder / "000.png").rename(folder / "line\nbreak ' .png")
    assert train(*ITERATIONS, data=data) == 0
    scores = list(csv.DictReader((run_folder(tmp_path) / "=schräube 1" / "scores.csv").open(newline="")))
    assert any("line\nbreak" in row["path"] for row in scores)
    assert scores[0]["item"] == "'=schräube 1"


def test_images_of_odd_sizes_run(train, tmp_path, mvtec):
    for name, size in (("a.png", (1, 1)), ("b.png", (5000, 20))):
        save(mvtec / "bottle" / "test" / "good" / name, np.full((*size, 3), 90, np.uint8))
    assert train(*ITERATIONS, data=mvtec) == 0
    assert all(results(tmp_path)["bottle"].values())


def test_sizes_that_do_not_fit_the_patch(fails, mvtec):
    assert "use 56 or 70" in fails("--crop_size", "60", data=mvtec)
    assert "larger than --input_size 64" in fails("--crop_size", "70", data=mvtec)


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
    assert "is damaged and is made anew" in (run_folder(tmp_path, "again") / "log.txt").read_text()
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


@pytest.mark.parametrize("name", ["../escape", "a/b", "..", ""])
def test_save_name_stays_in_its_folder(fails, mvtec, name):
    if name:
        assert "plain name" in fails("--save_name", name, data=mvtec)
    else:
        assert "plain name" in fails("--load_checkpoint", "x", "--save_name", "a\\b", data=mvtec)


def test_loss_that_is_not_finite(fails, train, tmp_path, mvtec, monkeypatch):
    original, calls = INPFormer.training_loss, iter(range(100))

    def training_loss(self, inputs):
        loss, parts = original(self, inputs)
        return (loss * float("nan") if next(calls) == 5 else loss), parts

    monkeypatch.setattr(INPFormer, "training_loss", training_loss)
    message = fails("--total_iters", "9", "--save_every", "2", data=mvtec, code=3)
    assert "iteration 5" in message
    assert str(mvtec / "bottle" / "train" / "good") in message
    content = load_checkpoint(run_folder(tmp_path) / "bottle" / "last.pth")
    assert content["iteration"] == 4
    assert all(value.isfinite().all() for value in content["model"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", "tpu"])
def test_absent_device(fails, mvtec, device):
    assert "choose from auto cpu" in fails("--device", device, data=mvtec)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("totel_iters: 5", "did you mean 'total_iters'?"),
        ("", "empty"),
        ("- a\n- b", "no list of `flag: value` lines"),
        ("resume: 7", "resume must be true or false"),
        ("batch_size: [1, 2]", "batch_size has the unusable value"),
        ("a: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
        ("a: [1", "cannot be read as YAML"),
    ],
)
def test_unusable_config_file(fails, tmp_path, mvtec, content, expected):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    message = fails("--config", str(path), data=mvtec)
    assert expected in message
    assert str(path) in message


def test_wrong_type_in_a_config_file(train, tmp_path, mvtec, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("seed: many")
    with pytest.raises(SystemExit) as stop:
        train("--config", str(path), data=mvtec)
    assert stop.value.code == 2
    assert "--seed: invalid int value: 'many'" in capsys.readouterr().err


def test_encoder_without_network_and_cache(fails, tmp_path, mvtec, monkeypatch):
    monkeypatch.setattr(models.encoder, "_hub_is_reachable", lambda: False)
    monkeypatch.setattr(models.encoder, "LOCAL_WEIGHTS_FOLDER", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    message = fails("--encoder", "dinov2reg_vit_small_14", data=mvtec)
    assert "model.safetensors of https://huggingface.co/timm/vit_small_patch14_reg4_dinov2.lvd142m" in message
    assert "--encoder_weights FILE" in message
    assert "scripts.fetch_encoder" in fails("--encoder", "dinov2_vit_small_14", data=mvtec)


def test_other_encoder_weights_do_not_mix_in_one_run(fails, train, tmp_path, mvtec):
    assert train(*ITERATIONS, data=mvtec) == 0
    environment = run_folder(tmp_path) / "env.json"
    sha256 = load_checkpoint(run_folder(tmp_path) / "bottle" / "model.pth")["encoder_sha256"]
    environment.write_text(environment.read_text().replace(sha256, "0" * 64))
    assert "encoder weights of sha256 0000000000000000 there" in fails("--resume", data=mvtec)


def test_disk_full_keeps_what_is_there(fails, train, tmp_path, mvtec, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    assert train(*ITERATIONS, data=mvtec) == 0
    model = run_folder(tmp_path) / "bottle" / "model.pth"
    before = model.read_bytes()
    monkeypatch.setattr(os, "fsync", no_space)
    assert "disk full" in fails("--phase", "test", data=mvtec, code=4)
    assert model.read_bytes() == before
    assert not list((tmp_path / "runs").rglob("*.tmp"))


def test_debug_adds_the_traceback(fails, train, tmp_path, capsys):
    assert train("--debug", data=tmp_path / "nowhere") == 2
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("error: data not found")


def test_grey_transparent_and_16_bit_photographs_train(train, tmp_path, mvtec):
    folder = mvtec / "bottle" / "train" / "good"
    for path, mode in zip(sorted(folder.iterdir()), ["L", "RGBA", "P", "I;16"], strict=False):
        image = Image.open(path)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        image.save(path)
    assert train(*ITERATIONS, data=mvtec) == 0
