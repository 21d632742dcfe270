"""State dicts from files, read without running code."""

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from common.errors import UserError

_WRAPPERS = ("model", "state_dict")  # names under which programs put the tensors, beside other things


def read_state_dict(path: Path, kind: str, flag: str) -> tuple[dict[str, Tensor], str]:
    """Tensors of a .safetensors or .pth file and a sentence on their origin.

    Args:
        kind: what the file holds, for messages: "encoder weights".
        flag: how the user names such a file: "--encoder_weights".

    Raises:
        UserError: the file is absent, damaged, unsafe or holds no plain tensors.
    """
    if not path.is_file():
        raise UserError(f"{kind} not found: {path} is no file; give {flag} FILE (.safetensors or .pth)")
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "pt") as file:
                source = (file.metadata() or {}).get("source", path.name)
            return safetensors.torch.load_file(path), source
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own exceptions for a damaged file
        if "unsupported global" in str(error).lower():
            raise UserError(
                f"{kind} refused: {path} holds Python objects besides tensors and is not opened; save its state_dict() instead"
            ) from error
        raise UserError(
            f"{kind} unreadable: {path} is damaged or not a .safetensors/.pth state dict "
            f"({type(error).__name__}); download it again"
        ) from error
    for wrapper in _WRAPPERS:
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{kind} unusable: {path} holds no flat state dict of tensors")
    return state, path.name
