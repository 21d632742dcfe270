"""ONNX files against the torch detectors they were made from, run by ONNX Runtime itself."""

import copy
import json
import sys

import numpy as np
import pytest
import torch

from binarize.linear import BinarizationOptions, BinaryLinear
from binarize.stages import binarize, binary_layers, calibrate, scale_parameters
from common.errors import NumericError, UserError
from utils import onnx_export
from utils.onnx_export import export_onnx

SIDE = 56
NEEDED = "ONNX export needs requirements-onnx.txt"
CASES = [(0, 1, "mixed"), (1, 1, "mixed"), (2, 1, "mixed"), (2, 1, "binary"), (2, 1, "off"), (2, 32, "mixed")]


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx", reason=NEEDED)


@pytest.fixture
def onnxruntime():
    return pytest.importorskip("onnxruntime", reason=NEEDED)


@pytest.fixture
def at_stage(tiny_detector):
    """Bring the tiny detector to a stage: every trained tensor is moved from its first value, the scales after calibration."""

    def build(stage: int, activation_bits: int = 1, sab: str = "mixed"):
        generator = torch.Generator().manual_seed(1)
        binarize(tiny_detector, stage, BinarizationOptions(activation_bits, sab))
        with torch.no_grad():
            for parameter in tiny_detector.trainable_parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        calibrate(tiny_detector, torch.randn(4, 3, SIDE, SIDE, generator=generator))
        with torch.no_grad():
            for parameter in scale_parameters(tiny_detector):
                parameter += 0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
        return tiny_detector.eval()

    return build


def images_without_ties(detector, count: int) -> torch.Tensor:
    """Random images (count, 3, 56, 56) on which no activation comes so near to its threshold that rounding could decide."""
    margins = []

    def note_margin(layer, inputs):
        margins.append(((inputs[0] - layer.threshold) / layer.log_activation_scale.exp()).abs().min().item())

    one_bit_layers = [layer for layer in binary_layers(detector) if layer.options.activation_bits == 1]
    hooks = [layer.register_forward_pre_hook(note_margin) for layer in one_bit_layers]
    generator, images = torch.Generator().manual_seed(2), []
    while len(images) < count:
        margins.clear()
        image = torch.randn(1, 3, SIDE, SIDE, generator=generator)
        detector.anomaly_map(image)
        if min(margins, default=1) > 5e-6:
            images.append(image)
    for hook in hooks:
        hook.remove()
    return torch.cat(images)


