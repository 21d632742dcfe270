"""The packed file of a quantized RAAD, read by plain arithmetic and loaded back by the program: same weights and verdicts."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import NumericError, UserError
from models.efficientad import EfficientAD
from quantize.accounting import detector_size, layer_sizes
from quantize.layers import quantized_layers
from quantize.packed_codes import pack_codes, unpack_codes
from scripts import benchmark, evaluate, export, predict, report
from tests.miniature import make_mvtec
from tests.packed_files import DECISION, PROTOCOL, preprocessing
from tests.raad_models import NEAREST, SIDE, checkpoint_of, detector_of, images_of, train_stages
from tests.test_packed import plain_read, rewritten
from utils import raad_export
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.detectors import load_detector
from utils.packed_model import load_packed
from utils.prediction import Predictor
from utils.raad_export import describe_efficientad, export_codes
from utils.raad_packed import stored_tensors

CONTENT = {
    "host": "RAAD",
    "item": "bottle",
    "stage": 2,
    "protocol": PROTOCOL,
    "calibration": {"map_median": 0.0, "map_limit": 1.0},
    "config": {"input_size": SIDE, "crop_size": SIDE, "map_normalisation": "quantile", "padding": False},
}
KINDS = [((8, 4, 2, 8), None, 8), ((3, 7, 5, 2), None, None), ((6, 8, 4, 8), 3, 4)]  # bits, of the autoencoder, of outputs


def write(detector: EfficientAD, folder: Path, output_bits: int | None = 8) -> tuple[Path, str]:
    """The file of a detector and the table of its bytes."""
    content = {**CONTENT, "config": {**CONTENT["config"], "output_bits": output_bits or 0}}
    path = folder / "model.binaryad"
    return path, export_codes(
        detector, describe_efficientad(detector, content, DECISION, preprocessing(SIDE, SIDE)), path, SIDE
    )


def read_codes(stream: bytes, bits: int) -> list[int]:
    """Codes of bits that fill whole bytes and perhaps more, by shifting one large integer."""
    number = int.from_bytes(stream, "little")
    return [number >> bits * index & (1 << bits) - 1 for index in range(8 * len(stream) // bits)]


def test_codes_of_three_bits_by_hand():
    packed = pack_codes(torch.tensor([[1], [2], [7]]), 3)  # 111 010 001, and seven zeros above
    assert packed.tolist() == [0b11010001, 0b1]
    assert unpack_codes(packed, 3, (3, 1)).tolist() == [[1], [2], [7]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_and_are_read_by_shifts(bits):
    codes = torch.randint(0, 2**bits, (5, 3, 7), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    packed = pack_codes(codes, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (math.ceil(105 * bits / 8),))
    assert read_codes(packed.numpy().tobytes(), bits)[:105] == codes.flatten().tolist()
    assert torch.equal(unpack_codes(packed, bits, codes.shape), codes.to(torch.uint8))


@pytest.mark.parametrize("packed", [torch.zeros(3), *(torch.zeros(shape, dtype=torch.uint8) for shape in (2, 4, (1, 3), ()))])
def test_bytes_that_are_no_such_codes(packed):
    with pytest.raises(ValueError, match=r"codes of 4 bits for weights \(5, 1\) are .*, expected torch.uint8 of shape \(3,\)"):
        unpack_codes(packed, 4, (5, 1))


@pytest.mark.parametrize(("bits", "autoencoder_bits", "output_bits"), KINDS)
def test_another_reader_finds_weights_and_bytes(tmp_path, bits, autoencoder_bits, output_bits):
    detector = detector_of(bits, autoencoder_bits, replace(NEAREST, output_bits=output_bits))
    path, table = write(detector, tmp_path, output_bits)
    arrays, entry = plain_read(path.read_bytes())
    assert entry["bits"] == {"teacher": [*bits], "student": [*bits], "autoencoder": [autoencoder_bits or 32] * 14}
    assert not any(name.startswith("encoder.") for name in arrays)
    for prefix, network in (("quantized_teacher", "teacher"), ("student", "student"), ("autoencoder", "autoencoder")):
        children = getattr(detector, network).named_children()
        for (name, layer), layer_bits in zip(children, entry["bits"][network], strict=True):
            own = {key.removeprefix(f"{prefix}.{name}."): value for key, value in arrays.items()}
            np.testing.assert_array_equal(own["bias"], layer.bias.detach().numpy())
            if layer_bits == 32:
                np.testing.assert_array_equal(own["weight"], layer.weight.detach().numpy())
                continue
            codes = read_codes(own["weight_codes"].tobytes(), layer_bits)[: layer.weight.numel()]
            steps = np.exp(own["weight_quantizer.log_step"].astype(np.float64))
            zero_points = own["weight_quantizer.zero_point"].astype(np.int64)
            found = (np.reshape(codes, (len(steps), -1)) - zero_points[:, None]) * steps[:, None]
            expected = layer.quantized_weight().detach().flatten(1).numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
            assert len(np.unique(expected[0])) > 2
            assert ("output_quantizer.log_step" in own) == (layer.output_quantizer is not None)
    size = detector_size(*map(layer_sizes, (detector.teacher, detector.student, detector.autoencoder)))
    statistics = 2 * 48 + 4  # the teacher's means and deviations, the quantiles of two maps
    assert sum(value.nbytes for value in arrays.values()) == size.packed_bytes + 4 * statistics
    expected = [("numbers, packed", size.packed_bytes), ("whole file, compressed", path.stat().st_size)]
    for line, (name, size_) in zip(table.splitlines()[1:], expected, strict=True):
        floats = size.float32_bytes
        assert line.split() == [*name.split(), f"{size_:,}", f"{floats:,}", f"{floats / size_:.2f}x"]


@pytest.mark.parametrize(("bits", "autoencoder_bits", "output_bits"), KINDS)
def test_loaded_back_it_gives_the_very_maps(tmp_path, bits, autoencoder_bits, output_bits):
    detector, images = detector_of(bits, autoencoder_bits, replace(NEAREST, output_bits=output_bits)), images_of(3, seed=5)
    loaded, description = load_packed(write(detector, tmp_path, output_bits)[0])
    expected = detector.anomaly_map(images)
    assert torch.equal(loaded.anomaly_map(images), expected)
    assert expected.std() > 0
    assert (description["host"], loaded.encoder.weights_sha256) == ("RAAD", detector.encoder.weights_sha256)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert sum(value.numel() for value in loaded.encoder.parameters()) == 0
    assert [layer.bits for layer in quantized_layers(loaded)] == [layer.bits for layer in quantized_layers(detector)]
    again = write(loaded, tmp_path, output_bits)[0]
    assert torch.equal(load_packed(again)[0].anomaly_map(images), expected)


@pytest.mark.parametrize("tensor", ["student.conv2.weight_codes", "student.conv3.bias", "quantized_teacher.conv1.weight_codes"])
def test_a_file_that_gives_other_maps_is_not_written(tmp_path, monkeypatch, tensor):
    def changed_tensors(detector):
        tensors = stored_tensors(detector)
        return {**tensors, tensor: tensors[tensor].roll(1)}

    monkeypatch.setattr(raad_export, "stored_tensors", changed_tensors)
    with pytest.raises(NumericError, match=r"the packed model is not the trained model: .*model.binaryad' was not written"):
        write(detector_of(), tmp_path)
    assert list(tmp_path.iterdir()) == []


CODES = "student.conv2.weight_codes"


def rename(name: str) -> Callable[[dict, dict], None]:
    """To a name that nothing has."""

    def change(header, entry):
        for tensors in (header, entry["compressed"]):
            if name in tensors:
                tensors[f"{name}s"] = tensors.pop(name)

    return change


def retype(name: str, plain: str, compressed: str) -> Callable[[dict, dict], None]:
    def change(header, entry):
        if name in entry["compressed"]:
            entry["compressed"][name]["dtype"] = compressed
        else:
            header[name]["dtype"] = plain

    return change


def reshape(name: str, shape: list[int]) -> Callable[[dict, dict], None]:
    def change(header, entry):
        entry["compressed"].get(name, header[name])["shape"] = shape

    return change


def bits_at(layer: int, value: object, network: str = "student") -> Callable[[dict, dict], None]:
    def change(header, entry):
        entry["bits"][network][layer] = value

    return change


def put(path: str, value: object) -> Callable[[dict, dict], None]:
    def change(header, entry):
        *parents, key = path.split("/")
        for parent in parents:
            entry = entry[parent]
        entry[key] = value

    return change


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    return write(detector_of(), tmp_path_factory.mktemp("file"))[0].read_bytes()


def test_rewriting_alone_changes_nothing(file):
    assert rewritten(file, lambda header, entry: None) == file


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (rename(CODES), rf"'{CODES}'"),
        (rename("student.conv2.weight_quantizer.log_step"), r"'student.conv2.weight_quantizer.log_step'"),
        (rename("student.conv2.output_quantizer.zero_point"), r"'student.conv2.output_quantizer.zero_point', .* are missing"),
        (rename("student.conv2.bias"), r"tensors \['student.conv2.bias', 'student.conv2.biass'\] are missing or surplus"),
        (rename("teacher_mean"), r"tensors \['teacher_mean', 'teacher_means'\] are missing or surplus"),
        (retype(CODES, "I8", "int8"), r"are torch.int8 of shape \(4096,\), expected torch.uint8 of shape \(4096,\)"),
        (reshape(CODES, [64, 64]), r"of shape \(64, 64\), expected torch.uint8 of shape \(4096,\)"),
        (
            retype("student.conv2.weight_quantizer.zero_point", "I8", "int8"),
            r"zero_point has type torch.int8, expected torch.uint8",
        ),
        (reshape("student.conv2.weight_quantizer.zero_point", [4, 8]), r"zero_point has shape \(4, 8\), expected \(32,\)"),
        (reshape("student.conv2.bias", [4, 8]), r"student.conv2.bias has shape \(4, 8\), expected \(32,\)"),
        (bits_at(1, 3), r"codes of 3 bits for weights \(32, 16, 4, 4\) .* expected torch.uint8 of shape \(3072,\)"),
        (bits_at(1, 1), r"bits.student\[1\] should be 2 or .* or 8 or 32, found 1"),
        (bits_at(1, 9), r"bits.student\[1\] should be 2 or .* or 8 or 32, found 9"),
        (bits_at(1, 32), r"a quantizer of 32 bits; 2 to 8 are possible"),
        (bits_at(1, "4"), r""),
        (bits_at(1, 4.0), r""),
        (bits_at(1, None), r""),
        (put("bits/student", [8, 4, 2]), r""),
        (put("bits/student", [32] * 4), r"are missing or surplus"),
        (put("bits/autoencoder", [8] * 14), r"'autoencoder.encoder1.weight_codes'"),
        (put("bits", {"student": [8, 4, 2, 8]}), r"'bits.teacher', 'bits.autoencoder' are missing"),
        (put("bits", None), r""),
        (put("encoder/name", "pdn_huge"), r"'pdn_huge'"),
        (put("encoder/name", "pdn_small"), r"codes of 8 bits for weights \(128, 3, 4, 4\)"),
        (put("encoder", None), r""),
        (put("config/output_bits", 0), r"are missing or surplus"),
        (put("config/output_bits", 9), r"config.output_bits should be what --output_bits takes, found 9"),
        (put("config/crop_size", 8), r"config.crop_size should be 64 as in preprocessing, found 8"),
        (put("config/crop_size", "64"), r""),
        (put("config", {}), r"'config.input_size', 'config.crop_size', 'config.output_bits' and 2 more are missing"),
        (put("host", "INP-Former"), r"'precision' is missing"),
        (put("host", "EfficientAD"), r"host should be 'INP-Former' or .*, found 'EfficientAD'"),
        (put("host", ["RAAD"]), r""),
    ],
)
def test_file_of_a_model_that_nobody_can_build(file, tmp_path, change, expected):
    path = tmp_path / "model.binaryad"
    path.write_bytes(rewritten(file, change))
    with pytest.raises(UserError, match=rf"model unusable: .*model.binaryad.*({expected}).*export it again") as refused:
        load_packed(path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("position", "sentence"), [(-1, "does not match its own sha256"), (None, "it was cut short")])
def test_a_damaged_file_is_refused_by_the_command(file, tmp_path, capsys, position, sentence):
    path = tmp_path / "model.binaryad"
    path.write_bytes(file[:-9] if position is None else file[:position] + bytes([file[position] ^ 1]))
    assert predict.main(["--model", str(path), "--input", str(make_mvtec(tmp_path / "data")), "--output", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return train_stages(tmp_path_factory.mktemp("raad"), "--total_iters 6 --finetune_iters 4 --rounding nearest")


def exported(checkpoint: Path, output: Path, *flags: str) -> int:
    return export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--encoder_weights", "random", *flags])


@pytest.mark.parametrize("suffix", ["-Quantized", ""])
def test_the_command_line_from_a_checkpoint_to_verdicts(runs, tmp_path, capsys, suffix):
    checkpoint, file, output = checkpoint_of(runs, suffix), tmp_path / "model.binaryad", tmp_path / "out"
    assert exported(checkpoint, file) == 0
    printed, log = capsys.readouterr()
    assert printed == f"written: {file} ({file.stat().st_size:,} bytes)\n"
    assert "the very maps of the trained model on images of noise" in log
    photos = runs / "data" / "bottle" / "test"
    assert predict.main(["--model", str(file), "--input", str(photos), "--output", str(output), "--maps", "npy"]) == 0
    detector, content = load_detector(checkpoint, "random")
    reference = Predictor(detector, load_packed(file)[1], "cpu")
    assert reference.threshold == pytest.approx(np.quantile(content["calibration"]["scores"], 0.99), rel=1e-12)
    with open(output / "predictions.csv") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 6
    for row in rows:
        expected = reference(row["path"])
        assert (float(row["score"]), row["verdict"]) == (pytest.approx(expected.score, abs=6e-7), expected.verdict)
        relative = Path(row["path"]).relative_to(photos)
        np.testing.assert_array_equal(np.load(output / "maps" / f"{relative}.npy"), expected.map)
    capsys.readouterr()
    assert evaluate.main(["--model", str(file), "--dataset", "Folder", "--data_path", str(runs / "data"), "--quiet"]) == 0
    with open(checkpoint.parent.parent / "results.csv") as stream:
        trained = next(csv.DictReader(stream))
    assert f"  {100 * float(trained['P-AUROC']):.2f}  " in capsys.readouterr().out


def test_the_benchmark_of_binary_networks_refuses_it(file, tmp_path, capsys):
    path = tmp_path / "model.binaryad"
    path.write_bytes(file)
    assert benchmark.main(["--model", str(path)]) == 2
    assert "is a model of RAAD, whose parts have no such tables" in capsys.readouterr().err


def test_a_graph_for_other_runtimes_is_called_that(tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"8" * 100)
    photos = make_mvtec(tmp_path / "data")
    assert predict.main(["--model", str(path), "--input", str(photos), "--output", str(tmp_path / "out")]) == 2
    assert "model.onnx' is for other runtimes; `python -m scripts.export` makes one" in capsys.readouterr().err


def test_reports_name_the_stages_and_time_them(runs, tmp_path):
    folders = [checkpoint_of(runs, suffix).parent.parent for suffix in ("-Baseline", "-Quantized", "")]
    for folder, stage in zip(folders, ("baseline", "quantize", "finetune"), strict=True):
        assert f"RAAD · stage {stage} · pdn_tiny" in (folder / "report.html").read_text()
    page = tmp_path / "page.html"
    assert report.main([*map(str, folders), "--measure", "--repeats", "1", "--html", str(page)]) == 0
    timings = [json.loads((folder / "timing.json").read_text()) for folder in folders]
    simulated = "torch, quantization simulated (scripts.benchmark_raad)"
    assert [timing["engine"] for timing in timings] == ["torch float32", simulated, simulated]
    assert all(timing["milliseconds"] > 0 for timing in timings)
    assert "effective parameters" in page.read_text()
    (folders[1] / "bottle" / "quantization.json").rename(tmp_path / "record")
    assert report.main([*map(str, folders), "--html", str(page)]) == 0
    assert "effective parameters" not in page.read_text()
    (tmp_path / "record").rename(folders[1] / "bottle" / "quantization.json")


def test_a_float_model_has_no_such_file(runs, tmp_path, capsys):
    assert exported(checkpoint_of(runs, "-Baseline"), tmp_path / "model.binaryad") == 2
    assert "nothing to pack" in (error := capsys.readouterr().err)
    assert "is a float model of RAAD; export that of --stage quantize or finetune" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [("--encoder_precision", "int8"), ("--trained_precision", "fp32"), ("--encoder_reference",)])
def test_there_is_no_choice_of_precision(runs, tmp_path, capsys, flags):
    assert exported(checkpoint_of(runs, ""), tmp_path / "model.binaryad", *flags) == 2
    assert "is quantized to the bits of its training" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({}, "held-out training images"),
        ({"holdout": 0.0}, "training images"),
        ({"dataset": "MVTec-LOCO"}, "held-out normal images"),
        ({"dataset": "MVTec-AD+MVTec-LOCO"}, "held-out normal images"),
        ({"dataset": "MVTec-LOCO", "holdout": 0.0}, "training images"),
    ],
)
def test_the_threshold_says_which_images_it_comes_from(runs, tmp_path, changes, images):
    content = load_checkpoint(checkpoint_of(runs, ""))
    save_checkpoint(tmp_path / "model.pth", {**content, "config": {**content["config"], **changes}})
    assert exported(tmp_path / "model.pth", tmp_path / "model.binaryad", "--quiet") == 0
    source = load_packed(tmp_path / "model.binaryad")[1]["decision"]["source"]
    assert source == f"quantile 0.99 of 2 scores of {images}, stored by the training"


def test_a_threshold_of_normal_images_is_a_number_in_the_file(runs, tmp_path, capsys):
    content, checkpoint, file = load_checkpoint(checkpoint_of(runs, "")), tmp_path / "model.pth", tmp_path / "model.binaryad"
    content["protocol"] = {**content["protocol"], "true_false": "val_quantile"}
    save_checkpoint(checkpoint, content)
    assert exported(checkpoint, file) == 0
    assert load_packed(file)[1]["protocol"]["true_false"] == f"fixed:{content['calibration']['map_threshold']}"
    assert evaluate.main(["--model", str(file), "--dataset", "Folder", "--data_path", str(runs / "data"), "--quiet"]) == 0
