"""Export and evaluation of packed files through their command lines, on models that the training script has trained."""

import csv
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import Binary_INP_Single_Class
from datasets.records import ImageDataset, Record
from models.build import RANDOM_TINY_ENCODER, build_encoder
from models.inp_former import INPFormer
from scripts import evaluate, export
from tests.conftest import REPOSITORY, command_line, run_folder
from tests.miniature import make_mvtec, save, texture
from tests.test_packed import plain_parts, plain_read
from tests.test_runtime import decisions_of, smallest_margin
from utils.agreement import packed_copy
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.detectors import load_detector
from utils.evaluation import evaluate as score_images
from utils.metrics import METRIC_NAMES
from utils.packed_model import PackingOptions, load_packed
from utils.prediction import Predictor
from utils.protocol import EvaluationOptions

FLOAT = ("--encoder_precision", "fp32", "--trained_precision", "fp32")
NAME = "INP-Former-Single-Class"
# stage or kind: save name and further flags of its training
RUNS = {
    0: (f"{NAME}-FP", ("--clb_stage", "0")),
    1: (NAME, ("--clb_stage", "1", "--load_checkpoint", f"{NAME}-FP")),
    2: (f"{NAME}-CLB2", ("--clb_stage", "2", "--load_checkpoint", NAME)),
    "weights": ("Weights", ("--clb_stage", "1", "--act_bits", "32", "--save_name", "Weights")),
}


