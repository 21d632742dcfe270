"""RAAD's files: an ONNX graph of integers, or codes packed to their bits; what is said of them, and their proofs.

Both are compared with the trained model, which computes with floats, before they are written.
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from binarize.packed import from_bytes, to_bytes
from common.errors import NumericError
from models.efficientad import EfficientAD
from quantize.accounting import DetectorSize, layer_sizes, size_of
from quantize.layers import quantized_layers
from quantize.onnx_graph import means_as_convolutions, use_integers
from quantize.quantizers import UniformQuantizer
from utils.checkpoint import atomic_write
from utils.host import Config
from utils.hosts import HOSTS
from utils.onnx_export import check_packages, maps_of, session_options, traced, with_metadata, write_graph
from utils.packed_model import restore_packed
from utils.raad_packed import networks_of, stored_tensors
from utils.tables import format_rows

INTEGER_CONVOLUTIONS = ("QLinearConv", "MatMulInteger")
_CHECKED_BATCH_SIZES = (1, 2)
_SHARE_OFF = 0.01
_NETWORK_KEYS = ("input_size", "crop_size", "output_bits")


@dataclass(frozen=True)
class IntegerGraph:
    """What was written and what was found out about it.

    Attributes:
        difference: root mean square of those between maps of ONNX Runtime and torch on noise.
        step: the same of what happens to maps if one in a hundred activations is one step off; `difference` is below it.
        quantized: convolutions of the detector that are.
        fused: those of them that ONNX Runtime runs on integers here.
        file_bytes: of the whole graph.
    """

    difference: float
    step: float
    quantized: int
    fused: int
    file_bytes: int
    size: DetectorSize

    def describe(self) -> str:
        """Two lines."""
        return (
            f"ONNX Runtime runs {self.fused} of {self.quantized} quantized convolutions on integers; its maps of noise lie "
            f"within {self.difference:.1e} of torch's (root mean square), below the {self.step:.1e} of 1 % of activations that "
            "are one step off\n"
            f"numbers of the model: {self.size.float32_bytes:,} bytes as float32, {self.size.int8_bytes:,} with a byte per "
            f"code, {self.size.packed_bytes:,} with codes packed to their bits; this graph: {self.file_bytes:,} bytes"
        )


def describe_efficientad(detector: EfficientAD, content: Config, threshold: dict, transform: dict) -> dict:
    """As `utils.packed_model.describe`, of a model that has no binary layers; adds the bits of all layers, 32 for float."""
    encoder, config = detector.encoder, content["config"]
    return {
        **{key: content[key] for key in ("host", "item", "stage")},
        "encoder": {"name": encoder.name, "source": encoder.source, "sha256": encoder.weights_sha256},
        "config": {key: config[key] for key in (*_NETWORK_KEYS, *HOSTS[content["host"]].network_flags)},
        "bits": {name: [layer.bits for layer in layer_sizes(network)] for name, network in networks_of(detector).items()},
        "preprocessing": transform,
        "protocol": content["protocol"],
        "calibration": {key: content["calibration"][key] for key in ("map_median", "map_limit")},
        "decision": threshold,
    }


def export_integers(detector: EfficientAD, metadata: dict, output: Path, side: int) -> IntegerGraph:
    """Write a quantized detector as `utils.onnx_export.export_onnx` does, its quantized convolutions as integers.

    Raises:
        UserError: onnx or onnxruntime is missing.
        NumericError: ONNX Runtime and torch differ by as much as one step in one of a hundred activations; nothing is written.
        ResourceError: the file cannot be written.
    """
    check_packages()
    detector = copy.deepcopy(detector).cpu().eval()
    content = with_metadata(integer_graph(detector, side), metadata)
    difference, step = _difference_and_step(content, detector, side)
    if not difference < step:  # also where it is not a number
        raise NumericError(
            f"the integer graph is not the trained model: maps differ by {difference:.1e}, allowed is less than {step:.1e}, "
            f"which is 1 % of activations one step off; {str(output)!r} was not written"
        )
    write_graph(output, content)
    operators = operators_run(content)
    return IntegerGraph(
        difference,
        step,
        len(quantized_layers(detector)),
        sum(operators[name] for name in INTEGER_CONVOLUTIONS),
        len(content),
        size_of(detector),
    )


def export_codes(detector: EfficientAD, metadata: dict, output: Path, side: int) -> str:
    """Write the packed file of a quantized detector; returns a table of its bytes.

    Raises:
        NumericError: the file, loaded back, does not give the very maps of the detector on noise; nothing is written.
        ResourceError: the file cannot be written.
    """
    content = to_bytes(stored_tensors(detector), metadata)
    loaded = restore_packed(*from_bytes(content, str(output)), str(output))
    images = torch.randn(max(_CHECKED_BATCH_SIZES), 3, side, side, generator=torch.Generator().manual_seed(0))
    expected, found = detector.anomaly_map(images), loaded.anomaly_map(images)
    if not torch.equal(found, expected):
        difference = (found - expected).abs().max()
        raise NumericError(
            f"the packed model is not the trained model: maps of noise differ by {difference:.1e}, allowed is 0; "
            f"{str(output)!r} was not written"
        )
    atomic_write(output, lambda file: file.write(content))
    size = size_of(detector)
    rows = [("file", "bytes", "float32 bytes", "ratio")]
    for name, bytes_ in (("numbers, packed", size.packed_bytes), ("whole file, compressed", len(content))):
        rows.append((name, f"{bytes_:,}", f"{size.float32_bytes:,}", f"{size.float32_bytes / bytes_:.2f}x"))
    return format_rows(rows)


def integer_graph(detector: EfficientAD, side: int) -> bytes:
    """A quantized detector of images (B, 3, side, side) as a serialised ONNX model of integer convolutions."""
    integers = copy.deepcopy(detector)
    use_integers(integers)
    return means_as_convolutions(traced(integers, side))


def operators_run(content: bytes) -> Counter[str]:
    """How many nodes of each operator ONNX Runtime runs on this CPU, once it has fused what it can; means are left out."""
    import onnx
    import onnxruntime

    options = session_options()
    options.log_severity_level = 3  # it warns that a graph for this CPU is for this CPU
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Counter(node.op_type for node in nodes if not _is_per_channel(node))


def _is_per_channel(node) -> bool:
    """Whether it is what `means_as_convolutions` makes of a mean."""
    return any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)


@torch.no_grad()
def _difference_and_step(content: bytes, detector: EfficientAD, side: int) -> tuple[float, float]:
    """Root mean square of differences of maps of noise between graph and detector, and of what one step changes.

    A sum that lies within rounding of the middle between two codes may become either, and a bias is rounded, too: single
    activations are one step off in every image, and no number of images agrees to the last digit.
    """
    found_by, generator = maps_of(content), torch.Generator().manual_seed(0)
    differences, changes = [], []
    for batch_size in _CHECKED_BATCH_SIZES:
        images = torch.randn(batch_size, 3, side, side, generator=generator)
        expected = detector.anomaly_map(images).numpy()
        with _one_step_off(detector, generator):
            changes.append(detector.anomaly_map(images).numpy() - expected)
        differences.append(found_by(images) - expected)
    return _root_mean_square(differences), _root_mean_square(changes)


def _root_mean_square(maps: list[np.ndarray]) -> float:
    return float(np.sqrt(np.square(np.concatenate(maps), dtype=np.float64).mean()))


@contextmanager
def _one_step_off(detector: EfficientAD, generator: torch.Generator) -> Iterator[None]:
    """One in a hundred inputs of each quantized layer lies one step off, up or down."""

    def move(quantizer: UniformQuantizer, arguments: tuple, values: Tensor) -> Tensor:
        draws = torch.rand(values.shape, generator=generator)
        signs = (draws < _SHARE_OFF / 2).float() - (draws > 1 - _SHARE_OFF / 2).float()
        return values + signs * quantizer.step

    hooks = [layer.input_quantizer.register_forward_hook(move) for layer in quantized_layers(detector)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
