"""Cross-layer binarization (CLB): what becomes binary in which stage.

Stage 0 is the float network, stage 1 has binary attention in every decoder block, stage 2 binary attention and MLP.
"""

import torch
from torch import Tensor, nn

from binarize.attention import BinaryPrototypeAttention, BinarySoftmaxAttention, SoftmaxAwareBinarization
from binarize.linear import BinarizationOptions, BinaryLinear
from models.detector import Detector
from models.layers import LinearSelfAttention, PrototypeAttention, SoftmaxSelfAttention
from models.state_space import StateSpaceBlock

STAGES = (0, 1, 2)
_BINARY_ATTENTION = {PrototypeAttention: BinaryPrototypeAttention, SoftmaxSelfAttention: BinarySoftmaxAttention}


def binarize(detector: Detector, stage: int, options: BinarizationOptions) -> None:
    """Bring the decoder blocks of a detector to `stage`, in place; what is binary already stays as it is."""
    for block in detector.decoder:
        if isinstance(block, StateSpaceBlock):
            _binarize_state_space(block, stage, options)
            continue
        if stage >= 1 and type(block.attn) in _BINARY_ATTENTION:
            block.attn = _BINARY_ATTENTION[type(block.attn)](block.attn, options)
        if stage >= 1 and isinstance(block.attn, LinearSelfAttention):  # has no map: layers are all that can be binary
            _binarize_layers(block.attn, ("qkv", "proj"), options)
        if stage >= 2:
            _binarize_layers(block.mlp, ("fc1", "fc2"), options)


def _binarize_state_space(block: StateSpaceBlock, stage: int, options: BinarizationOptions) -> None:
    """VarAD: the projections around the scan stand for the attention; the scan itself and what feeds it stay float."""
    if stage >= 1:
        _binarize_layers(block, ("in_proj", "out_proj"), options)
    if stage >= 2:
        _binarize_layers(block.mlp, ("fc1", "fc2"), options)


def _binarize_layers(module: nn.Module, names: tuple[str, ...], options: BinarizationOptions) -> None:
    for name in names:
        layer = getattr(module, name)
        if isinstance(layer, nn.Linear):
            setattr(module, name, BinaryLinear.from_linear(layer, options))


@torch.no_grad()
def calibrate(detector: Detector, inputs: Tensor) -> int:
    """Initialise thresholds and activation scales of all layers that have none yet from one batch; returns how many.

    One forward pass suffices: each layer is set just before it computes, so later layers see calibrated inputs.
    """
    waiting = [layer for layer in binary_layers(detector) if layer.options.activation_bits == 1 and not bool(layer.calibrated)]
    hooks = [layer.register_forward_pre_hook(lambda layer, arguments: layer.calibrate(arguments[0])) for layer in waiting]
    if waiting:
        training = detector.training
        detector.eval().anomaly_map(inputs)  # without dropout: the bits of the trained network count
        detector.train(training)
    for hook in hooks:
        hook.remove()
    return len(waiting)


def binary_layers(detector: nn.Module) -> list[BinaryLinear]:
    """All binary linear layers, in the order of the network."""
    return [module for module in detector.modules() if isinstance(module, BinaryLinear)]


def attention_gates(detector: nn.Module) -> list[SoftmaxAwareBinarization]:
    """All softmax-aware binarizations, in the order of the network."""
    return [module for module in detector.modules() if isinstance(module, SoftmaxAwareBinarization)]


def force_gates(detector: nn.Module, value: float | None) -> None:
    """Replace every confidence gate by a constant (0: float map, 1: binary map); None restores the learned gates."""
    for gate in attention_gates(detector):
        gate.forced_gate = value


def mean_gate(detector: nn.Module) -> float | None:
    """Mean of all gates in the last forward pass, the true binary share of the attention maps; None without gates."""
    values = [gate.mean_gate for gate in attention_gates(detector) if gate.mean_gate is not None]
    return float(torch.stack(values).mean()) if values else None


def scale_parameters(detector: nn.Module) -> list[nn.Parameter]:
    """Scales, thresholds and gates of all binary layers: what a binary network has beyond its float host."""
    return [
        parameter for module in binary_layers(detector) + attention_gates(detector) for parameter in module.scale_parameters()
    ]


def parameter_groups(detector: Detector, weight_decay: float) -> list[dict]:
    """Two optimiser groups: weights with decay; scales, thresholds, gates and what the detector excepts without."""
    without = {id(parameter): parameter for parameter in scale_parameters(detector) + detector.parameters_without_decay()}
    decayed = [parameter for parameter in detector.trainable_parameters() if id(parameter) not in without]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": list(without.values()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
