"""Export, evaluation, prediction and ONNX of models that Dinomaly's script has trained, through their command lines."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import Binary_Dinomaly
from binarize.packed import read_file
from datasets.records import ImageDataset, Record
from scripts import evaluate, export, predict
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from tests.test_dinomaly_packed import BLOCKS, PATCHES, has_no_tie
from utils.detectors import load_detector
from utils.packed_model import load_packed

FLOAT = ("--encoder_precision", "fp32", "--trained_precision", "fp32")
RUNS = {  # save name: flags of its training; cached features are float16, without the cache a packed file measures the same
    "dinomaly-one": ("--clb_stage", "1"),
    "dinomaly-linear": ("--clb_stage", "2", "--load_checkpoint", "dinomaly-one"),
    "dinomaly-softmax": ("--clb_stage", "1", "--decoder_attention", "softmax", "--remove_class_token"),
    "dinomaly-float": ("--clb_stage", "0", "--groups", "1", "--recentre"),
}
BINARY = ["dinomaly-linear", "dinomaly-softmax"]
DECISIONS = {"dinomaly-linear": (1 + PATCHES) * 7 * 32, "dinomaly-softmax": PATCHES * 2 * 32}  # of a block


@dataclass(frozen=True)
class Trained:
    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def folder(self, name: str) -> Path:
        return run_folder(self.root, name)

    def images(self) -> torch.Tensor:
        """All photographs of the data, as the networks take them."""
        data = ImageDataset([Record(path, 0, "") for path in sorted(self.data.glob("bottle/t*/*/*.png"))], 64, 56)
        return torch.stack([data.image(index) for index in range(len(data))])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    root = tmp_path_factory.mktemp("tools")
    data = make_mvtec(root / "data")
    for name, flags in RUNS.items():
        words = ("--total_iters", "5", "--cache_features", "off", "--quiet", "--save_name", name, *flags)
        assert Binary_Dinomaly.main(command_line(root, data, "Folder", *words)) == 0
    return Trained(root)


@pytest.fixture
def call(capsys):
    """Call a tool in this process; returns what it wrote to stdout and stderr."""

    def run(tool, *flags: object) -> tuple[str, str]:
        capsys.readouterr()
        assert tool.main([*map(str, flags)]) == 0
        return tuple(capsys.readouterr())

    return run


@pytest.fixture
def packed(trained, call, tmp_path):
    """Export a run's model; returns the file and what the tool said."""

    def run(name: str, *flags: str) -> tuple[Path, str]:
        output = tmp_path / f"{name}.binaryad"
        _, said = call(export, "--checkpoint", trained.folder(name) / "model.pth", "--output", output, *flags)
        return output, said

    return run


def without_ties(detector, images: torch.Tensor) -> torch.Tensor:
    chosen = [image for image in images.split(1) if has_no_tie(detector, image)]
    assert len(chosen) > 3
    return torch.cat(chosen)


@pytest.mark.parametrize("name", BINARY)
def test_export_writes_a_file_that_decides_as_the_checkpoint(trained, packed, name):
    file, said = packed(name, *FLOAT)
    differing, decisions = re.search(r"two images of noise: (\d+) of (\d+) binary decisions differ", said).groups()
    assert (int(differing), int(decisions)) == (0, 2 * BLOCKS * DECISIONS[name])
    detector, content = load_detector(trained.folder(name) / "model.pth", None)
    loaded, description = load_packed(file)
    images = without_ties(detector, trained.images())
    torch.testing.assert_close(loaded.anomaly_map(images), detector.anomaly_map(images), rtol=0, atol=1e-5)
    network = ("pos_embed", "input_size", "crop_size", "act_bits", "sab", "weight_gradient", "activation_gradient")
    network += ("decoder_attention", "groups", "remove_class_token", "recentre")
    assert description["config"] == {key: content["config"][key] for key in network}
    assert (description["host"], description["item"], description["stage"]) == ("Dinomaly", "multi", content["stage"])


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


@pytest.mark.parametrize("name", BINARY)
def test_evaluation_of_the_file_gives_the_numbers_of_the_run(trained, packed, call, name):
    file, _ = packed(name, *FLOAT)
    words = ("--dataset", "Folder", "--data_path", trained.data, "--item", "bottle", "--quiet")
    header, line = (row.split() for row in call(evaluate, "--model", file, *words)[0].splitlines())
    (expected,) = (row for row in table(trained.folder(name) / "results.csv") if row["item"] == "bottle")
    for metric in ("I-AUROC", "I-AP", "P-AUROC", "P-AP", "AUPRO"):
        assert float(line[header.index(metric)]) == pytest.approx(100 * float(expected[metric]), abs=0.02)


@pytest.mark.parametrize(("name", "precision"), [(BINARY[0], FLOAT), (BINARY[1], FLOAT), (BINARY[0], ())])
def test_prediction_gives_the_scores_of_the_run(trained, packed, call, tmp_path, name, precision):
    file, _ = packed(name, *precision)
    call(predict, "--model", file, "--input", trained.data / "bottle" / "test", "--output", tmp_path / "out", "--quiet")
    judged = {row["path"]: row for row in table(tmp_path / "out" / "predictions.csv")}
    expected = {row["path"]: float(row["score"]) for row in table(trained.folder(name) / "bottle" / "scores.csv")}
    assert judged.keys() == expected.keys()
    for path, score in expected.items():
        assert float(judged[path]["score"]) == pytest.approx(score, abs=1e-4 if precision else 0.05)
        assert judged[path]["verdict"] == ("NG" if float(judged[path]["score"]) > float(judged[path]["threshold"]) else "OK")
    assert len(list((tmp_path / "out" / "heatmaps").rglob("*.jpg"))) == len(expected)


@pytest.mark.parametrize("item", [None, "bottle"])
def test_file_of_a_model_of_many_categories_has_a_threshold(packed, item):
    file, _ = packed(BINARY[0], *(["--item", item] if item else []))
    description = read_file(file)[1]
    assert description["item"] == (item or "multi")
    assert 0 < description["decision"]["threshold"] < 2


@pytest.mark.parametrize("name", ["dinomaly-float", *BINARY])
def test_onnx_computes_the_map_for_every_batch_size(trained, call, tmp_path, name):
    pytest.importorskip("onnx", reason="ONNX export needs requirements-onnx.txt")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX export needs requirements-onnx.txt")
    output = tmp_path / "model.onnx"
    call(export, "--checkpoint", trained.folder(name) / "model.pth", "--output", output)
    session = runtime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    detector, content = load_detector(trained.folder(name) / "model.pth", None)
    images = without_ties(detector, trained.images())[:4]
    for batch in (images[:1], images[1:]):
        (found,) = session.run(["anomaly_map"], {"image": batch.numpy()})
        expected = detector.anomaly_map(batch).numpy()
        assert expected.std() > 0.01
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    description = json.loads(session.get_modelmeta().custom_metadata_map["binaryad"])
    assert (description["host"], description["stage"]) == ("Dinomaly", content["stage"])
