"""The whole way through the real command line: float, stage 1, stage 2, test, comparison, packed file, verdicts."""

import csv
import json
import re
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from tests.conftest import REPOSITORY, command_line, run_folder
from tests.miniature import make_mvtec
from utils.checkpoint import load_checkpoint
from utils.hosts import INP_FORMER
from utils.metrics import METRIC_NAMES

ITEMS = ("bottle", "nut")


def run_python(*words: str) -> None:
    """Start the interpreter as a user does, who waits for all the imports."""
    finished = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.filterwarnings("ignore")
def test_float_stage_1_stage_2_test_and_comparison(tmp_path, commands):
    data = make_mvtec(tmp_path / "data", items=ITEMS)
    name, script = "INP-Former-Single-Class", "Binary_INP_Single_Class.py"

    def call(*words: str) -> str:
        finished = commands.run(*words)
        assert finished.code == 0, finished.err
        return finished.out

    def train(*flags: str) -> str:
        return call(script, *command_line(tmp_path, data, "Folder", *flags))

    run_python(script, *command_line(tmp_path, data, "Folder", "--clb_stage", "0", "--total_iters", "12"))
    train("--clb_stage", "1", "--total_iters", "12", "--load_checkpoint", f"{name}-FP")
    stage_2 = ("--clb_stage", "2", "--total_iters", "12", "--load_checkpoint", name)
    output = train(*stage_2, "--distill", "1", "--distill_teacher", f"{name}-FP")
    folders = [run_folder(tmp_path, name + suffix) for suffix in INP_FORMER.stage_suffixes]
    assert f"report: {folders[2] / 'report.html'}" in output

    for stage, folder in enumerate(folders):
        _check_run_folder(folder, stage)
    parts = {line["kind"]: line for line in map(json.loads, (folders[2] / "metrics.jsonl").read_text().splitlines())}
    assert parts["training"]["distillation"] > 0
    assert 0 < parts["evaluation"]["mean_gate"] < 1

    kept = {path: path.read_bytes() for path in folders[2].rglob("*") if path.suffix in (".pth", ".csv", ".jsonl", ".yaml")}
    flags = ("--config", str(folders[2] / "config.yaml"))
    train(*flags, *stage_2, "--phase", "test")
    assert {path: path.read_bytes() for path in kept} == kept
    train(*flags, *stage_2, "--phase", "test", "--force_gate", "0")
    assert (folders[2] / "test_gate=0" / "results.csv").is_file()
    assert {path: path.read_bytes() for path in kept} == kept

    page = tmp_path / "comparison.html"
    printed = call("scripts.report", *map(str, folders), "--html", str(page))
    for folder, suffix in zip(folders, INP_FORMER.stage_suffixes, strict=True):
        mean = list(csv.DictReader((folder / "results.csv").open()))[-1]
        row = next(line.split() for line in printed.splitlines() if line.split()[:1] == [name + suffix])
        assert row[3] == f"{100 * float(mean['I-AUROC']):.2f}"
    assert page.read_text().count("data:image/jpeg;base64") == 6
    _check_packed_model(folders[2] / ITEMS[0], data, tmp_path)


def _check_packed_model(folder, data, tmp_path) -> None:
    """The packed file gives the run's scores, verdicts by its own threshold, and pictures."""
    model, output = tmp_path / "model.binaryad", tmp_path / "out"
    precisions = ("--encoder_precision", "fp32", "--trained_precision", "fp32")
    run_python("-m", "scripts.export", "--checkpoint", str(folder / "model.pth"), "--output", str(model), *precisions)
    run_python(
        "-m", "scripts.predict", "--model", str(model), "--input", str(data / folder.name / "test"), "--output", str(output)
    )
    judged = {row["path"]: row for row in csv.DictReader((output / "predictions.csv").open())}
    expected = {row["path"]: float(row["score"]) for row in csv.DictReader((folder / "scores.csv").open())}
    assert judged.keys() == expected.keys()
    for path, score in expected.items():
        assert float(judged[path]["score"]) == pytest.approx(score, abs=1e-4)
        assert judged[path]["verdict"] == ("NG" if score > float(judged[path]["threshold"]) else "OK")
    pictures = [path for path in (output / "heatmaps").rglob("*.jpg") if Image.open(path).format == "JPEG"]
    assert len(pictures) == len(expected)


def _check_run_folder(folder, stage: int) -> None:
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [row["item"] for row in rows] == [*ITEMS, "Mean"]
    for metric in METRIC_NAMES:
        values = [row[metric] for row in rows]
        assert all(re.fullmatch(r"[01]\.\d{4}", value) for value in values)
        assert float(values[2]) == pytest.approx((float(values[0]) + float(values[1])) / 2, abs=2e-4)
    assert yaml.safe_load((folder / "config.yaml").read_text())["clb_stage"] == stage
    environment = json.loads((folder / "env.json").read_text())
    assert {"command", "torch", "seed", "commit", "encoder_source", "encoder_sha256"} <= environment.keys()
    page = (folder / "report.html").read_text()
    assert "<table>" in page
    assert "<svg" in page
    assert "http:" not in page
    assert "https:" not in page
    for item in ITEMS:
        content = load_checkpoint(folder / item / "model.pth")
        assert (content["stage"], content["item"]) == (stage, item)
        assert not any(key.startswith("encoder.") for key in content["model"])
        assert any(key.endswith("mlp.fc1.alpha") for key in content["model"]) == (stage == 2)
        assert any(key.endswith("attn.q.alpha") for key in content["model"]) == (stage >= 1)
        scores = list(csv.DictReader((folder / item / "scores.csv").open()))
        assert list(scores[0]) == ["path", "item", "label", "score"]
        assert [row["label"] for row in scores] == ["0"] * 3 + ["1"] * 3
        assert Image.open(folder / item / "maps" / "contact_sheet.jpg").format == "JPEG"
        assert not (folder / item / "last.pth").exists()