@pytest.mark.parametrize(("stage", "activation_bits", "sab"), CASES)
def test_the_file_computes_the_detectors_map_for_every_batch_size(at_stage, onnxruntime, tmp_path, stage, activation_bits, sab):
    detector = at_stage(stage, activation_bits, sab)
    returned = export_onnx(detector, {}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (image,), (anomaly_map,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == ("image", "tensor(float)", ["batch", 3, SIDE, SIDE])
    assert (anomaly_map.name, anomaly_map.type, anomaly_map.shape) == ("anomaly_map", "tensor(float)", ["batch", SIDE, SIDE])
    images = images_without_ties(detector, 8)
    for batch in (images[:1], images[1:3], images[3:]):
        (found,) = session.run(["anomaly_map"], {"image": batch.numpy()})
        expected = detector.anomaly_map(batch).numpy()
        assert expected.std() > 0.01
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert 0 < returned < 1e-4


def test_metadata_is_one_json_string(at_stage, onnxruntime, tmp_path):
    metadata = {"stage": 1, "config": {"item": "Flasche \u00fc", "crop_size": 56}, "scores": [0.25, 0.5]}
    export_onnx(at_stage(1), metadata, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["binaryad"]) == metadata


@pytest.mark.parametrize(("stage", "activation_bits", "layers"), [(1, 32, 24), (2, 1, 40)])
def test_weights_are_signs_and_nothing_computes_them(at_stage, onnx, onnxruntime, tmp_path, stage, activation_bits, layers):
    detector = at_stage(stage, activation_bits)
    export_onnx(detector, {}, tmp_path / "model.onnx")
    graph = onnx.load(tmp_path / "model.onnx").graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    latent = [layer.weight.detach().double().numpy() for layer in binary_layers(detector)]
    assert len(latent) == layers
    for weight in latent:
        signs = np.where(weight - weight.mean(axis=1, keepdims=True) >= 0, 1, -1)
        (name,) = (name for name, value in constants.items() if np.array_equal(value, signs.T))
        assert {node.op_type for node in graph.node if name in node.input} == {"MatMul"}
        for form in (weight, weight.T):
            assert not any(value.shape == form.shape and np.allclose(value, form, atol=1e-3) for value in constants.values())
    in_both_signs = sum(np.array_equal(np.unique(value), [-1, 1]) for value in constants.values() if value.ndim == 2)
    assert in_both_signs == layers


def test_a_value_on_its_threshold_is_plus_one_in_the_file_too(at_stage, onnxruntime, tmp_path):
    detector = at_stage(1)
    with torch.no_grad():
        for block in detector.decoder:
            for tensor in (block.norm1.weight, block.norm1.bias, block.attn.q.threshold, block.attn.kv.threshold):
                tensor.zero_()
    export_onnx(detector, {}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    image = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    (found,) = session.run(["anomaly_map"], {"image": image.numpy()})
    np.testing.assert_allclose(found, detector.anomaly_map(image).numpy(), rtol=0, atol=1e-4)


def test_the_detector_stays_as_it_was(at_stage, onnxruntime, tmp_path):
    detector = at_stage(2).train()
    before = copy.deepcopy(detector.state_dict())
    export_onnx(detector, {}, tmp_path / "model.onnx")
    assert detector.training
    assert sum(isinstance(module, BinaryLinear) for module in detector.modules()) == 40
    assert before.keys() == detector.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


def test_the_exporter_is_silent(at_stage, onnxruntime, tmp_path, recwarn, capfd):
    export_onnx(at_stage(2), {}, tmp_path / "model.onnx")
    assert [str(warning.message) for warning in recwarn] == []
    assert tuple(capfd.readouterr()) == ("", "")


def without_bias(layer, inputs):
    return torch.where(inputs - layer.threshold >= 0, 1.0, -1.0) @ layer.signs * layer.scale


def always_the_first_image(map_pass, images):
    return map_pass.detector.anomaly_map(images[:1]).expand(images.shape[0], -1, -1)


@pytest.mark.parametrize(
    ("owner", "wrong_forward"), [("_ConstantSignLinear", without_bias), ("_MapPass", always_the_first_image)]
)
def test_a_wrong_graph_is_not_written(at_stage, onnxruntime, tmp_path, monkeypatch, owner, wrong_forward):
    monkeypatch.setattr(getattr(onnx_export, owner), "forward", wrong_forward)
    with pytest.raises(NumericError, match=r"the ONNX model is not the torch model: maps differ by .+ was not written"):
        export_onnx(at_stage(2), {}, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_map_that_is_no_number_leaves_the_earlier_file(at_stage, onnxruntime, tmp_path):
    detector, output = at_stage(2), tmp_path / "model.onnx"
    output.write_bytes(b"an earlier file")
    with torch.no_grad():
        detector.decoder[-1].attn.proj.bias.fill_(torch.nan)
    with pytest.raises(NumericError, match="maps differ by nan"):
        export_onnx(detector, {}, output)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"an earlier file"]


@pytest.mark.parametrize(("disturbed_runs", "passes"), [(1, True), (1000, False)])
def test_an_image_with_a_flipped_bit_is_replaced_but_not_forever(
    at_stage, onnxruntime, tmp_path, monkeypatch, disturbed_runs, passes
):
    class DisturbedSession(onnxruntime.InferenceSession):
        runs = 0

        def run(self, *arguments):
            (maps,) = super().run(*arguments)
            self.runs += 1
            if self.runs <= disturbed_runs:
                maps[-1, :14, :14] += 5e-3
            return [maps]

    detector = at_stage(2)
    monkeypatch.setattr(onnxruntime, "InferenceSession", DisturbedSession)
    if passes:
        assert export_onnx(detector, {}, tmp_path / "model.onnx") < 1e-4
    else:
        with pytest.raises(NumericError, match=r"maps differ by 5\.0e-03"):
            export_onnx(detector, {}, tmp_path / "model.onnx")


def test_a_model_too_large_for_one_file_is_refused(at_stage, onnxruntime, onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "_LARGEST_TENSORS", 100_000)
    with pytest.raises(UserError, match="too large for one ONNX file"):
        export_onnx(at_stage(2), {}, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_missing_packages_are_named(tiny_detector, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        export_onnx(tiny_detector, {}, tmp_path / "model.onnx")
    assert str(caught.value) == ("ONNX export needs the packages onnx and onnxruntime: pip install -r requirements-onnx.txt")
    assert list(tmp_path.iterdir()) == []
