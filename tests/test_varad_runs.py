"""VarAD through its entry script: training, resuming, stages, adapters, packed files and predictions, and what it refuses."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

import VarAD
from models import state_space
from scripts import benchmark_varad, evaluate, export, predict
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from tests.test_resume import assert_same
from utils import training
from utils.checkpoint import load_checkpoint

NAME = "VarAD-Single-Class"
FLAGS = ("--m", "1", "--quiet")
ITERATIONS = ("--total_iters", "4", *FLAGS)


@dataclass(frozen=True)
class Runs:
    """Data of two categories and the runs of all stages on one of them."""

    root: Path

    def call(self, *flags: str) -> int:
        return VarAD.main(command_line(self.root, self.root / "data", "Folder", *flags))

    def folder(self, save_name: str = NAME) -> Path:
        return run_folder(self.root, save_name)

    def model(self, save_name: str = NAME) -> dict:
        return load_checkpoint(self.folder(save_name) / "bottle" / "model.pth")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("varad"))
    make_mvtec(runs.root / "data", items=("bottle", "nut"))
    for stage, before in ((0, None), (1, NAME), (2, f"{NAME}-CLB1")):
        start = ("--load_checkpoint", before) if before else ()
        assert runs.call(*ITERATIONS, "--item", "bottle", "--clb_stage", str(stage), *start) == 0
    return runs


def test_a_run_has_all_its_files_and_says_how_it_was_measured(runs):
    folder = runs.folder()
    files = {"config.yaml", "env.json", "log.txt", "metrics.jsonl", "results.csv", "cost.json", "report.html", "bottle"}
    assert {path.name for path in folder.iterdir()} >= files
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["host"], config["clb_stage"], config["interpolation"], config["metric_size"]) == ("VarAD", 0, "bicubic", 0)
    assert (config["smoothing_kernel"], config["smoothing_border"], config["max_ratio"]) == (33, "reflect", 0.0)
    assert "INP_num" not in config
    with open(folder / "results.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["item"] for row in rows] == ["bottle", "Mean"]
    assert all(0 <= float(rows[0][name]) <= 1 for name in ("I-AUROC", "P-AUROC", "P-AP", "AUPRO"))
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"variance_1", "variance_2", "variance_3"} <= told[0].keys()


def test_the_optimiser_is_the_authors(runs, monkeypatch):
    made = []
    build = training.build_optimizer
    monkeypatch.setattr(training, "build_optimizer", lambda *arguments: made.append(build(*arguments)) or made[-1])
    assert runs.call(*ITERATIONS, "--item", "bottle", "--save_name", "VarAD-optimiser") == 0
    (optimizer,) = made
    assert type(optimizer) is torch.optim.AdamW
    decayed, other = optimizer.param_groups
    for group in (decayed, other):
        assert (group["lr"], group["betas"], group["eps"]) == (5e-4, (0.5, 0.999), 1e-8)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.01, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        set(map(id, decayed["params"] + other["params"]))
    )


def test_the_test_phase_repeats_the_results(runs):
    before = (runs.folder() / "results.csv").read_text()
    (runs.folder() / "results.csv").unlink()
    assert runs.call(*ITERATIONS, "--item", "bottle", "--phase", "test") == 0
    assert (runs.folder() / "results.csv").read_text() == before


def test_stages_are_binary_where_they_say(runs):
    def layers(content: dict) -> set[str]:
        return {name.removesuffix(".alpha").split(".", 2)[2] for name in content["model"] if name.endswith(".alpha")}

    assert layers(runs.model()) == set()
    assert layers(runs.model(f"{NAME}-CLB1")) == {"in_proj", "out_proj"}
    assert layers(runs.model(f"{NAME}-CLB2")) == {"in_proj", "out_proj", "mlp.fc1", "mlp.fc2"}


def test_one_model_of_all_categories(runs):
    assert runs.call(*ITERATIONS, "--setting", "multi", "--standardise", "--holdout", "0.4") == 0
    folder = runs.folder("VarAD-Multi-Class")
    assert [line.split(",")[0] for line in (folder / "results.csv").read_text().splitlines()] == [
        "item",
        "bottle",
        "nut",
        "Mean",
    ]
    state = load_checkpoint(folder / "model.pth")["model"]
    assert state["usual_error"].min() > 0
    assert 0 < state["error_deviation"].min() < 1


@pytest.mark.parametrize("adapter", ["none", "resblock", "lora", "lora+linear"])
def test_every_adapter_trains_and_is_found_again(runs, adapter):
    name = f"VarAD-{adapter}"
    assert runs.call(*ITERATIONS, "--item", "bottle", "--adapter", adapter, "--preset", "paper", "--save_name", name) == 0
    before = (runs.folder(name) / "results.csv").read_text()
    (runs.folder(name) / "results.csv").unlink()
    again = ("--phase", "test", "--adapter", adapter, "--preset", "paper", "--save_name", name)
    assert runs.call(*ITERATIONS, "--item", "bottle", *again) == 0
    assert (runs.folder(name) / "results.csv").read_text() == before


@pytest.mark.parametrize("save_name", [NAME, f"{NAME}-CLB1", f"{NAME}-CLB2"])
def test_packed_file_scores_photographs_as_the_training_did(runs, save_name, tmp_path):
    file = tmp_path / "bottle.binaryad"
    checkpoint = str(runs.folder(save_name) / "bottle" / "model.pth")
    precise = ("--encoder_precision", "fp32", "--trained_precision", "fp32", "--quiet")
    assert export.main(["--checkpoint", checkpoint, "--output", str(file), *precise]) == 0
    data = runs.root / "data"
    photographs = str(data / "bottle" / "test")
    assert predict.main(["--model", str(file), "--input", photographs, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    with open(tmp_path / "out" / "predictions.csv") as stream:
        found = {"/".join(Path(row["path"]).parts[-2:]): float(row["score"]) for row in csv.DictReader(stream)}
    with open(runs.folder(save_name) / "bottle" / "scores.csv") as stream:
        expected = {"/".join(Path(row["path"]).parts[-2:]): float(row["score"]) for row in csv.DictReader(stream)}
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=2e-4)
    assert evaluate.main(["--model", str(file), "--dataset", "Folder", "--data_path", str(data), "--item", "bottle"]) == 0


def test_onnx_is_refused(runs, tmp_path, capsys):
    checkpoint = str(runs.folder() / "bottle" / "model.pth")
    assert export.main(["--checkpoint", checkpoint, "--output", str(tmp_path / "a.onnx")]) == 2
    assert "VarAD, whose scan goes step by step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--m", "4"), "asks for predictions over 16 to 16 tokens, and images of 4 x 4 patches allow 1 to 15"),
        (("--m", "0.1"), "asks for predictions over 0 to 0 tokens"),
        (("--m", "1", "--model", "dinov2_vits14"), "--model dinov2_vits14 and --encoder random_vit_tiny_14 are two encoders"),
        (("--m", "1", "--image_size", "112"), "--image_size 112 and --crop_size 56 contradict"),
        (("--m", "1", "--standardise", "--holdout", "0.1"), "--holdout 0.1 keeps 1 of the 8 training images of bottle"),
        (
            ("--m", "1", "--ssm", "mamba_ssm", "--overwrite", "--item", "bottle"),
            "scan backend 'mamba_ssm' computes float32 on cuda",
        ),
        (("--m", "1", "--zero_init_adapter", "--adapter", "none"), "--zero_init_adapter is for the linear adapter"),
        (("--m", "1", "--detach_target", "--adapter", "none"), "need something that changes the target"),
        (("--m", "1", "--sab", "mixed"), "--sab and --distill are for attention decoders"),
        (("--m", "1", "--preset", "paper", "--clb_stage", "2", "--load_checkpoint", "x"), "--preset paper has none"),
        (("--m", "1", "--pred_next_n", "4"), "--m and --pred_next_n both say"),
        (("--m", "1", "--standardise", "--holdout", "0"), "would take what is usual from images that were trained on"),
        (
            ("--m", "1", "--clb_stage", "1", "--load_checkpoint", NAME, "--holdout", "0.4", "--item", "bottle"),
            "may have seen images that are held out now",
        ),
        (("--m", "1", "--adapter", "lora", "--cache_features", "ram"), "--adapter lora changes the encoder"),
        (("--m", "1", "--scoring", "prototype", "--phase", "test"), "VarAD has none"),
        (("--m", "1", "--clb_stage", "2"), "by default VarAD-Single-Class-CLB1"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_lost(runs, capsys, flags, sentence):
    before = {path: path.read_bytes() for path in runs.folder().rglob("*.csv")}
    assert before
    assert runs.call("--total_iters", "4", "--quiet", *flags) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert sentence in error
    assert before == {path: path.read_bytes() for path in runs.folder().rglob("*.csv")}


def test_a_finished_runs_settings_make_the_same_run_again(runs):
    stored = runs.folder() / "config.yaml"
    assert runs.call("--config", str(stored), "--quiet", "--save_name", "VarAD-again", "--score", "top1%") == 0
    assert_same(runs.model("VarAD-again")["model"], runs.model()["model"])
    changed = yaml.safe_load((runs.folder("VarAD-again") / "config.yaml").read_text())
    before = yaml.safe_load(stored.read_text())
    assert {key for key, value in before.items() if changed[key] != value} == {"save_name", "max_ratio"}
    assert changed["max_ratio"] == 0.01


def test_the_scan_that_was_asked_for_computes_and_is_named(runs, monkeypatch):
    asked = []
    scan = state_space.selective_scan
    monkeypatch.setattr(state_space, "selective_scan", lambda *arguments: asked.append(arguments[-1]) or scan(*arguments))
    assert runs.call(*ITERATIONS[:-1], "--item", "bottle", "--save_name", "VarAD-torch", "--ssm", "torch") == 0
    assert set(asked) == {"torch"}
    assert "scan: plain torch (--ssm torch)" in (runs.folder("VarAD-torch") / "log.txt").read_text()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_lora_is_packed_with_the_encoder_as_it_is_or_not_at_all(runs, tmp_path, precision, capsys):
    name, file = f"VarAD-packed-lora-{precision}", tmp_path / "bottle.binaryad"
    assert runs.call(*ITERATIONS, "--item", "bottle", "--adapter", "lora", "--save_name", name) == 0
    checkpoint = str(runs.folder(name) / "bottle" / "model.pth")
    code = export.main(["--checkpoint", checkpoint, "--output", str(file), "--encoder_precision", precision, "--quiet"])
    assert code == (0 if precision == "fp32" else 2)
    assert file.exists() == (precision == "fp32")
    if precision == "fp32":
        photographs = str(runs.root / "data" / "bottle" / "test")
        assert predict.main(["--model", str(file), "--input", photographs, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    else:
        assert "give --encoder_precision fp32" in capsys.readouterr().err


def test_image_sizes_are_rounded_down_to_whole_patches():
    parser_flags = ["--dataset", "Folder", "--data_path", "x"]
    for image_size, model, expected in ((1024, "dinov2_vits14", 1022), (512, "dinov2_vits14", 504), (1024, "vit_b_16", 1024)):
        settings = VarAD.settings_of(
            VarAD.base_parser("", VarAD.VARAD, ["single"]).parse_args(
                [*parser_flags, "--image_size", str(image_size), "--model", model]
            )
        )
        assert (settings.data.input_size, settings.data.crop_size) == (expected, expected)


def test_the_benchmark_measures_every_size_and_preset(capsys):
    flags = ["--encoder", "random_vit_tiny_14", "--image_size", "112", "150", "--preset", "paper"]
    assert benchmark_varad.main(flags) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[:3] for row in rows] == [["112", "64", "paper"], ["140", "100", "paper"]]
    for row in rows:
        encoder, scan, rest, whole, peak = map(float, row[3:])
        assert whole == pytest.approx(encoder + scan + rest, abs=0.02)
        assert peak > 100
