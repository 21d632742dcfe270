"""The frozen teacher of EfficientAD: where its weights come from and how they are read."""

import re
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from models.encoder import LOCAL_WEIGHTS_FOLDER
from models.patch_description import SIZES, TEACHER_CHANNELS, FrozenTeacher, PatchDescriptionNetwork
from models.weight_files import read_state_dict, state_sha256

RANDOM_TEACHER = "random"

# places of the convolutions in an nn.Sequential that holds ReLUs and pools, too
_SEQUENTIAL_PLACES = {"small": (0, 3, 6, 8), "medium": (0, 3, 6, 8, 10, 12), "tiny": (0, 3, 6, 8)}
_KEY = re.compile(r"(?:(?P<prefix>.+)\.)?(?P<layer>\d+|conv\d+)\.(?P<kind>weight|bias)")


def build_teacher(size: str, weights_file: str | None = None, seed: int = 0) -> FrozenTeacher:
    """The teacher of this size with its weights.

    Args:
        weights_file: None looks for `weights/pdn_<size>.safetensors` beside the scripts; "random" draws weights, for tests.
        seed: of random weights.

    Raises:
        UserError: there are no weights, or they are damaged or of another network.
    """
    if weights_file == RANDOM_TEACHER:
        return _random_teacher(size, seed)
    path = Path(weights_file) if weights_file else LOCAL_WEIGHTS_FOLDER / f"pdn_{size}.safetensors"
    if not weights_file and not path.is_file():
        raise UserError(
            f"no weights for the teacher: {path} is not there; give --teacher_weights FILE, or make that file with "
            f"`python -m scripts.distill_teacher --size {size} --images FOLDER --output {path}`"
        )
    state, source = read_state_dict(path, "teacher weights", "--teacher_weights")
    state = to_named_layout(state, size)
    with torch.device("meta"):  # draws no random numbers
        network = PatchDescriptionNetwork(size, TEACHER_CHANNELS[size])
    _refuse_other_network(network, state, path)
    network.load_state_dict(state, assign=True)
    return FrozenTeacher(network, source, state_sha256(state))


def to_named_layout(state: dict[str, Tensor], size: str) -> dict[str, Tensor]:
    """Tensors of a teacher's file as `conv1.weight`, `conv1.bias`, `conv2.weight`, ..., in float32.

    Files name the convolutions so, or by their places in an nn.Sequential, all behind one prefix such as "teacher." or
    "module." or none. Names that are neither stay as they are.
    """
    keys = {name: _KEY.fullmatch(name) for name in state}
    if len({key and key["prefix"] for key in keys.values()}) > 1:  # several networks in one file, or more than a network
        return dict(state)
    names = {str(place): f"conv{number}" for number, place in enumerate(_SEQUENTIAL_PLACES[size], start=1)}
    renamed = {}
    for name, key in keys.items():
        named = f"{names.get(key['layer'], key['layer'])}.{key['kind']}" if key else name
        renamed[named] = state[name].float().contiguous()
    return renamed


def _random_teacher(size: str, seed: int) -> FrozenTeacher:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PatchDescriptionNetwork(size, TEACHER_CHANNELS[size])
    source = f"random weights (seed {seed}), which know no images: for tests and controls only"
    return FrozenTeacher(network, source, state_sha256(network.state_dict()))


def _refuse_other_network(network: PatchDescriptionNetwork, state: dict[str, Tensor], path: Path) -> None:
    expected = network.state_dict()
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    shapes = sorted(name for name in expected.keys() & state.keys() if expected[name].shape != state[name].shape)
    if missing or surplus or shapes:
        raise UserError(
            f"teacher weights do not fit: {path} lacks {len(missing)} tensors {missing[:3]}, has {len(surplus)} too many "
            f"{surplus[:3]} and {len(shapes)} of another shape {shapes[:3]}; {_size_hint(state, network.size)}"
        )
    damaged = sorted(name for name, value in state.items() if not value.isfinite().all())
    if damaged:
        raise UserError(f"teacher weights unusable: {path} has values that are not finite in {damaged[:3]}; use another copy")


def _size_hint(state: dict[str, Tensor], size: str) -> str:
    """Which other size a refused file is of."""
    for other in SIZES:
        with torch.device("meta"):
            expected = PatchDescriptionNetwork(other, TEACHER_CHANNELS[other]).state_dict()
        found = to_named_layout(state, other)
        if {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in expected.items()}:
            return f"it is a teacher of size {other}, not {size}"
    return f"expected a patch description network of size {size} with {TEACHER_CHANNELS[size]} outputs"
