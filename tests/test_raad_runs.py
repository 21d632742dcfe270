"""RAAD through its entry script: stages and their run folders, resuming, teachers, data, and what it refuses."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

import Binary_INP_Single_Class
import RAAD
from common.errors import UserError
from datasets.images import load_image
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, image_transform
from models.efficientad import EfficientAD
from models.teacher import build_teacher
from tests.conftest import REPOSITORY, command_line, run_folder
from tests.miniature import make_mvtec, save
from tests.miniature_layouts import TRAIN, make_loco
from tests.test_resume import assert_same, stop_after
from utils import raad_quantization, train_phase
from utils.checkpoint import load_checkpoint
from utils.penalty import PenaltyImages

NAME = "RAAD-Single-Class"
SUFFIXES = {"baseline": "-Baseline", "quantize": "-Quantized", "finetune": ""}
FLAGS = [
    *("--encoder", "pdn_tiny", "--teacher_weights", "random", "--image_size", "64", "--batch_size", "2", "--num_workers", "0"),
    *("--device", "cpu", "--holdout", "0.4", "--total_iters", "4", "--finetune_iters", "4", "--recon_iters", "4"),
    *("--recon_activation_iters", "2", "--recon_batch_size", "4", "--recon_crops", "8"),
    *("--calibration_images_count", "4", "--quiet"),
]


@dataclass(frozen=True)
class Runs:
    """Data, images for the penalty, and the runs on them."""

    root: Path

    def call(self, *flags: str) -> int:
        where = ("--dataset", "Folder", "--data_path", str(self.root / "data"), "--save_dir", str(self.root / "runs"))
        return RAAD.main([*FLAGS, *where, *flags])

    @property
    def penalty(self) -> tuple[str, str]:
        return ("--penalty_images", str(self.root / "other"))

    def folder(self, save_name: str = NAME, dataset: str = "Folder") -> Path:
        return self.root / "runs" / f"{save_name}_dataset={dataset}_Encoder=pdn_tiny_Resize=64_Crop=64"

    def model(self, save_name: str = NAME) -> dict:
        return load_checkpoint(self.folder(save_name) / "bottle" / "model.pth")

    def config(self, save_name: str = NAME) -> dict:
        return yaml.safe_load((self.folder(save_name) / "config.yaml").read_text())

    def files(self) -> dict[Path, bytes]:
        """What a run could lose."""
        return {path: path.read_bytes() for kind in ("*.csv", "*.pth") for path in (self.root / "runs").rglob(kind)}


def make_runs(root: Path, items=("bottle",)) -> Runs:
    generator = np.random.default_rng(1)
    make_mvtec(root / "data", items=items)
    for index in range(3):
        save(root / "other" / f"part{index}" / "image.png", generator.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    return Runs(root)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = make_runs(tmp_path_factory.mktemp("raad"))
    assert runs.call("--stage", "all", *runs.penalty) == 0
    return runs


def losses(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "training"]


def bits_of(state: dict[str, torch.Tensor], network: str) -> list[int]:
    """Bits of the weights of a network's layers, in order, as its checkpoint stores them."""
    ends = ".weight_quantizer._extra_state"
    return [int(value[0]) for name, value in state.items() if name.startswith(f"{network}.") and name.endswith(ends)]


def test_every_stage_leaves_a_run_folder_that_says_what_it_is(runs):
    files = {"config.yaml", "env.json", "log.txt", "metrics.jsonl", "results.csv", "cost.json", "report.html", "bottle"}
    for number, (stage, suffix) in enumerate(SUFFIXES.items()):
        folder, config = runs.folder(NAME + suffix), runs.config(NAME + suffix)
        assert {path.name for path in folder.iterdir()} >= files
        record = {"quantization.json"} if stage == "quantize" else set()
        assert {path.name for path in (folder / "bottle").iterdir()} == {"model.pth", "scores.csv", "maps", *record}
        assert (config["host"], config["stage"], config["clb_stage"]) == ("RAAD", stage, number)
        assert runs.model(NAME + suffix)["stage"] == number
        with open(folder / "results.csv") as stream:
            rows = list(csv.DictReader(stream))
        assert [row["item"] for row in rows] == ["bottle", "Mean"]
        assert all(0 <= float(rows[0][name]) <= 1 for name in ("I-AUROC", "P-AUROC", "P-AP", "AUPRO"))
    baseline, quantized, finetuned = (runs.config(NAME + suffix) for suffix in SUFFIXES.values())
    assert [config["load_checkpoint"] for config in (baseline, quantized, finetuned)] == [
        None,
        f"{NAME}-Baseline",
        f"{NAME}-Quantized",
    ]
    assert [config["total_iters"] for config in (baseline, quantized, finetuned)] == [4, 0, 4]
    assert (baseline["learning_rate"], baseline["final_learning_rate"]) == (1e-4, 1e-5)
    assert (finetuned["learning_rate"], finetuned["final_learning_rate"]) == pytest.approx((1e-5, 1e-6))
    assert {baseline[name] for name in ("allocation", "rounding", "recon_iters", "finetune_iters")} == {None}
    assert (quantized["allocation"], quantized["finetune_iters"], finetuned["finetune_iters"]) == ("hqs", None, 4)


