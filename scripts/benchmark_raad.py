"""Time and weigh RAAD: torch in float32 and with simulated quantization, ONNX Runtime in float32 and on integers.

python -m scripts.benchmark_raad                                              # pdn_small, 256 pixels, one thread
python -m scripts.benchmark_raad --encoder pdn_medium --threads 2 --repeats 5

Weights are random: time does not depend on their values, and the number of bits changes the file alone. Needs
requirements-onnx.txt.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from models.build import PDN_ENCODERS, check_sizes
from models.efficientad import EfficientAD, EfficientADOptions
from models.teacher import RANDOM_TEACHER, build_teacher
from quantize.accounting import size_of
from quantize.allocation import AllocationOptions
from quantize.layers import QuantizationOptions
from quantize.reconstruction import ReconstructionOptions
from utils.command import run_command
from utils.converters import number
from utils.onnx_export import check_packages, maps_of, traced
from utils.parser import tool_parser
from utils.raad_export import integer_graph
from utils.raad_quantization import QuantizationPlan, ScoringOptions, quantize_detector
from utils.tables import format_rows
from utils.timing import describe_machine, interleaved_medians

_HEADER = ("variant", "ms", "images/s", "of torch float32", "bytes of its numbers")
_CALIBRATION_IMAGES = 2


@dataclass(frozen=True)
class Variant:
    """A way to run one detector: its name, images -> maps, and the bytes of its numbers."""

    name: str
    maps: Callable[[Tensor], object]
    bytes: int


def quantized(detector: EfficientAD, bits: int, autoencoder_bits: int | None, side: int) -> EfficientAD:
    """A copy, all layers of teacher and student but the 8-bit ends at `bits`, rounded to nearest, ranges from noise."""
    detector = copy.deepcopy(detector)
    plan = QuantizationPlan(
        allocation=AllocationOptions(method="uniform", bits=(bits,)),
        scoring=ScoringOptions(),
        layers=QuantizationOptions(range_init="minmax", round="nearest"),
        reconstruction=ReconstructionOptions(iterations=0, activation_iterations=0, crops=1),
        calibration_images=_CALIBRATION_IMAGES,
        autoencoder_bits=autoencoder_bits,
    )
    images = torch.randn(_CALIBRATION_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
    quantize_detector(detector, plan, lambda: [images], lambda: [images])
    return detector.eval()


def variants_of(detector: EfficientAD, bits: int, side: int) -> list[Variant]:
    """The float detector and two quantized ones, each in torch and in ONNX Runtime."""
    variants = [
        _in_torch("torch float32", detector),
        _in_onnx_runtime("ONNX Runtime float32", detector, traced(detector, side)),
    ]
    for autoencoder, autoencoder_bits in (("float", None), ("8-bit", 8)):
        converted = quantized(detector, bits, autoencoder_bits, side)
        graph = integer_graph(converted, side)
        variants.append(_in_torch(f"torch, simulated, {autoencoder} autoencoder", converted))
        variants.append(_in_onnx_runtime(f"ONNX Runtime, integers, {autoencoder} autoencoder", converted, graph))
    return variants


def _in_torch(name: str, detector: EfficientAD) -> Variant:
    return Variant(name, detector.anomaly_map, _bytes(detector, packed=True))


def _in_onnx_runtime(name: str, detector: EfficientAD, graph: bytes) -> Variant:
    return Variant(name, maps_of(graph), _bytes(detector, packed=False))


def _bytes(detector: EfficientAD, packed: bool) -> int:
    """With codes packed to their bits, as a packed file has them, or with a byte per code, as the graph has them."""
    size = size_of(detector)
    return size.packed_bytes if packed else size.int8_bytes


@torch.inference_mode()
def benchmark(arguments: argparse.Namespace) -> int:
    """Measure all variants in turns and print one table."""
    check_packages()
    check_sizes(arguments.encoder, arguments.image_size, arguments.image_size)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    side, size = arguments.image_size, PDN_ENCODERS[arguments.encoder]
    detector = EfficientAD(build_teacher(size, RANDOM_TEACHER), EfficientADOptions(), side).eval()
    variants = variants_of(detector, arguments.bits, side)
    image = torch.randn(1, 3, side, side)
    calls = {variant.name: partial(variant.maps, image) for variant in variants}
    seconds = interleaved_medians(calls, arguments.repeats)
    reference = seconds[variants[0].name]
    rows = [
        (variant.name, f"{1000 * own:.0f}", f"{1 / own:.2f}", f"{reference / own:.2f}x", f"{variant.bytes:,}")
        for variant in variants
        for own in [seconds[variant.name]]
    ]
    print(*describe_machine()[:2], sep="\n")
    print(f"{arguments.encoder}, one {side}x{side} image, layers between the ends at {arguments.bits} bits")
    print(format_rows([_HEADER, *rows]))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = tool_parser(__doc__)
    parser.add_argument("--encoder", choices=list(PDN_ENCODERS), default="pdn_small")
    parser.add_argument("--image_size", type=number(int, 64), default=256, help="a multiple of 32")
    parser.add_argument("--bits", type=number(int, 2, 8), default=4, metavar="N", help="of the layers between the ends")
    parser.add_argument("--threads", type=number(int, 1), default=1)
    parser.add_argument("--repeats", type=number(int, 1), default=9, help="rounds in which every variant runs once")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, benchmark)


if __name__ == "__main__":
    sys.exit(main())
