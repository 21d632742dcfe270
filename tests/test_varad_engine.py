"""VarAD with what the engine offers to every network: held-out images, resuming, several processes, packing, other data."""

import csv
from pathlib import Path

import pytest
import torch

import VarAD
from binarize.packed import read_file
from common.errors import Interrupted
from models.varad import VarAD as VarADDetector
from scripts import export, predict
from tests.commands import joint_errors
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from tests.test_distributed import metrics
from tests.test_resume import assert_same
from tests.test_varad_runs import FLAGS, ITERATIONS, Runs
from utils import train_phase, training
from utils.checkpoint import load_checkpoint

ITEMS = ("bottle", "nut")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("varad"))
    make_mvtec(runs.root / "data", items=ITEMS)
    return runs


def scores_below(file: Path, column: str = "score") -> dict[str, float]:
    """Scores by the last two parts of an image's path."""
    with open(file) as stream:
        return {"/".join(Path(row["path"]).parts[-2:]): float(row[column]) for row in csv.DictReader(stream)}


def test_held_out_images_are_kept_from_the_training_and_what_follows_learns_from_them_alone(runs, monkeypatch):
    trained, calibrated = set(), []
    fit = train_phase.fit

    def seen(detector, data, *arguments):
        trained.update(data[index]["path"] for index in range(len(data)))
        return fit(detector, data, *arguments)

    monkeypatch.setattr(train_phase, "fit", seen)
    monkeypatch.setattr(VarADDetector, "calibrate", lambda detector, batches: calibrated.append(sum(map(len, batches))))
    assert runs.call(*ITERATIONS, "--setting", "multi", "--holdout", "0.4", "--save_name", "VarAD-held-out") == 0
    every = {item: set(map(str, (runs.root / "data" / item / "train" / "good").iterdir())) for item in ITEMS}
    assert [len(paths) for paths in every.values()] == [8, 8]
    assert [len(trained & paths) for paths in every.values()] == [5, 5]  # 3 of every category are held out
    assert calibrated == [6]

    folder = runs.folder("VarAD-held-out")
    content = load_checkpoint(folder / "model.pth")
    held_out = runs.root / "held out"  # the same images as test images give the scores that thresholds come from
    for item in ITEMS:
        for kind in ("train", "test"):
            (held_out / item / kind / "good").mkdir(parents=True)
        for path in map(Path, sorted(every[item] - trained)):
            (held_out / item / "test" / "good" / path.name).write_bytes(path.read_bytes())
    test = ("--phase", "test", "--test_checkpoint", str(folder / "model.pth"), "--setting", "multi")
    assert runs.call(*FLAGS, *test, "--data_path", str(held_out), "--holdout", "0.4") == 0
    results = next((runs.root / "runs").glob("*Source=*"))
    for item in ITEMS:
        expected = sorted(scores_below(results / item / "scores.csv").values())
        assert sorted(content["calibrations"][item]["scores"]) == pytest.approx(expected, abs=1e-5)
    file = runs.root / "held-out.binaryad"
    assert export.main(["--checkpoint", str(folder / "model.pth"), "--output", str(file), "--quiet"]) == 0
    source = "quantile 0.99 of 6 scores of held-out training images, stored by the training"
    assert read_file(file)[1]["decision"]["source"] == source


@pytest.mark.parametrize(
    "flags",
    [
        ("--cache_features", "off"),
        ("--cache_features", "disk"),
        ("--adapter", "lora+resblock"),
        ("--setting", "multi", "--standardise", "--holdout", "0.3", "--learn_start"),
    ],
    ids=" ".join,
)
def test_an_interrupted_training_resumes_to_the_same_model(runs, monkeypatch, flags):
    whole, parts = (f"VarAD-{kind}{'-'.join(flags)}".replace("--", "-") for kind in ("whole", "parts"))
    flags = (*ITERATIONS, *(() if "multi" in flags else ("--item", "bottle")), *flags)
    assert runs.call(*flags, "--save_name", whole) == 0
    save = training.save_training_state

    def stop(path, detector, optimizer, iteration, identity):
        save(path, detector, optimizer, iteration, identity)
        if iteration == 2:
            raise Interrupted(2)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_training_state", stop)
        assert runs.call(*flags, "--save_name", parts, "--save_every", "2") == 130
    assert runs.call(*flags, "--save_name", parts, "--save_every", "2", "--resume") == 0
    models = [next(runs.folder(name).rglob("model.pth")) for name in (whole, parts)]
    assert_same(*(load_checkpoint(model)["model"] for model in models))


def test_two_processes_train_and_measure_as_one(commands, tmp_path):
    data = make_mvtec(tmp_path / "data", items=ITEMS, train=5, good=4)
    flags = ("--total_iters", "4", "--m", "1", "--setting", "multi")
    together = command_line(tmp_path, data, "Folder", *flags, "--save_name", "VarAD-together", "--batch_size", "2")
    processes = commands.start_two("VarAD.py", *together)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = command_line(tmp_path, data, "Folder", *flags, "--save_name", "VarAD-alone", "--batch_size", "4", "--quiet")
    assert VarAD.main(alone) == 0
    joint_errors(processes)
    first, second = (metrics(run_folder(tmp_path, f"VarAD-{name}") / "metrics.jsonl") for name in ("alone", "together"))
    assert [line["iteration"] for line in first] == [line["iteration"] for line in second] == [4]
    assert second[0]["loss"] == pytest.approx(first[0]["loss"], rel=1e-5)

    folder = run_folder(tmp_path, "VarAD-together")
    tables = [folder / "results.csv", *(folder / item / "scores.csv" for item in ITEMS)]
    sharded = [table.read_bytes() for table in tables]
    for table in tables:
        table.unlink()
    assert VarAD.main([*together, "--phase", "test", "--quiet"]) == 0
    torch.set_num_threads(threads)
    assert [table.read_bytes() for table in tables] == sharded


@pytest.mark.parametrize(
    "flags",
    [
        ("--adapter", "resblock", "--standardise", "--holdout", "0.3"),
        ("--preset", "paper", "--clb_stage", "1", "--learn_start"),
        ("--preset", "paper", "--clb_stage", "1", "--act_bits", "32"),
        ("--pred_next_n", "8", "--hierarchies", "3", "1", "--directions", "reversed_row", "row", "--d_state", "5"),
    ],
    ids=" ".join,
)
def test_packed_files_of_every_form_score_as_the_trained_model(runs, tmp_path, flags):
    name = f"VarAD-packed{'-'.join(flags)}".replace("--", "-")
    iterations = ITERATIONS if "--pred_next_n" not in flags else ("--total_iters", "4", "--quiet")
    assert runs.call(*iterations, "--item", "bottle", "--save_name", name, *flags) == 0
    file = tmp_path / "bottle.binaryad"
    model = str(runs.folder(name) / "bottle" / "model.pth")
    precise = ("--encoder_precision", "fp32", "--trained_precision", "fp32", "--quiet")
    assert export.main(["--checkpoint", model, "--output", str(file), *precise]) == 0
    photographs = str(runs.root / "data" / "bottle" / "test")
    assert predict.main(["--model", str(file), "--input", photographs, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    found = scores_below(tmp_path / "out" / "predictions.csv")
    expected = scores_below(runs.folder(name) / "bottle" / "scores.csv")
    assert found == pytest.approx(expected, rel=1e-3, abs=2e-4)