def test_the_record_of_the_quantization_is_in_the_model_and_beside_it(runs):
    content = runs.model(f"{NAME}-Quantized")
    record = content["quantization"]
    assert json.loads((runs.folder(f"{NAME}-Quantized") / "bottle" / "quantization.json").read_text()) == record
    decision = record["allocation"]
    assert (decision["method"], len(decision["scores"]), len(decision["relative_scores"])) == ("hqs", 4, 2)
    assert decision["teacher_bits"] == decision["student_bits"] == bits_of(content["model"], "student")
    assert bits_of(content["model"], "quantized_teacher") == bits_of(content["model"], "student")
    assert bits_of(content["model"], "autoencoder") == []
    for errors in record["layer_errors"].values():
        assert [error["bits"] for error in errors] == decision["student_bits"]
        assert all(error["nearest"] > 0 and error["reconstructed"] > 0 for error in errors)
    layers = [
        kernel * kernel * inputs * outputs + outputs for kernel, inputs, outputs in ((4, 3, 16), (4, 16, 32), (3, 32, 32))
    ]
    pairs = [2 * layers[0], 2 * layers[1], 2 * layers[2], 16 * 32 * 48 + 48 + 16 * 32 * 96 + 96]
    effective = sum(bits * count for bits, count in zip(decision["student_bits"], pairs, strict=True)) / 32
    assert record["size"]["effective_teacher_student"] == effective
    assert record["size"]["effective_all"] == effective + record["size"]["parameters"] - sum(pairs)


def test_each_stage_alone_gives_what_all_together_give(runs):
    for stage, suffix in SUFFIXES.items():
        assert runs.call("--stage", stage, "--save_name", "alone", *runs.penalty) == 0
        assert_same(runs.model(f"alone{suffix}")["model"], runs.model(NAME + suffix)["model"])


def test_an_interrupted_training_resumes_to_the_same_models(runs, monkeypatch, capsys):
    flags = ("--stage", "all", "--save_name", "parts", *runs.penalty)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert runs.call(*flags) == 130
    assert "stopped in stage baseline; the same command with --resume goes on, from" in capsys.readouterr().err
    assert load_checkpoint(runs.folder("parts-Baseline") / "bottle" / "last.pth")["iteration"] == 2
    with monkeypatch.context() as patch:
        stop_after(patch, 2 + 3)  # two that the baseline lacks
        assert runs.call(*flags, "--resume") == 130
    assert load_checkpoint(runs.folder("parts") / "bottle" / "last.pth")["iteration"] == 3
    assert runs.call(*flags, "--resume") == 0
    for suffix in SUFFIXES.values():
        assert_same(runs.model(f"parts{suffix}")["model"], runs.model(NAME + suffix)["model"])
        assert not (runs.folder(f"parts{suffix}") / "bottle" / "last.pth").exists()


def test_the_test_phase_repeats_the_results_of_every_stage(runs):
    tables = [
        runs.folder(NAME + suffix) / name for suffix in SUFFIXES.values() for name in ("results.csv", "bottle/scores.csv")
    ]
    before = [table.read_bytes() for table in tables]
    assert len({*before}) == len(before)
    for table in tables:
        table.unlink()
    assert runs.call("--stage", "all", "--phase", "test") == 0  # needs no penalty images
    assert [table.read_bytes() for table in tables] == before


