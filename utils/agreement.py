"""Does a packed model decide as the trained one? Binary decisions and maps of both, compared on the same features."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from binarize.kernels import oracle
from binarize.linear import BinaryLinear
from binarize.runtime import FoldedLinear, PackedLinear
from common.errors import NumericError
from models.detector import Detector
from utils.packed_model import PackingOptions, pack_detector


@dataclass(frozen=True)
class Agreement:
    """How many of a model's binary activations differ once it runs on bits, and by how much its maps then differ."""

    decisions: int
    differing: int
    largest_map_difference: float

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.differing} of {self.decisions} binary decisions differ from the trained model's, "
            f"its maps by at most {self.largest_map_difference:.1e}"
        )


def packed_copy(detector: Detector, options: PackingOptions) -> Detector:
    """A packed copy; the detector stays as it is, and shares its encoder with the copy where that stays float32."""
    shared = {id(detector.encoder): detector.encoder} if options.encoder == "fp32" else {}
    packed = copy.deepcopy(detector, shared)
    pack_detector(packed, options)
    return packed


@torch.no_grad()
def compare_on_bits(detector: Detector, features: Tensor) -> Agreement:
    """Run a trained binary detector and its packed form, all float parts in float32, on features; count what differs."""
    packed = packed_copy(detector, PackingOptions("fp32", "fp32"))
    trained_bits, trained_map = _recorded(detector.eval(), features, BinaryLinear, _decisions)
    packed_map = packed.anomaly_map(features)
    for block in packed.decoder:
        block.fused = False  # the same numbers, but every layer is seen
    packed_bits, map_by_layers = _recorded(packed, features, (PackedLinear, FoldedLinear), _unpacked)
    if not torch.allclose(packed_map, map_by_layers, rtol=0, atol=0, equal_nan=True):
        raise NumericError("the fused kernels and the single ones disagree; please report this, with the CPU's name")
    pairs = list(zip(trained_bits, packed_bits, strict=True))
    return Agreement(
        sum(one.numel() for one, _ in pairs),
        sum(int((one != other).sum()) for one, other in pairs),
        float((trained_map - packed_map).abs().max()),
    )


def _decisions(layer: BinaryLinear, inputs: Tensor) -> Tensor:
    signs = (inputs - layer.threshold) / layer.log_activation_scale.exp() >= 0
    return signs.reshape(-1, layer.in_features)


def _unpacked(layer: PackedLinear | FoldedLinear, bits: Tensor) -> Tensor:
    return oracle.unpack_signs(bits, layer.in_features) > 0


def _recorded(detector: Detector, features: Tensor, kinds, decisions) -> tuple[list[Tensor], Tensor]:
    """Decisions of all layers of some kinds, in the order of the network, and the anomaly map."""
    found: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, arguments: tuple) -> None:
        found[layer] = decisions(layer, arguments[0])

    layers = [module for module in detector.modules() if isinstance(module, kinds)]
    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    anomaly_map = detector.anomaly_map(features)
    for hook in hooks:
        hook.remove()
    return [found[layer] for layer in layers], anomaly_map
