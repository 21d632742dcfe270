"""The tensors of a checkpoint and the network that they are for: names, shapes and types are compared before any is loaded."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from common.errors import UserError

_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile
_LISTED = 5


def fitting_state(state: Mapping[str, Tensor], network: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state under the names that the network has, which is all that may differ.

    Args:
        state: of the file at `path`; names may begin with what wrappers add.
        network: state dict of the network that it is for.

    Raises:
        UserError: tensors are missing, surplus, or of another shape or type; lists them.
    """
    plain = without_prefixes(state)
    common = sorted(network.keys() & plain.keys())
    shapes = [
        f"{name} has {tuple(plain[name].shape)} instead of {tuple(network[name].shape)}"
        for name in common
        if plain[name].shape != network[name].shape
    ]
    types = [
        f"{name} has {plain[name].dtype} instead of {network[name].dtype}"
        for name in common
        if plain[name].dtype != network[name].dtype
    ]
    kinds = {
        "missing": sorted(network.keys() - plain.keys()),
        "surplus": sorted(plain.keys() - network.keys()),
        "of another shape": shapes,
        "of another type": types,
    }
    differences = [f"{len(names)} tensors are {kind} ({_shortened(names)})" for kind, names in kinds.items() if names]
    if differences:
        raise UserError(
            f"wrong model: the tensors in {str(path)!r} do not fit this network; {'; '.join(differences)}; give one that "
            "was trained with these flags"
        )
    return plain


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without what wrappers put before its names, in whatever order."""
    return {_without_prefixes(name): value for name, value in state.items()}


def _without_prefixes(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return _without_prefixes(name.removeprefix(prefix))
    return name


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