def test_a_training_belongs_to_its_teacher(runs, tmp_path, monkeypatch, capsys):
    paths = [str(tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    for seed, path in enumerate(paths):
        save_file(build_teacher("tiny", "random", seed).network.state_dict(), path)
    same, other = (("--teacher_weights", path) for path in paths)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert runs.call("--stage", "baseline", "--save_name", "teacher") == 130
    before, _ = runs.files(), capsys.readouterr()
    resumed = runs.call("--stage", "baseline", "--save_name", "teacher", "--resume", *other)
    quantized = runs.call("--stage", "quantize", "--save_name", "teacher", "--baseline", NAME, *other)
    finetuned = runs.call("--stage", "finetune", *runs.penalty, "--overwrite", *other)
    tested = runs.call("--stage", "finetune", "--phase", "test", *other)
    assert (resumed, quantized, finetuned, tested) == (2, 2, 2, 2)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    assert "holds another run: encoder weights of sha256" in errors[0]
    assert all("encoder_sha256: expected" in error for error in errors[1:])
    assert runs.files() == before
    assert runs.call("--stage", "baseline", "--save_name", "teacher", "--resume", *same) == 0
    assert json.loads((runs.folder("teacher-Baseline") / "env.json").read_text())["encoder_source"] != "random"


def test_a_finished_runs_settings_make_the_same_run_again(runs):
    for suffix in SUFFIXES.values():
        stored = runs.folder(NAME + suffix) / "config.yaml"
        assert RAAD.main(["--config", str(stored), "--quiet", "--save_name", f"again{suffix}"]) == 0
        assert_same(runs.model(f"again{suffix}")["model"], runs.model(NAME + suffix)["model"])
        before, after = runs.config(NAME + suffix), runs.config(f"again{suffix}")
        assert {key for key, value in before.items() if after[key] != value} == {"save_name"}


def test_a_baseline_may_be_another_runs(runs):
    assert runs.call("--stage", "all", "--baseline", NAME, "--save_name", "borrower", *runs.penalty) == 0
    assert not runs.folder("borrower-Baseline").exists()
    assert_same(runs.model("borrower")["model"], runs.model()["model"])


def test_penalty_images_count(runs):
    assert {"hard", "autoencoder", "student_autoencoder", "penalty"} <= losses(runs.folder(f"{NAME}-Baseline"))[0].keys()
    assert "penalty" in losses(runs.folder())[0]
    assert runs.call("--stage", "baseline", "--save_name", "silent") == 0
    (line,) = losses(runs.folder("silent-Baseline"))
    assert "penalty" not in line
    weights = [runs.model(name)["model"]["student.conv4.weight"] for name in (f"{NAME}-Baseline", "silent-Baseline")]
    assert not torch.equal(*weights)


def test_penalty_images_are_the_middle_of_images_and_some_are_grey(tmp_path):
    pixels = np.zeros((100, 140, 3), np.uint8)
    pixels[..., 2] = 255
    pixels[20:80, 30:110] = (255, 0, 0)  # the middle half of both sides, and some more
    Image.fromarray(pixels).save(tmp_path / "image.png")
    (tmp_path / "notes.txt").write_text("no image")
    penalty = PenaltyImages(tmp_path, 32)
    torch.manual_seed(0)
    drawn = penalty(200)
    assert drawn.shape == (200, 3, 32, 32)
    colours = drawn * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    red, grey = torch.tensor([1.0, 0.0, 0.0])[:, None, None], torch.full((3, 1, 1), 76 / 255)  # 0.299 of 255
    is_red, is_grey = ((colours - colour).abs().amax(dim=(1, 2, 3)) < 1e-5 for colour in (red, grey))
    assert bool((is_red | is_grey).all())
    assert 0.2 < is_grey.float().mean() < 0.4
    torch.manual_seed(0)
    assert torch.equal(penalty(200), drawn)


def test_a_training_belongs_to_its_penalty_images(tmp_path, monkeypatch, capsys):
    runs = make_runs(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert runs.call("--stage", "baseline", *runs.penalty) == 130
    (tmp_path / "other" / "one_more.png").write_bytes((tmp_path / "other" / "part0" / "image.png").read_bytes())
    assert runs.call("--stage", "baseline", *runs.penalty, "--resume") == 2
    assert "penalty images whose names have the sha256" in capsys.readouterr().err
    (tmp_path / "other" / "one_more.png").unlink()
    assert runs.call("--stage", "baseline", *runs.penalty, "--resume") == 0


def test_penalty_images_that_cannot_be_read_are_left_out_unless_none_can(tmp_path, caplog):
    save(tmp_path / "good.png", np.full((40, 40, 3), 90, np.uint8))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    penalty = PenaltyImages(tmp_path, 32)
    torch.manual_seed(0)
    assert penalty(20).shape == (20, 3, 32, 32)
    assert "left out of --penalty_images" in caplog.text
    assert "bad.png" in caplog.text
    (tmp_path / "good.png").write_bytes(b"no picture either")
    with pytest.raises(UserError, match="png"):
        penalty(1)


def test_a_resumed_run_counts_its_bits_again(runs):
    flags = ("--stage", "quantize", "--save_name", "counted", "--baseline", NAME, "--rounding", "nearest", *runs.penalty)
    assert runs.call(*flags) == 0
    folder = runs.folder("counted-Quantized")
    cost = (folder / "cost.json").read_bytes()
    assert json.loads(cost)["student"]["saved_bits"] > 0
    (folder / "results.csv").unlink()
    assert runs.call(*flags, "--resume") == 0
    assert (folder / "cost.json").read_bytes() == cost


def seen_images(monkeypatch) -> dict[str, list]:
    """Paths that `fit` trains on, and images that the quantization and the calibration of maps are given."""
    seen: dict[str, list] = {"trained": [], "calibrating": [], "normal": []}
    fit, fit_layers, calibrate = train_phase.fit, raad_quantization.fit, EfficientAD.calibrate

    def train(detector, data, *arguments):
        seen["trained"].append({Path(data[index]["path"]) for index in range(len(data))})
        return fit(detector, data, *arguments)

    def fit_network(network, images, *arguments, **options):
        seen["calibrating"].append(images)
        return fit_layers(network, images, *arguments, **options)

    def learn_scale(detector, batches):
        batches = list(batches)
        seen["normal"].append(torch.cat(batches))
        return calibrate(detector, batches)

    monkeypatch.setattr(train_phase, "fit", train)
    monkeypatch.setattr(raad_quantization, "fit", fit_network)
    monkeypatch.setattr(EfficientAD, "calibrate", learn_scale)
    return seen


def paths_of(images: torch.Tensor, folder: Path) -> list[Path]:
    """Which files below a folder images are."""
    transform = image_transform(64, 64)
    known = {path: transform(load_image(path)) for path in sorted(folder.rglob("good/*.png")) if path.stem[0].isdigit()}
    return [next(path for path, pixels in known.items() if torch.equal(pixels, image)) for image in images]


def test_one_model_of_all_categories_is_quantized_on_images_of_all(tmp_path, monkeypatch):
    runs, seen = make_runs(tmp_path, items=("bottle", "nut")), seen_images(monkeypatch)
    assert runs.call("--stage", "all", "--setting", "multi") == 0
    names = [f"RAAD-Multi-Class{suffix}" for suffix in SUFFIXES.values()]
    for name in names:
        rows = (runs.folder(name) / "results.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["item", "bottle", "nut", "Mean"]
        assert load_checkpoint(runs.folder(name) / "model.pth")["calibrations"].keys() == {"bottle", "nut"}
    assert json.loads((runs.folder(names[1]) / "quantization.json").read_text())["allocation"]["student_bits"][0] == 8
    (trained, *_), (of_teacher, of_student), (normal, *_) = seen.values()
    assert len(trained) == 10
    held_out = {
        path for item in ("bottle", "nut") for path in (tmp_path / "data" / item / "train" / "good").iterdir()
    } - trained
    assert {*paths_of(normal, tmp_path / "data")} == held_out
    calibrating = paths_of(of_student, tmp_path / "data")
    assert torch.equal(of_teacher, of_student)
    assert len({*calibrating}) == 4
    assert {*calibrating} <= trained
    assert {path.parts[-4] for path in calibrating} == {"bottle", "nut"}


@pytest.mark.parametrize("holdout", ["0.25", "0"])
def test_images_that_a_data_set_has_for_validation_are_the_held_out_ones(tmp_path, monkeypatch, holdout):
    data, seen = make_loco(tmp_path / "loco"), seen_images(monkeypatch)
    flags = ("--dataset", "MVTec-LOCO", "--data_path", str(data), "--item", "breakfast_box", "--holdout", holdout)
    assert Runs(tmp_path).call("--stage", "baseline", *flags) == 0
    (trained,), (normal,) = seen["trained"], seen["normal"]
    folders = {kind: {*(data / "breakfast_box" / kind / "good").glob("0*.png")} for kind in ("train", "validation")}
    assert trained == folders["train"]
    assert len(trained) == TRAIN
    assert {*paths_of(normal, data)} == folders["validation" if holdout != "0" else "train"]
    log = (Runs(tmp_path).folder(f"{NAME}-Baseline", "MVTec-LOCO") / "log.txt").read_text()
    assert ("breakfast_box: 2 validation images of the data set held out" in log) == (holdout != "0")


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_validation_images_serve_other_networks_with_their_features_cached(tmp_path, cache):
    data = make_loco(tmp_path / "loco")
    flags = ("--item", "breakfast_box", "--total_iters", "2", "--holdout", "0.3", "--cache_features", cache, "--quiet")
    assert Binary_INP_Single_Class.main(command_line(tmp_path, data, "MVTec-LOCO", *flags)) == 0
    content = load_checkpoint(run_folder(tmp_path, dataset="MVTec-LOCO") / "breakfast_box" / "model.pth")
    assert len(content["calibration"]["scores"]) == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--image_size", "100"), "--crop_size 100 is no multiple of the patch of pdn_tiny (32); use 96 or 128"),
        (("--crop_size", "96"), "--image_size 64 and --crop_size 96 contradict"),
        (("--input_size", "96", "--crop_size", "64"), "RAAD sees whole images"),
        (("--total_epochs", "2"), "give --total_iters and --finetune_iters"),
        (("--total_iters", "0"), "--total_iters 0 trains no baseline"),
        (("--stage", "quantize", "--save_name", "new"), "no model for 'new-Baseline'"),
        (("--stage", "finetune", "--save_name", "new"), "no model for 'new-Quantized'"),
        (("--stage", "quantize", "--allocation", "none"), "has nothing to do"),
        (("--allocation", "none", "--finetune", "float"), "where all is float"),
        (("--stage", "baseline", "--bits", "4"), "--stage baseline quantizes nothing"),
        (("--allocation", "none", "--autoencoder_bits", "4"), "--allocation none quantizes nothing"),
        (("--allocation", "uniform"), "uniform allocation takes one number (--bits)"),
        (
            ("--allocation", "manual", "--bits", "4"),
            "manual allocation takes 2 numbers, one per layer between",
        ),
        (("--bits", "4"), "--bits with --allocation hqs, which finds them itself"),
        (("--allocation", "uniform", "--bits", "4", "--budget", "30000"), "--budget with --allocation uniform"),
        (("--allocation", "budget", "--budget", "21000"), "raise the budget (--budget) by "),
        (("--stage", "finetune", "--rounding", "nearest", "--overwrite"), "rounding: expected 'nearest', found 'adaround'"),
        (("--stage", "finetune", "--hqs_phi", "rank", "--overwrite"), "hqs_phi: expected 'rank', found 'ratio'"),
        (("--stage", "quantize", "--holdout", "0.5", "--overwrite"), "may have seen images that are held out now"),
        (
            ("--stage", "finetune", "--load_checkpoint", f"{NAME}-Baseline"),
            "--stage finetune needs a model of stage quantize, ",
        ),
        (("--stage", "finetune", "--load_checkpoint", f"{NAME}-Baseline"), "is of stage baseline"),
        (("--holdout", "0.1"), "--holdout 0.1 keeps 1 of the 8 training images of bottle"),
        (("--stage", "all"), "already holds training of bottle; give --resume to go on"),
        (("--stage", "all", "--hard_quantile", "0.9", "--resume"), "hard_quantile 0.999 there, 0.9 here"),
        (("--load_checkpoint", "x"), "--load_checkpoint is a model of one stage and --stage all means several"),
        (("--phase", "test", "--test_checkpoint", "x"), "--test_checkpoint is a model of one stage"),
        (("--stage", "baseline", "--baseline", "x"), "--stage baseline trains one"),
        (("--stage", "quantize", "--baseline", "x", "--load_checkpoint", "y"), "--baseline x and --load_checkpoint y"),
        (("--sab", "mixed"), "are for binary networks and RAAD is quantized"),
        (("--phase", "test", "--scoring", "prototype"), "RAAD has none"),
        (("--penalty_images", "no such folder"), "--penalty_images 'no such folder' is no folder with images"),
        (("--penalty_images", str(REPOSITORY / "quantize")), "is no folder with images"),
        (("--encoder", "pdn_medium", "--teacher_weights", "no such file"), "no such file"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_lost(runs, capsys, flags, sentence):
    before = runs.files()
    assert before
    assert runs.call(*(() if "--penalty_images" in flags else runs.penalty), *flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert sentence in error
    assert runs.files() == before


def test_what_only_a_later_stage_refuses_is_refused_before_the_first_one_trains(runs):
    for flags in (("--allocation", "uniform"), ("--allocation", "budget", "--budget", "21000"), ("--bits", "4")):
        assert runs.call("--stage", "all", "--save_name", "early", *flags) == 2
    assert not [*(runs.root / "runs").glob("early*")]
