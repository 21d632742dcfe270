"""A quantized RAAD as the tensors of a packed file and back: codes of few bits for weights, no float teacher.

docs/FORMAT.md describes them.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from models.build import PDN_ENCODERS
from models.efficientad import EfficientAD
from models.patch_description import TEACHER_CHANNELS, FrozenTeacher, PatchDescriptionNetwork
from quantize.accounting import FLOAT_BITS
from quantize.layers import QuantizationOptions, QuantizedConvolution, quantize_network
from quantize.packed_codes import pack_codes, unpack_codes
from quantize.quantizers import UniformQuantizer
from utils.raad_host import RAAD


def stored_tensors(detector: EfficientAD) -> dict[str, Tensor]:
    """What the file of a quantized detector holds: its trained state, but codes for quantized weights and Z as one byte.

    Bits are in the description. Steps stay logarithms: only these give back the very steps.
    """
    state = {name: value for name, value in detector.trained_state().items() if not name.endswith("._extra_state")}
    for name, layer in _quantized(detector):
        del state[f"{name}.weight"]
        state[f"{name}.weight_codes"] = pack_codes(layer.weight_codes(), layer.bits)
    return {name: value.to(torch.uint8) if _is_zero_point(name) else value for name, value in state.items()}


def skeleton(description: Mapping) -> EfficientAD:
    """The quantized detector of a description, without values and without a float teacher.

    Raises:
        KeyError, TypeError, ValueError: the description makes no sense.
    """
    config, named, bits = description["config"], description["encoder"], description["bits"]
    size = PDN_ENCODERS[named["name"]]
    options = QuantizationOptions(range_init="minmax", output_bits=config["output_bits"] or None)
    with torch.device("meta"):
        teacher = FrozenTeacher(
            PatchDescriptionNetwork(size, TEACHER_CHANNELS[size], config["padding"]), named["source"], named["sha256"]
        )
        detector = RAAD.build(teacher, config)
        detector.quantized_teacher, teacher.network = teacher.network, nn.Identity()  # the float one is nowhere
        for name, network in networks_of(detector).items():
            if set(bits[name]) != {FLOAT_BITS}:
                quantize_network(network, bits[name], options)
    for module in detector.modules():
        if isinstance(module, UniformQuantizer):
            module.has_range = True  # once it is filled
    return detector


def state_of(detector: EfficientAD, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers of a `skeleton` from the tensors of its file: weights are S (q - Z), which round to themselves.

    Raises:
        KeyError, ValueError, RuntimeError: tensors that are missing, or of another type or shape.
    """
    state = dict(tensors)
    for name, value in tensors.items():
        if _is_zero_point(name):
            if value.dtype != torch.uint8:
                raise ValueError(f"{name} has type {value.dtype}, expected torch.uint8")
            state[name] = value.to(torch.int32)
    for name, layer in _quantized(detector):
        codes = unpack_codes(state.pop(f"{name}.weight_codes"), layer.bits, layer.weight.shape)
        log_step, zero_point = (state[f"{name}.weight_quantizer.{leaf}"] for leaf in ("log_step", "zero_point"))
        state[f"{name}.weight"] = (codes - zero_point.view(-1, 1, 1, 1)) * log_step.exp().view(-1, 1, 1, 1)
    return state


def networks_of(detector: EfficientAD) -> dict[str, nn.Module]:
    """The three networks by the names that descriptions have for them."""
    return {"teacher": detector.teacher, "student": detector.student, "autoencoder": detector.autoencoder}


def _quantized(detector: EfficientAD) -> Iterator[tuple[str, QuantizedConvolution]]:
    return ((name, module) for name, module in detector.named_modules() if isinstance(module, QuantizedConvolution))


def _is_zero_point(name: str) -> bool:
    return name.endswith(".zero_point")
