"""Time and weigh a packed model against the same network in torch float32, bfloat16 and int8, as Markdown.

python -m scripts.benchmark --model bottle.binaryad
python -m scripts.benchmark --random base --host dinomaly --output tables.md                 # no checkpoint needed
BINARYAD_ISA=avx2 python -m scripts.benchmark --random small                                 # another path of the kernels
"""

import argparse
import copy
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from binarize.int8 import Int8Linear, to_int8
from binarize.kernels import operations, oracle
from binarize.linear import BinarizationOptions
from binarize.packed_blocks import fuse_linear_attention
from binarize.runtime import prepare_modules
from binarize.stages import binarize, calibrate
from common.errors import UserError
from datasets.transforms import image_transform
from models.build import build_encoder_without_weights, check_sizes, published_parameter_count
from models.detector import Detector
from models.dinomaly import ATTENTIONS
from utils.agreement import packed_copy
from utils.checkpoint import write_text
from utils.command import run_command
from utils.converters import number
from utils.hosts import DINOMALY, HOSTS, INP_FORMER, Host, network_defaults
from utils.packed_model import PackingOptions, load_packed, packed_bytes
from utils.parser import tool_parser
from utils.timing import describe_machine, interleaved_medians

HOST_NAMES = {host.name.lower().replace("-", "_"): host.name for host in (INP_FORMER, DINOMALY)}
SHAPES = [(784, 384, 384), (784, 384, 1536), (784, 1536, 384), (784, 768, 768), (784, 768, 3072), (784, 3072, 768)]
_PHOTO_SIDE = 900
_FLOAT = "torch float32"


@dataclass(frozen=True)
class Variant:
    """A way to run one network: its name, the detector, and the type of the features between encoder and decoder."""

    name: str
    detector: Detector
    dtype: torch.dtype = torch.float32


def build_parser() -> argparse.ArgumentParser:
    """The flags of this tool."""
    parser = tool_parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="FILE.binaryad", help="beside a float network of its sizes")
    source.add_argument("--random", choices=["small", "base", "large"], help="random weights of dinov2reg_vit_SIZE_14")
    parser.add_argument("--host", choices=list(HOST_NAMES), default="inp_former", help="network of --random")
    parser.add_argument("--decoder_attention", choices=list(ATTENTIONS), help="of --host dinomaly, default linear")
    parser.add_argument("--crop_size", type=number(int, 1), default=392, help="of --random; a file has its own")
    parser.add_argument("--encoder_weights", metavar="FILE", help="for a file that only names its encoder")
    parser.add_argument("--threads", type=number(int, 1), default=1)
    parser.add_argument("--repeats", type=number(int, 1), default=9, help="rounds in which every variant runs once")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the tables there too")
    return parser


def benchmark(arguments: argparse.Namespace) -> int:
    """Print all tables, and write them to --output."""
    if arguments.decoder_attention and (arguments.model or HOST_NAMES[arguments.host] != DINOMALY.name):
        raise UserError("--decoder_attention is for --random SIZE --host dinomaly; leave it out, or add these")
    torch.set_num_threads(arguments.threads)
    if arguments.model:
        packed, description = load_packed(arguments.model, encoder_weights=arguments.encoder_weights)
        if description["host"] not in HOST_NAMES.values():
            raise UserError(
                f"--model {str(arguments.model)!r} is a model of {description['host']}, whose parts have no such tables; "
                "scripts.predict times it, and benchmark_varad and benchmark_raad time networks of its kind"
            )
        name, crop = description["encoder"]["name"], description["config"]["crop_size"]
        host, published = HOSTS[description["host"]], description["encoder"]["published_parameters"]
        network = description["config"]
        ours = [Variant(arguments.model.name, packed)]
    else:
        name, crop, ours = f"dinov2reg_vit_{arguments.random}_14", arguments.crop_size, None
        host, published = HOSTS[HOST_NAMES[arguments.host]], published_parameter_count(name)
        network = network_defaults(host)
        if arguments.decoder_attention:
            network["decoder_attention"] = arguments.decoder_attention
        check_sizes(name, crop, crop)
    with torch.inference_mode():
        detector = random_detector(host, network, name, crop, published)
        variants = float_variants(detector)
        stage_2 = binary_detector(detector, crop)
        variants += ours or packed_variants(stage_2)
        sections = [
            [f"# {host.name}, {name}, {crop} px, one image", "", *[f"* {line}" for line in describe_machine()]],
            ["## 1-bit linear layers (microseconds)", "", *layer_table(arguments.repeats)],
            ["## Parts and whole (milliseconds)", "", *time_table(variants, crop, arguments.repeats)],
            ["## Bytes, of random networks at stage 2 in each precision", "", *size_table(detector, stage_2, arguments.model)],
        ]
    text = "\n\n".join("\n".join(section) for section in sections) + "\n"
    print(text)
    if arguments.output:
        write_text(arguments.output, text)
    return 0


