"""RAAD as a graph of integers, run by ONNX Runtime, against the trained model and against sums of integers in float64."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import NumericError
from models.efficientad import EfficientAD, EfficientADOptions
from models.patch_description import PatchConvolution
from models.teacher import build_teacher
from quantize.layers import QuantizationOptions, QuantizedConvolution, calibrate, quantized_layers
from quantize.onnx_graph import IntegerConvolution, byte_codes, use_integers
from quantize.quantizers import UniformQuantizer
from scripts import benchmark_raad, export
from tests.raad_models import NEAREST, SIDE, checkpoint_of, detector_of, images_of, train_stages
from utils import raad_export
from utils.detectors import load_detector
from utils.onnx_export import session_options, traced
from utils.packed_model import load_packed
from utils.raad_export import export_integers, operators_run

onnx = pytest.importorskip("onnx", reason="ONNX export needs requirements-onnx.txt")
onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export needs requirements-onnx.txt")

SMALL_SIDE = 12
WAYS = ("torch, simulated", "ONNX Runtime, integers")
RANDOM = ("--encoder_weights", "random")
QUICK = QuantizationOptions(range_init="minmax", round="nearest")


def inputs_of_a_layer() -> torch.Tensor:
    return torch.randn(4, 3, SMALL_SIDE, SMALL_SIDE, generator=torch.Generator().manual_seed(0))


def layer_of(bits: int, rectified: bool, stride: int = 1, padding: int = 0) -> QuantizedConvolution:
    torch.manual_seed(bits)
    convolution = PatchConvolution(3, 7, 4, stride, padding, rectified=rectified)
    layer = QuantizedConvolution.from_convolution(convolution, bits, NEAREST)
    calibrate(nn.Sequential(layer), inputs_of_a_layer(), NEAREST)
    return layer.eval()


def run(content: bytes | str, images: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(content, session_options(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]


class OneLayer(nn.Module):
    """An integer layer in the form that the exporter takes."""

    def __init__(self, layer: QuantizedConvolution):
        super().__init__()
        self.layer = IntegerConvolution(layer)

    def anomaly_map(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images)


def run_layer(layer: QuantizedConvolution) -> np.ndarray:
    return run(traced(OneLayer(layer), SMALL_SIDE), inputs_of_a_layer())


def integers_of(quantizer: UniformQuantizer, values: torch.Tensor) -> torch.Tensor:
    """q - Z by the definition of the grid, float64."""
    step, zero_point = (value.double() for value in quantizer.grid(values.ndim))
    return (values.double() / step).round().clamp(-zero_point, quantizer.top - zero_point)


def sums_of_integers(layer: QuantizedConvolution, inputs: torch.Tensor) -> torch.Tensor:
    """What a quantized layer is meant to give before its ReLU, float64: exact, as all sums are below 2^53."""
    codes, weight = integers_of(layer.input_quantizer, inputs), integers_of(layer.weight_quantizer, layer.weight)
    steps = layer.input_quantizer.step.double() * layer.weight_quantizer.step.double()
    sums = F.conv2d(codes, weight, None, layer.stride, layer.padding)
    return sums * steps[:, None, None] + layer.bias.double()[:, None, None]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_a_last_layer_gives_its_sums_unrounded(bits, stride, padding):
    layer = layer_of(bits, False, stride, padding)
    expected = sums_of_integers(layer, inputs_of_a_layer()).detach().numpy()
    np.testing.assert_allclose(run_layer(layer), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_a_rectified_layer_gives_the_codes_of_its_sums(bits, stride, padding):
    layer = layer_of(bits, True, stride, padding)
    quantizer = layer.output_quantizer
    expected = integers_of(quantizer, sums_of_integers(layer, inputs_of_a_layer()).relu()).detach().numpy()
    found = run_layer(layer) / quantizer.step.item()
    np.testing.assert_allclose(found, found.round(), rtol=0, atol=1e-3)
    assert len(np.unique(expected)) > 50
    assert np.abs(found - expected).max() < 1.5
    bias_units = layer.input_quantizer.step * byte_codes(layer, torch.zeros(7))[1]
    largest_share = 0.5 * float(bias_units.max() / quantizer.step)  # of codes that rounded biases, half a unit off, can change
    assert (np.abs(found - expected) > 0.5).mean() < largest_share + 0.002


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_of_a_byte_are_the_very_weights(bits):
    layer = layer_of(bits, True)
    codes, step = byte_codes(layer, torch.zeros(7))
    assert torch.equal(codes * step[:, None, None, None], layer.quantized_weight())
    largest = 63 if bits <= 6 else 127  # sums of two products with a byte stay within 16 bits up to 64
    assert -largest - (bits == 8) <= codes.min() < -30
    assert largest / 2.1 < codes.max() <= largest


def test_a_bias_beside_vanishing_weights_stays():
    layer = layer_of(8, True)
    with torch.no_grad():
        layer.weight[2] = 0
        layer.weight_quantizer.fit(layer.weight)
        layer.bias[2] = 5.0  # beyond int32 in units of the steps
        layer.output_quantizer.fit(torch.tensor([0.0, 6.0]))
    found = run_layer(layer)
    np.testing.assert_allclose(found[:, 2], 5.0, rtol=0, atol=0.6 * layer.output_quantizer.step.item())


@pytest.mark.parametrize(
    ("bits", "autoencoder_bits", "fused", "summed", "floats"),
    [((8, 4, 2, 8), None, 6, 2, 14), ((3, 8, 5, 2), None, 6, 2, 14), ((8, 8, 8, 8), 4, 18, 4, 0)],
)
def test_the_graph_of_a_detector_runs_on_integers_and_gives_its_maps(tmp_path, bits, autoencoder_bits, fused, summed, floats):
    detector, output = detector_of(bits, autoencoder_bits, QUICK), tmp_path / "model.onnx"
    report = export_integers(detector, {"item": "bottle"}, output, SIDE)
    operators = operators_run(output.read_bytes())
    assert (operators["QLinearConv"], operators["MatMulInteger"], operators["Conv"] + operators["FusedConv"]) == (
        fused,
        summed,
        floats,
    )
    assert (report.fused, report.quantized, report.file_bytes) == (fused + summed, fused + summed, output.stat().st_size)
    images = images_of(3, seed=5)
    expected = detector.anomaly_map(images).numpy()
    assert np.sqrt(np.square(run(str(output), images) - expected).mean()) < report.step
    assert report.difference < report.step < expected.std()
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["binaryad"]) == {"item": "bottle"}


def lose_a_bias(layer: IntegerConvolution) -> None:
    layer.bias.zero_()


def move_the_zero_of_weights(layer: IntegerConvolution) -> None:
    layer.weight_zero.add_(1)


@pytest.mark.parametrize(
    ("change", "convolution"),
    [(lose_a_bias, "conv1"), (lose_a_bias, "conv4"), (move_the_zero_of_weights, "conv2")],
)
def test_a_wrong_graph_is_not_written(tmp_path, monkeypatch, change, convolution):
    def use_wrong_integers(detector):
        use_integers(detector)
        change(getattr(detector.student, convolution))

    monkeypatch.setattr(raad_export, "use_integers", use_wrong_integers)
    with pytest.raises(NumericError, match=r"the integer graph is not the trained model: .* was not written"):
        export_integers(detector_of((8, 8, 3, 8)), {}, tmp_path / "model.onnx", SIDE)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    flags = "--recon_iters 4 --recon_activation_iters 2 --recon_batch_size 4 --range_init minmax"
    return train_stages(tmp_path_factory.mktemp("raad"), f"--total_iters 6 --finetune_iters 4 {flags}")


@pytest.mark.parametrize(("suffix", "layers"), [("-Baseline", 0), ("-Quantized", 8), ("", 8)])
def test_the_command_writes_a_model_of_every_stage(runs, tmp_path, suffix, layers):
    checkpoint, output = checkpoint_of(runs, suffix), tmp_path / "model.onnx"
    assert export.main(["--checkpoint", str(checkpoint), "--output", str(output), *RANDOM, "--quiet"]) == 0
    detector, content = load_detector(checkpoint, "random")
    assert len(quantized_layers(detector)) == layers
    images = images_of(2, seed=7)
    expected, found = detector.anomaly_map(images).numpy(), run(str(output), images)
    assert np.sqrt(np.square(found - expected).mean()) < (0.1 if layers else 1e-4) * expected.std()
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    description = json.loads(session.get_modelmeta().custom_metadata_map["binaryad"])
    assert (description["host"], description["stage"], description["item"]) == ("RAAD", content["stage"], content["item"])
    assert description["decision"]["threshold"] > 0
    assert (description["bits"]["student"] == [32] * 4) == (layers == 0)


def test_a_detector_that_pads_goes_all_the_way(tmp_path):
    flags = "--recon_iters 3 --recon_activation_iters 2 --recon_batch_size 2 --recon_crops 4"
    train_stages(tmp_path, f"--padding --total_iters 3 --finetune_iters 2 {flags}")
    checkpoint = checkpoint_of(tmp_path, "")
    detector, _ = load_detector(checkpoint, None)
    assert {layer.padding for layer in quantized_layers(detector.student)} == {(3, 3), (1, 1), (0, 0)}
    assert detector.teacher_maps(images_of(1)).shape[-1] == SIDE // 4
    packed, graph = tmp_path / "model.binaryad", tmp_path / "model.onnx"
    for output in (packed, graph):  # each is compared with torch before it is written
        assert export.main(["--checkpoint", str(checkpoint), "--output", str(output), "--quiet"]) == 0
    assert load_packed(packed)[1]["config"]["padding"] is True
    operators = operators_run(graph.read_bytes())
    assert operators["QLinearConv"] + operators["MatMulInteger"] == 8


def test_the_benchmark_measures_every_way_to_run_it(capsys):
    assert benchmark_raad.main(["--encoder", "pdn_tiny", "--image_size", "64", "--bits", "3", "--repeats", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:42].strip(): line[42:].split() for line in lines[-6:]}
    assert list(rows) == [
        "torch float32",
        "ONNX Runtime float32",
        *(f"{way}, {autoencoder} autoencoder" for autoencoder in ("float", "8-bit") for way in WAYS),
    ]
    reference = float(rows["torch float32"][1])
    for _, per_second, ratio, _ in rows.values():
        assert float(ratio.removesuffix("x")) == pytest.approx(float(per_second) / reference, rel=0.02, abs=0.01)
    sizes = {name: int(row[3].replace(",", "")) for name, row in rows.items()}
    parameters = sum(value.numel() for network in float_networks() for value in network.parameters())
    assert sizes["torch float32"] == sizes["ONNX Runtime float32"] == 4 * parameters
    for way, autoencoder in itertools.product(WAYS, ("float", "8-bit")):
        assert sizes[f"{way}, {autoencoder} autoencoder"] < sizes["torch float32"]
    inner = 2 * (16 * 16 * 32 + 9 * 32 * 32)  # weights of the layers between the ends, at a byte or at 3 bits
    assert sizes[f"{WAYS[1]}, float autoencoder"] - sizes[f"{WAYS[0]}, float autoencoder"] == inner * 5 // 8


def float_networks() -> list[nn.Module]:
    detector = EfficientAD(build_teacher("tiny", "random"), EfficientADOptions(), SIDE)
    return [detector.teacher, detector.student, detector.autoencoder]