@dataclass(frozen=True)
class Trained:
    """Data, and the run folders of three stages and of a network with binary weights alone."""

    data: Path
    folders: dict[int | str, Path]

    def model(self, kind: int | str) -> Path:
        return self.folders[kind] / "bottle" / "model.pth"

    @property
    def images(self) -> list[Path]:
        return sorted((self.data / "bottle").glob("t*/*/*.png"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    data = make_mvtec(root / "data")
    for _, flags in RUNS.values():
        # cached features are float16: without the cache the training measures what a packed file does
        rest = ("--total_iters", "5", "--cache_features", "off", "--quiet")
        assert Binary_INP_Single_Class.main(command_line(root, data, "Folder", *flags, *rest)) == 0
    return Trained(data, {kind: run_folder(root, name) for kind, (name, _) in RUNS.items()})


@pytest.fixture
def run(capsys):
    """Call a command line in this process; returns what it wrote to stdout and stderr."""

    def call(command, *flags, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        assert command.main([*map(str, flags)]) == code
        return tuple(capsys.readouterr())

    return call


@pytest.fixture
def fails(run, tmp_path):
    """Call an export that must fail; returns its one sentence. Nothing new is in the output's folder then."""

    def call(checkpoint: Path, *flags, output: Path = tmp_path / "model.binaryad", code: int = 2) -> str:
        before = sorted(output.parent.iterdir())
        flags = ("--checkpoint", checkpoint, "--output", output, *flags)
        printed, errors = run(export, *flags, code=code)
        (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert printed == ""
        assert sorted(output.parent.iterdir()) == before
        return sentence

    return call


@pytest.fixture
def exported(run, tmp_path):
    """Export a model; returns the file and what the command wrote to stdout and stderr."""

    def call(checkpoint: Path, *flags, name: str = "model.binaryad") -> tuple[Path, str, str]:
        output = tmp_path / name
        return output, *run(export, "--checkpoint", checkpoint, "--output", output, *flags)

    return call


def inputs_of(paths: list[Path]) -> torch.Tensor:
    data = ImageDataset([Record(path, 0, "bottle") for path in paths], 64, 56)
    return torch.stack([data.image(index) for index in range(len(data))])


def without_ties(detector, images: torch.Tensor) -> torch.Tensor:
    """Those images on which rounding cannot turn a decision."""
    chosen = [image for image in images.split(1) if smallest_margin(detector, image) > 1e-5]
    assert len(chosen) > 3
    return torch.cat(chosen)


def scores_of(detector, paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and smoothed maps."""
    data = ImageDataset([Record(path, 0, "bottle") for path in paths], 64, 56)
    evaluation = score_images(detector, data, EvaluationOptions(), 1, 0, "fp32", "images")
    return evaluation.scores, evaluation.maps


@pytest.mark.parametrize("stage", [1, 2])
def test_float_file_computes_the_maps_of_its_checkpoint(trained, exported, stage):
    file, printed, errors = exported(trained.model(stage), *FLOAT, name=f"new folder/stage {stage}.binaryad")
    assert printed == f"written: {file} ({file.stat().st_size:,} bytes)\n"
    differing, decisions, difference = re.search(
        r"on bits, two images of noise: (\d+) of (\d+) binary decisions differ from the trained model's, "
        r"its maps by at most (\S+)",
        errors,
    ).groups()
    assert (int(differing), int(decisions)) == (0, decisions_of(stage, 32, 56, 6) // 3 * 2)
    assert float(difference) < 1e-5
    detector, _ = load_detector(trained.model(stage), None)
    packed, description = load_packed(file)
    images = without_ties(detector, inputs_of(trained.images))
    torch.testing.assert_close(packed.anomaly_map(images), detector.anomaly_map(images), rtol=0, atol=1e-5)
    assert (description["stage"], description["item"], description["host"]) == (stage, "bottle", "INP-Former")


def test_network_of_binary_weights_alone(trained, exported):
    detector, _ = load_detector(trained.model("weights"), None)
    images = without_ties(detector, inputs_of(trained.images))
    file, _, errors = exported(trained.model("weights"), *FLOAT)
    assert "on bits" not in errors
    torch.testing.assert_close(load_packed(file)[0].anomaly_map(images), detector.anomaly_map(images), rtol=0, atol=1e-5)
    smaller, _, _ = exported(trained.model("weights"), name="int8.binaryad")
    torch.testing.assert_close(load_packed(smaller)[0].anomaly_map(images), detector.anomaly_map(images), rtol=0, atol=0.1)
    assert smaller.stat().st_size < file.stat().st_size / 2


def test_default_file_is_the_packed_checkpoint_in_8_bits(trained, exported):
    file, _, _ = exported(trained.model(2))
    detector, content = load_detector(trained.model(2), None)
    images = inputs_of(trained.images)
    found, description = load_packed(file)
    assert torch.equal(found.anomaly_map(images), packed_copy(detector, PackingOptions()).anomaly_map(images))
    assert description["precision"] == {"encoder": "int8", "trained": "int8", "encoder_reference": False}
    _, entry = plain_read(file.read_bytes())
    network = ("pos_embed", "input_size", "crop_size", "INP_num", "act_bits", "sab", "weight_gradient", "activation_gradient")
    assert entry["config"] == {key: content["config"][key] for key in network}  # and no path of the machine that trained it
    assert entry["protocol"] == content["protocol"]
    assert entry["encoder"]["sha256"] == content["encoder_sha256"]
    assert entry["calibration"] == {key: content["calibration"][key] for key in ("map_median", "map_limit")}
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert entry["preprocessing"] == {"input_size": 64, "crop_size": 56, "mean": mean, "std": std}


def test_command_in_a_process_of_its_own_writes_the_same_bytes(trained, exported, tmp_path):
    file, _, _ = exported(trained.model(2))
    other = tmp_path / "other.binaryad"
    command = [sys.executable, "-m", "scripts.export", "--checkpoint", trained.model(2), "--output", other, "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environment)
    lines = [line for line in done.stderr.splitlines() if "no 8-bit dot product" not in line]  # what some CPUs have to say
    assert (done.returncode, lines) == (0, [])
    assert done.stdout == f"written: {other} ({file.stat().st_size:,} bytes)\n"
    assert other.read_bytes() == file.read_bytes()


# ---------------------------------------------------------------------------- decision threshold


def decision_of(file: Path) -> dict:
    return plain_read(file.read_bytes())[1]["decision"]


@pytest.mark.parametrize(("flags", "quantile", "margin"), [((), 0.99, 1), (("0.5", "1.25"), 0.5, 1.25), (("1",), 1, 1)])
def test_threshold_is_a_quantile_of_the_scores_of_the_training(trained, exported, flags, quantile, margin):
    given = [word for pair in zip(("--threshold_quantile", "--threshold_margin"), flags, strict=False) for word in pair]
    file, _, errors = exported(trained.model(2), *given)
    scores = load_checkpoint(trained.model(2))["calibration"]["scores"]
    assert len(scores) == 8
    decision = decision_of(file)
    assert decision["threshold"] == pytest.approx(np.quantile(scores, quantile) * margin, rel=1e-12)
    assert (decision["quantile"], decision["margin"], decision["images"]) == (quantile, margin, 8)
    assert f"threshold: {np.quantile(scores, quantile) * margin:.4f}, from {decision['source']}" in errors
    assert f"quantile {quantile:g} of 8 scores of training images" in decision["source"]
    assert decision["source"].startswith("1.25 x ") == (margin != 1)


def test_threshold_and_scale_from_given_normal_images(trained, exported, tmp_path):
    good = trained.data / "bottle" / "test" / "good"
    extra = save(tmp_path / "more" / "deep" / "extra.png", texture(np.random.default_rng(7)))
    flags = ("--calibration_images", good, tmp_path / "more", "--threshold_quantile", "0.8")
    file, _, errors = exported(trained.model(2), *flags)
    packed, description = load_packed(file)
    scores, maps = scores_of(packed, [*sorted(good.iterdir()), extra])
    assert len(scores) == 4
    decision = decision_of(file)
    assert decision["threshold"] == pytest.approx(np.quantile(scores, 0.8), rel=1e-6)
    assert decision["images"] == 4
    assert "4 scores of the given normal images by the packed model" in errors
    assert description["calibration"]["map_median"] == pytest.approx(np.median(maps), rel=1e-6)
    assert description["calibration"]["map_limit"] == pytest.approx(np.quantile(maps, 0.999), rel=1e-6)
    assert decision["threshold"] != decision_of(exported(trained.model(2), name="plain.binaryad")[0])["threshold"]


def test_resize_border_and_size_of_a_training_go_with_the_file(trained, exported, tmp_path):
    flags = ("--clb_stage", "1", "--interpolation", "bicubic", "--metric_size", "0", "--smoothing_border", "reflect")
    command = command_line(tmp_path, trained.data, "Folder", *flags, "--total_iters", "2", "--quiet")
    assert Binary_INP_Single_Class.main(command) == 0
    generator = np.random.default_rng(8)
    photos = [save(tmp_path / "large" / f"{index}.png", texture(generator, side=90)) for index in range(3)]
    checkpoint = run_folder(tmp_path) / "bottle" / "model.pth"
    file, _, _ = exported(checkpoint, "--calibration_images", tmp_path / "large", "--threshold_quantile", "1")
    packed, description = load_packed(file)
    assert description["preprocessing"]["interpolation"] == "bicubic"
    options = EvaluationOptions(metric_size=0, smoothing_border="reflect")
    assert EvaluationOptions.from_config(description["protocol"]) == options
    data = ImageDataset([Record(path, 0, "bottle") for path in photos], 64, 56, interpolation="bicubic")
    scores = score_images(packed, data, options, 1, 0, "fp32", "images").scores
    assert [prediction.score for prediction in map(Predictor.load(file), photos)] == scores.tolist()
    assert decision_of(file)["threshold"] == pytest.approx(scores.max(), rel=1e-12)


# ---------------------------------------------------------------------------- sizes


def size_rows(errors: str) -> dict[str, list[str]]:
    """The printed table, by its first column."""
    lines = errors.splitlines()
    start = next(index for index, line in enumerate(lines) if re.match(r"file +bytes +float32 bytes +ratio", line))
    return {name: cells for name, *cells in (re.split(r" {2,}", line) for line in lines[start + 1 :])}


def bytes_without_description(content: bytes) -> int:
    """Size of a file whose description says no more than how to read its tensors."""
    header, entry, data = plain_parts(content)
    kept = {key: entry[key] for key in ("format_version", "sha256", "precision", "compressed")}
    text = json.dumps({"__metadata__": {"binaryad": json.dumps(kept)}, **header}, separators=(",", ":"))
    return 8 + len(text) + -len(text) % 8 + len(data)


@pytest.mark.parametrize(("stage", "flags"), [(1, FLOAT), (2, ()), ("weights", ())])
def test_printed_sizes_are_those_of_files(trained, exported, stage, flags):
    complete, _, errors = exported(trained.model(stage), *flags)
    rows = size_rows(errors)
    reference, _, short = exported(trained.model(stage), *flags, "--encoder_reference", name="reference.binaryad")
    trained_part, whole = bytes_without_description(reference.read_bytes()), complete.stat().st_size
    assert 0 < reference.stat().st_size - trained_part < 5000
    added = ("alpha", "threshold", "log_activation_scale", "gate_slope", "gate_middle", "calibrated", "alpha_at_conversion")
    state = load_checkpoint(trained.model(stage))["model"]
    parameters = sum(value.numel() for name, value in state.items() if not name.endswith(added))
    encoder = build_encoder(RANDOM_TINY_ENCODER, 56)
    run_part = sum(value.numel() for value in encoder.parameters())
    assert encoder.published_parameters == run_part + 2 * 32  # the last norm
    expected = {
        "trained part": (trained_part, 4 * parameters),
        "whole model": (whole, 4 * (parameters + run_part)),
        "whole model, float32 with unused blocks": (whole, 4 * (parameters + encoder.published_parameters)),
    }
    assert rows == {name: [f"{ours:,}", f"{floats:,}", f"{floats / ours:.2f}x"] for name, (ours, floats) in expected.items()}
    assert size_rows(short) == {"trained part": rows["trained part"]}


# ---------------------------------------------------------------------------- what is refused


def test_float_models_have_no_packed_form(trained, fails):
    message = fails(trained.model(0))
    assert "nothing to pack" in message
    assert "CLB stage 0" in message
    assert "FILE.onnx" in message


def test_checkpoints_that_are_none(trained, fails, tmp_path):
    assert "checkpoint not found" in fails(tmp_path / "absent.pth")
    assert "checkpoint not found" in fails(tmp_path)
    damaged = tmp_path / "damaged.pth"
    content, weight = trained.model(1).read_bytes(), load_checkpoint(trained.model(1))["model"]["bottleneck.0.fc1.weight"]
    position = content.index(weight.numpy().tobytes())
    damaged.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    assert "do not match their hash" in fails(damaged)
    damaged.write_bytes(b"")
    assert "is empty" in fails(damaged)
    torch.save({"weight": torch.ones(3)}, damaged)
    assert "not a BinaryAD checkpoint" in fails(damaged)


def test_last_checkpoint_of_a_training_that_did_not_end(train, fails, mvtec, tmp_path, monkeypatch):
    original, calls = INPFormer.training_loss, iter(range(100))

    def training_loss(self, inputs):
        loss, parts = original(self, inputs)
        return (loss * float("nan") if next(calls) == 3 else loss), parts

    monkeypatch.setattr(INPFormer, "training_loss", training_loss)
    assert train("--total_iters", "9", "--save_every", "2", data=mvtec) == 3
    message = fails(run_folder(tmp_path) / "bottle" / "last.pth")
    assert "checkpoint incomplete" in message
    assert "model.pth of a finished training" in message


@pytest.mark.parametrize("missing", ["protocol", "calibration", "scores"])
def test_checkpoint_of_an_older_version(trained, fails, tmp_path, missing):
    content = load_checkpoint(trained.model(1))
    if missing == "scores":
        del content["calibration"]["scores"]
    else:
        del content[missing]
    save_checkpoint(tmp_path / "old.pth", content)
    assert "checkpoint incomplete" in fails(tmp_path / "old.pth")


def test_another_encoder_than_in_training(trained, fails, tmp_path):
    content = load_checkpoint(trained.model(1))
    save_checkpoint(tmp_path / "other.pth", {**content, "encoder_sha256": "f" * 64})
    message = fails(tmp_path / "other.pth")
    assert "wrong encoder" in message
    assert "ffffffffffffffff" in message
    assert content["encoder_sha256"][:16] in message
    save_checkpoint(tmp_path / "other.pth", {**content, "host": "PatchCore"})
    assert "unknown host" in fails(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["model.pth", "model", "model.binaryad.zip", "model.BINARYAD"])
def test_output_of_an_unknown_kind(trained, fails, tmp_path, name):
    assert "must end with .binaryad or .onnx" in fails(trained.model(1), output=tmp_path / name)


@pytest.mark.parametrize("value", ["-0.01", "1.01", "99", "nan", "inf"])
def test_quantile_that_is_none(trained, fails, value):
    assert "--threshold_quantile" in fails(trained.model(1), f"--threshold_quantile={value}")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_margin_that_is_no_factor(trained, fails, value):
    assert "--threshold_margin" in fails(trained.model(1), f"--threshold_margin={value}")


def test_calibration_images_that_cannot_be_used(trained, fails, tmp_path):
    folder = tmp_path / "normal"
    folder.mkdir()
    (folder / "notes.txt").write_text("no image\n")
    good = save(tmp_path / "good" / "a.png", texture(np.random.default_rng(0)))

    def with_images(*paths: Path, more=()) -> str:
        return fails(trained.model(1), *more, "--calibration_images", *paths)

    assert f"no images in {str(folder)!r}" in with_images(folder)
    assert f"input not found: {str(tmp_path / 'absent')!r}" in with_images(good.parent, tmp_path / "absent")
    broken = folder / "b.png"
    broken.write_bytes(good.read_bytes()[:200])
    assert repr(str(broken)) in with_images(good.parent, folder)
    broken.write_bytes(b"")
    assert "is empty (0 bytes)" in with_images(good.parent, broken)
    assert "--max_pixels" in with_images(good, more=("--max_pixels", "1000"))


def test_folder_where_the_file_should_go(trained, fails, tmp_path):
    folder = tmp_path / "model.binaryad"
    folder.mkdir()
    (folder / "thesis.txt").write_text("two years of work")
    assert f"cannot write {str(folder)!r}" in fails(trained.model(1), output=folder, code=4)
    assert (folder / "thesis.txt").read_text() == "two years of work"


def test_file_where_a_folder_should_be(trained, run, tmp_path):
    (tmp_path / "thesis.txt").write_text("two years of work")
    output = tmp_path / "thesis.txt" / "model.binaryad"
    printed, errors = run(export, "--checkpoint", trained.model(1), "--output", output, code=4)
    assert printed == ""
    assert f"error: cannot write {str(output)!r}" in errors
    assert (tmp_path / "thesis.txt").read_text() == "two years of work"


def test_an_older_file_is_replaced_as_a_whole_or_not_at_all(trained, exported, fails, tmp_path, monkeypatch):
    file, _, _ = exported(trained.model(1))
    before = file.read_bytes()
    assert "nothing to pack" in fails(trained.model(0))
    assert "no images" in fails(trained.model(2), "--calibration_images", REPOSITORY / "common")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        assert "disk full" in fails(trained.model(2), code=4)
    assert file.read_bytes() == before
    with file.open("rb") as still_open:
        exported(trained.model(2))
        assert still_open.read() == before
    assert load_packed(file)[1]["stage"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model.binaryad"]


# ---------------------------------------------------------------------------- evaluate


def table_of(printed: str) -> list[dict[str, str]]:
    """Rows of a printed table by the names in its header."""
    header, *rows = (re.split(r" {2,}", line.strip()) for line in printed.splitlines())
    return [dict(zip(header, row, strict=True)) for row in rows]


def data_flags(trained: Trained) -> tuple[str, ...]:
    return ("--dataset", "Folder", "--data_path", str(trained.data))


def test_evaluation_finds_what_the_training_measured(trained, exported, run):
    files = [exported(trained.model(stage), *FLOAT, name=f"stage {stage}.binaryad")[0] for stage in (1, 2)]
    files.append(exported(trained.model(2), name="int8.binaryad")[0])
    printed, _ = run(evaluate, "--model", *files, *data_flags(trained), "--quiet", "--threads", torch.get_num_threads())
    rows = table_of(printed)
    assert [(row["model"], row["item"]) for row in rows] == [(file.name, "bottle") for file in files]
    test_images = inputs_of(sorted((trained.data / "bottle" / "test").glob("*/*.png")))
    for row, file, stage in zip(rows, files, (1, 2, 2), strict=True):
        margin = smallest_margin(load_detector(trained.model(stage), None)[0], test_images)
        is_the_same = file is not files[2] and margin > 1e-6  # else rounding may have turned a decision
        tolerance = 0.011 if is_the_same else 3
        (expected, _) = csv.DictReader((trained.folders[stage] / "results.csv").open())
        assert {name: float(row[name]) for name in METRIC_NAMES} == pytest.approx(
            {name: 100 * float(expected[name]) for name in METRIC_NAMES}, abs=tolerance
        )
        assert row["MB"] == f"{file.stat().st_size / 1e6:.2f}"
        assert 0 < int(row["ms per image"]) < 10_000
    scores = list(csv.DictReader((trained.folders[2] / "bottle" / "scores.csv").open()))
    threshold = decision_of(files[1])["threshold"]
    right = {
        label: sum((float(line["score"]) > threshold) == (label == "1") for line in scores if line["label"] == label)
        for label in "01"
    }
    assert (rows[1]["OK right"], rows[1]["NG right"]) == (f"{right['0']}/3", f"{right['1']}/3")


def test_evaluation_with_a_threshold_below_and_above_everything(trained, exported, run):
    for margin, expected in (("1e-9", ("0/3", "3/3")), ("1e9", ("3/3", "0/3"))):
        file, _, _ = exported(trained.model(2), "--threshold_margin", margin)
        (row,) = table_of(run(evaluate, "--model", file, *data_flags(trained))[0])
        assert (row["OK right"], row["NG right"]) == expected


def refused_by_evaluation(run: Callable, trained: Trained, file: Path, *flags) -> str:
    printed, errors = run(evaluate, "--model", file, *data_flags(trained), *flags, code=2)
    (sentence,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert printed == ""
    assert "Traceback" not in errors
    return sentence


def test_evaluation_refuses_what_is_no_model(trained, exported, run, tmp_path):
    good, _, _ = exported(trained.model(2))
    content = good.read_bytes()
    bad = tmp_path / "bad.binaryad"
    middle = len(content) // 2
    (header_length,) = struct.unpack("<Q", content[:8])
    for damaged, expected in (
        (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], "does not match its own sha256"),
        (content[:-1], "was cut short"),
        (content[: header_length // 2], "ends within its header"),
        (b"", "is empty"),
        (b"<html>" * 50, "is no BinaryAD file"),
        (trained.model(2).read_bytes(), "training checkpoint"),
    ):
        bad.write_bytes(damaged)
        message = refused_by_evaluation(run, trained, bad)
        assert expected in message
        assert repr(str(bad)) in message
    assert "model not found" in refused_by_evaluation(run, trained, tmp_path / "absent.binaryad")
    with pytest.raises(SystemExit, match="2"):
        refused_by_evaluation(run, trained, good, "--threads", "0")
    assert "--device" in refused_by_evaluation(run, trained, good, "--device", "tpu")
    assert "did you mean 'bottle'" in refused_by_evaluation(run, trained, good, "--item", "botle")
    assert "no folder" in refused_by_evaluation(run, trained, good, "--data_path", tmp_path / "nowhere")