def random_detector(host: Host, network: dict, encoder_name: str, crop_size: int, published_parameters: int) -> Detector:
    """A float network with random weights: time does not depend on their values, bytes by a few percent.

    `network`: the host's flags by name.
    """
    torch.manual_seed(0)
    encoder = build_encoder_without_weights(encoder_name, crop_size, "random weights", "", published_parameters)
    return host.build(encoder, network).eval()


def binary_detector(detector: Detector, crop_size: int) -> Detector:
    """The same network at stage 2, its thresholds set from random images."""
    binary = copy.deepcopy(detector, {id(detector.encoder): detector.encoder})
    binarize(binary, 2, BinarizationOptions())
    calibrate(binary, torch.randn(1, 3, crop_size, crop_size))
    return binary.eval()


def float_variants(detector: Detector) -> list[Variant]:
    """The network without a single bit: float32, bfloat16, torch's own int8, and everything in this project's int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        dynamic = torch.ao.quantization.quantize_dynamic(copy.deepcopy(detector), {nn.Linear}, dtype=torch.qint8)
    everything = copy.deepcopy(detector)
    fuse_linear_attention(everything)
    to_int8(everything)
    prepare_modules(everything)
    return [
        Variant(_FLOAT, detector),
        Variant("torch bfloat16", copy.deepcopy(detector).to(torch.bfloat16), torch.bfloat16),
        Variant("torch int8 dynamic", dynamic),
        Variant("all int8, no bits", everything),
    ]


def packed_variants(stage_2: Detector) -> list[Variant]:
    """The packed network with each precision of the encoder."""
    options = [PackingOptions("fp32", "fp32"), PackingOptions("bf16", "int8"), PackingOptions("int8", "int8")]
    return [Variant(f"1 bit, encoder {option.encoder}", packed_copy(stage_2, option)) for option in options]


def time_table(variants: list[Variant], crop_size: int, repeats: int) -> list[str]:
    """Milliseconds of encoder, what lies between (bottleneck, INP-Former's prototypes), decoder, and from photograph to map."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (_PHOTO_SIDE, _PHOTO_SIDE, 3), dtype=np.uint8))
    transform = image_transform(round(crop_size * 448 / 392), crop_size)
    image = transform(photo).unsqueeze(0)
    calls: dict[tuple[str, str], Callable] = {}
    for variant in variants:
        features = variant.detector.encode(image).to(variant.dtype)
        fused = variant.detector.fuse(features)
        context, tokens = _before_decoder(variant.detector, fused)
        for part, call in {
            "encoder": lambda v=variant: v.detector.encode(image),
            "between": lambda v=variant, f=fused: _before_decoder(v.detector, f),
            "decoder": lambda v=variant, t=tokens, c=context: _decode(v.detector, t, c),
            "photo to map": lambda v=variant: _map_of_photo(v, photo, transform),
        }.items():
            calls[variant.name, part] = call
    seconds = interleaved_medians(calls, repeats)
    parts = list(dict.fromkeys(part for _, part in calls))
    lines = _header(["variant", *parts, "decoder ratio", "whole ratio"])
    for variant in variants:
        own = [seconds[variant.name, part] for part in parts]
        ratios = [seconds[_FLOAT, part] / seconds[variant.name, part] for part in ("decoder", "photo to map")]
        lines.append(_row([variant.name, *(f"{1000 * value:.1f}" for value in own), *(f"{ratio:.2f}x" for ratio in ratios)]))
    whole, decoder = seconds[_FLOAT, "photo to map"], seconds[_FLOAT, "decoder"]
    return [*lines, "", f"A decoder that costs nothing beside a float32 encoder would give {whole / (whole - decoder):.2f}x."]


def _before_decoder(detector: Detector, fused: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    return detector.context(fused), detector.through_bottleneck(fused)


def _decode(detector: Detector, tokens: Tensor, context: tuple[Tensor, ...]) -> Tensor:
    for block in detector.decoder:
        tokens = block(tokens, *context)
    return tokens


def _map_of_photo(variant: Variant, photo: Image.Image, transform: Callable) -> Tensor:
    features = variant.detector.encode(transform(photo).unsqueeze(0))
    return variant.detector.anomaly_map(features.to(variant.dtype))


def layer_table(repeats: int) -> list[str]:
    """Microseconds of one linear layer of each shape (rows, in, out) in every arithmetic."""
    names = ["float32", "bfloat16", "int8", "pack", "norm + pack", "1-bit product", "pack + product", "to bits"]
    lines = _header(["rows, in, out", *names, "float32 / (pack + product)"])
    ratios = []
    for shape in SHAPES:
        calls = dict(zip(names, _layer_calls(*shape), strict=True))
        seconds = interleaved_medians(calls, 3 * repeats)
        ratios.append(seconds["float32"] / seconds["pack + product"])
        microseconds = [f"{1e6 * seconds[name]:.0f}" for name in names]
        lines.append(_row([", ".join(map(str, shape)), *microseconds, f"{ratios[-1]:.1f}x"]))
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    note = "int8: quantization per token, product and rescaling; to bits: the product of packed inputs, folded to bits."
    return [*lines, "", f"Geometric mean of the last column: {mean:.1f}x. {note}"]


def _layer_calls(rows: int, inputs: int, outputs: int) -> list[Callable]:
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    half = [tensor.bfloat16() for tensor in (x, weight, bias)]
    layer = nn.Linear(inputs, outputs)
    int8 = Int8Linear(layer)
    int8.prepare_weights()
    threshold, ones = torch.zeros(inputs), torch.ones(inputs)
    panels = oracle.panels_of(oracle.pack_signs(weight >= 0))
    bits = operations.pack(x, threshold)
    low, span = torch.zeros(outputs, dtype=torch.int32), torch.full((outputs,), inputs // 2, dtype=torch.int32)
    scale = torch.rand(outputs)

    def product(packed: Tensor) -> Tensor:
        return operations.linear(packed, panels, inputs, scale, bias, None)

    return [
        lambda: F.linear(x, weight, bias),
        lambda: F.linear(*half),
        lambda: int8(x),
        lambda: operations.pack(x, threshold),
        lambda: operations.layer_norm_pack(x, ones, threshold, 1e-8, threshold),
        lambda: product(bits),
        lambda: product(operations.pack(x, threshold)),
        lambda: operations.linear_to_bits(bits, panels, inputs, low, span),
    ]


def size_table(detector: Detector, stage_2: Detector, model: Path | None) -> list[str]:
    """Bytes of a given file, and of random networks of its sizes in each precision, against their float32 parameters."""
    encoder = detector.encoder
    trained = 4 * sum(value.numel() for name, value in detector.named_parameters() if not name.startswith("encoder."))
    kept = trained + 4 * sum(value.numel() for value in encoder.parameters())
    published = trained + 4 * encoder.published_parameters
    lines = _header(["file", "trained part", "ratio", "whole", "ratio", "ratio with unused blocks"])
    lines.append(_row(["float32", f"{trained:,}", "1.00x", f"{kept:,}", "1.00x", f"{published / kept:.2f}x"]))
    if model is not None:
        size = model.stat().st_size
        lines.append(_row([model.name, "-", "-", f"{size:,}", f"{kept / size:.2f}x", f"{published / size:.2f}x"]))
    for options in [
        PackingOptions("fp32", "fp32"),
        PackingOptions("bf16", "fp16"),
        PackingOptions("int8", "fp16"),
        PackingOptions("int8", "int8"),
    ]:
        packed = packed_copy(stage_2, options)
        alone = len(packed_bytes(packed, PackingOptions(options.encoder, options.trained, True), {}))
        whole = len(packed_bytes(packed, options, {}))
        name = f"encoder {options.encoder}, trained float parts {options.trained}"
        cells = [f"{alone:,}", f"{trained / alone:.2f}x", f"{whole:,}", f"{kept / whole:.2f}x", f"{published / whole:.2f}x"]
        lines.append(_row([name, *cells]))
    return lines


def _header(cells: list[str]) -> list[str]:
    return [_row(cells), "|" + "---|" * len(cells)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return run_command(build_parser(), argv, benchmark)


if __name__ == "__main__":
    sys.exit(main())
