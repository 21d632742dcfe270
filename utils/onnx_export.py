"""Export a detector to ONNX, from normalised images to anomaly maps, and compare it with torch before it is written."""

import contextlib
import copy
import hashlib
import importlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from binarize.linear import BinaryLinear
from common.errors import NumericError, UserError
from models.detector import Detector
from utils.checkpoint import atomic_write, write_text

METADATA_KEY = "binaryad"
TOLERANCE = 1e-4
_INPUT, _OUTPUT = "image", "anomaly_map"
_OPSET = 17  # the first with LayerNormalization
_LARGEST_TENSORS = 2**31 - 2**24  # protobuf holds 2 GiB; 16 MiB are left to the graph itself
_CHECKED_BATCH_SIZES = (1, 2, 5)
_CHECKED_IMAGES = 8  # at most, per place in a batch


class _ConstantSignLinear(nn.Module):
    """What a trained `BinaryLinear` computes, with the signs of its weights as a constant (in, out)."""

    def __init__(self, layer: BinaryLinear):
        super().__init__()
        self.has_binary_activations = layer.options.activation_bits == 1
        if self.has_binary_activations:
            self.register_buffer("threshold", layer.threshold.detach())
        self.register_buffer("signs", layer.weight_signs().detach().T.contiguous())
        self.register_buffer("scale", layer.output_scale().detach())
        self.register_buffer("bias", layer.bias.detach())
        self.register_buffer("alpha", layer.alpha.detach())  # softmax-aware binarization reads it

    def forward(self, inputs: Tensor) -> Tensor:
        if self.has_binary_activations:
            inputs = torch.where(inputs - self.threshold >= 0, 1.0, -1.0)
        return (inputs @ self.signs) * self.scale + self.bias


class _MapPass(nn.Module):
    """Gives `anomaly_map` a forward method, which the exporter needs."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tensor:
        return self.detector.anomaly_map(images)


def export_onnx(detector: Detector, metadata: dict, output: Path, side: int | None = None) -> float:
    """Write the network from `image` (B, 3, crop, crop), normalised, to `anomaly_map` (B, crop, crop), float32, any B.

    `metadata` becomes one JSON string under the key "binaryad"; `side` is the crop, by default that of the encoder's ViT.
    Returns the largest difference between the maps of ONNX Runtime and torch on random images (see `_largest_difference`).

    Raises:
        UserError: onnx or onnxruntime is missing, or the model does not fit into one file.
        NumericError: the difference is not below 1e-4; nothing is written.
        ResourceError: the file cannot be written.
    """
    check_packages()
    detector, side = copy.deepcopy(detector).cpu().eval(), side or _image_side(detector)
    content = with_metadata(traced(_with_constant_signs(copy.deepcopy(detector)), side), metadata)
    difference = _largest_difference(content, detector, side)
    if not difference < TOLERANCE:  # also where it is not a number
        raise NumericError(
            f"the ONNX model is not the torch model: maps differ by {difference:.1e}, allowed is less than "
            f"{TOLERANCE:.0e}; {str(output)!r} was not written"
        )
    write_graph(output, content)
    return difference


def write_graph(output: Path, content: bytes) -> None:
    """Write an ONNX file, and its sha256 beside it in `<file>.sha256`, which `sha256sum --check` understands.

    Raises:
        ResourceError: a file cannot be written.
    """
    neighbour = output.with_name(f"{output.name}.sha256")
    with contextlib.suppress(OSError):
        neighbour.unlink()  # of an earlier file: no hash is better than a wrong one
    atomic_write(output, lambda file: file.write(content))
    write_text(neighbour, f"{hashlib.sha256(content).hexdigest()}  {output.name}\n")


def check_packages() -> None:
    """Raise UserError unless there are onnx and onnxruntime."""
    try:
        importlib.import_module("onnx")
        importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError("ONNX export needs the packages onnx and onnxruntime: pip install -r requirements-onnx.txt") from error


def _image_side(detector: Detector) -> int:
    return detector.encoder.vit.patch_embed.img_size[0]


@torch.no_grad()
def traced(detector: Detector, side: int) -> bytes:
    """A detector of images (B, 3, side, side) as a serialised ONNX model; raises UserError if it does not fit into a file."""
    size = sum(value.nbytes for value in detector.state_dict().values())
    if size > _LARGEST_TENSORS:
        raise UserError(
            f"the model is too large for one ONNX file: its tensors take {size / 1e9:.2f} GB, at most "
            f"{_LARGEST_TENSORS / 1e9:.2f} GB fit; use a smaller encoder"
        )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that replaces this one takes 18 s instead of 1 s for a tiny network.
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning, r"torch\.onnx\.")
        warnings.filterwarnings("ignore", "Constant folding - Only steps=1", UserWarning)
        # What a trace takes as constant follows from the fixed image size; that the batch is free is checked afterwards.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        torch.onnx.export(
            _MapPass(detector),
            (torch.zeros(1, 3, side, side),),  # one image: a batch size taken as constant is then broadcast
            buffer,
            dynamo=False,
            input_names=[_INPUT],
            output_names=[_OUTPUT],
            dynamic_axes={_INPUT: {0: "batch"}, _OUTPUT: {0: "batch"}},
            opset_version=_OPSET,
        )
    return buffer.getvalue()


def _with_constant_signs(module: nn.Module) -> nn.Module:
    """The same module, its binary layers replaced by ones without latent weights."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, BinaryLinear):
                setattr(parent, name, _ConstantSignLinear(child))
    return module


