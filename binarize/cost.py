"""Parameters, bits, bytes and multiply-accumulates (MACs) of a detector, counted module by module.

Binary weights count 1 bit, quantized ones theirs, everything else 32. A MAC of a layer whose weights and activations are both
binary is one bit operation and is also given at 1/64 of a float MAC, the convention of the binary-network literature;
milliseconds follow another law and are measured, not counted. Latent float weights exist in training only and are not counted.
"""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from binarize.linear import BinaryLinear
from binarize.stages import scale_parameters
from models.detector import Detector
from models.state_space import StateSpaceBlock

BINARY_MAC_SHARE = 1 / 64
_ENCODER = "encoder"
_PARTS_OF_A_BLOCK = {
    "attn": "attention",
    "mlp": "MLP",
    **dict.fromkeys(("in_proj", "out_proj"), "projections"),
    **dict.fromkeys(("", "convolution", "x_proj", "step_weight", "step_bias", "log_decay", "skip", "start"), "scan"),
}


@dataclass(frozen=True)
class Cost:
    """Cost of one module or a sum of modules; MACs are for one image."""

    parameters: int = 0
    binary_parameters: int = 0
    added_parameters: int = 0  # scales, thresholds and gates, which the float model does not have
    float_macs: int = 0
    binary_macs: int = 0
    saved_bits: int = 0  # by weights of 2 to 8 bits

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.parameters + other.parameters,
            self.binary_parameters + other.binary_parameters,
            self.added_parameters + other.added_parameters,
            self.float_macs + other.float_macs,
            self.binary_macs + other.binary_macs,
            self.saved_bits + other.saved_bits,
        )

    @property
    def bits(self) -> int:
        return 32 * (self.parameters - self.binary_parameters) + self.binary_parameters - self.saved_bits

    @property
    def bytes(self) -> int:
        return (self.bits + 7) // 8

    @property
    def macs(self) -> int:
        return self.float_macs + self.binary_macs

    @property
    def equivalent_macs(self) -> float:
        """Float MACs plus binary MACs at 1/64."""
        return self.float_macs + self.binary_macs * BINARY_MAC_SHARE

    @property
    def size_ratio(self) -> float:
        """Bytes of the float32 model over bytes of this one."""
        return 4 * (self.parameters - self.added_parameters) / self.bytes

    @property
    def mac_ratio(self) -> float | None:
        """MACs over MACs with the binary ones at 1/64; None for a part without MACs."""
        return self.macs / self.equivalent_macs if self.macs else None


class _MapPass(torch.nn.Module):
    """Gives `anomaly_map` a forward method, which the counter needs."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.detector.anomaly_map(images)


def _count_macs(detector: Detector, crop_size: int) -> dict[str, int]:
    """MACs of products, convolutions, attention and scans that each module does itself, by module name ("" is the detector).

    Runs on shapes alone, without data.
    """
    map_pass = _MapPass(detector)
    tensors = [*map_pass.named_parameters(), *map_pass.named_buffers()]
    shapes = {name: torch.empty_like(value, device="meta") for name, value in tensors}
    image = torch.empty(1, 3, crop_size, crop_size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(map_pass, shapes, (image,))
    root = _MapPass.__name__
    counted = {
        "" if name == root else name.removeprefix(f"{root}.detector."): sum(operations.values()) // 2  # a MAC is 2 operations
        for name, operations in counter.get_flop_counts().items()
        if name.startswith(root)
    }
    own = dict(counted)
    for name, macs in counted.items():
        parent = name
        while parent:  # what a module does inside a counted ancestor is not the ancestor's own
            parent = parent.rpartition(".")[0]
            if parent in counted:
                own[parent] -= macs
                break
    for name, module in detector.named_modules():
        if isinstance(module, StateSpaceBlock):  # its scan is no matrix product
            own[name] += module.scan_macs
    return own


def _part_name(name: str) -> str:
    """The row a tensor or module belongs to: encoder, bottleneck, ..., and attention and MLP of the decoder apart."""
    fields = name.split(".")
    if fields[0] != "decoder":
        return fields[0]
    kind = fields[2] if len(fields) > 2 else ""
    return f"decoder {_PARTS_OF_A_BLOCK.get(kind, 'norms')}"


def cost_table(detector: Detector, crop_size: int) -> dict[str, Cost]:
    """Cost per part, then the sums "decoder side" (all that is trained), "whole model" and "with unused blocks".

    The encoder counts the blocks that are run and kept; the last row counts its unused blocks and its full position
    table too, as published parameter counts do.
    """
    binary_weights = {f"{name}.weight" for name, module in detector.named_modules() if isinstance(module, BinaryLinear)}
    added = {id(parameter) for parameter in scale_parameters(detector)}
    table: dict[str, Cost] = {}
    quantized = {name: module for name, module in detector.named_modules() if hasattr(module, "weight_quantizer")}
    saved = {f"{name}.weight": 32 - module.bits for name, module in quantized.items()}
    for name, parameter in detector.named_parameters():
        count = parameter.numel()
        binary, own = count if name in binary_weights else 0, count if id(parameter) in added else 0
        cost = Cost(count, binary, own, saved_bits=count * saved.get(name, 0))
        table[_part_name(name)] = table.get(_part_name(name), Cost()) + cost

    binary_modules = {
        name
        for name, module in detector.named_modules()
        if isinstance(module, BinaryLinear) and module.options.activation_bits == 1
    }
    for name, macs in _count_macs(detector, crop_size).items():
        if macs:
            table[_part_name(name)] += Cost(binary_macs=macs) if name in binary_modules else Cost(float_macs=macs)

    if not detector.runs_encoder:
        table.pop(_ENCODER)
    trained = sum((cost for part, cost in table.items() if part != _ENCODER), Cost())
    if not detector.runs_encoder:
        return {**table, "decoder side": trained, "whole model": trained, "with unused blocks": trained}
    unused = Cost(parameters=detector.encoder.published_parameters - table[_ENCODER].parameters)
    whole = trained + table[_ENCODER]
    return {**table, "decoder side": trained, "whole model": whole, "with unused blocks": whole + unused}