def with_metadata(content: bytes, metadata: dict) -> bytes:
    """The serialised model with `metadata` as one JSON string under the key "binaryad"."""
    import onnx

    model = onnx.load_model_from_string(content)
    model.metadata_props.add(key=METADATA_KEY, value=json.dumps(metadata))
    return model.SerializeToString()


def session_options():
    """Options of an ONNX Runtime session whose sums of integers are exact on every CPU.

    Without VNNI its fastest products of bytes may exceed 16 bits; the entry takes others there and changes nothing elsewhere.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options


def maps_of(content: bytes) -> Callable[[Tensor], np.ndarray]:
    """What gives the maps (B, S, S) that ONNX Runtime finds with a serialised model in images (B, 3, S, S)."""
    import onnxruntime

    options = session_options()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run([_OUTPUT], {_INPUT: images.numpy()})[0]


def _largest_difference(content: bytes, detector: Detector, side: int) -> float:
    """Largest difference between the maps of a serialised model and of a detector, over three batch sizes.

    It is absolute where maps are at most 2, as cosine distances are, and beyond relative to the largest value: maps that are
    scaled by what normal images show have values of any size on noise.

    A bit whose input lies within rounding of its threshold can fall on either side and then changes the map around a patch
    by up to 5e-3. This happens on a few images in a hundred, so every place in a batch has several random images to agree
    on one; the difference counts on the best of them. A wrong graph agrees on none. A model without binary inputs has no such
    bits: there one image per place must do.
    """
    found_by, generator = maps_of(content), torch.Generator().manual_seed(0)
    has_binary_inputs = any(
        isinstance(module, BinaryLinear) and module.options.activation_bits == 1 for module in detector.modules()
    )
    largest = 0.0
    for batch_size in _CHECKED_BATCH_SIZES:
        best = np.full(batch_size, np.inf)
        for _ in range(_CHECKED_IMAGES if has_binary_inputs else 1):
            images = torch.randn(batch_size, 3, side, side, generator=generator)
            expected = detector.anomaly_map(images).numpy()
            differences = np.abs(found_by(images) - expected).max(axis=(1, 2))
            best = np.minimum(best, differences / np.maximum(1, np.abs(expected).max(axis=(1, 2)) / 2))
            if best.max() < TOLERANCE:
                break
        largest = np.maximum(largest, best.max())
    return float(largest)
