"""Shared fixtures."""

import signal
from functools import partial
from pathlib import Path

import pytest
import torch

import Binary_Dinomaly
import Binary_INP_Few_Shot
import Binary_INP_Multi_Class
import Binary_INP_Single_Class
from common.c_library import find_compiler
from models.build import RANDOM_TINY_ENCODER, build_encoder, build_inp_former
from models.weight_files import state_sha256
from tests.commands import Commands
from tests.miniature import TINY_FLAGS, make_mvtec
from tests.remembered_costs import remember_costs

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def counted_costs(tmp_path_factory) -> Path:
    """Where costs that were counted are remembered."""
    folder = tmp_path_factory.mktemp("costs")
    remember_costs(folder)
    return folder


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restores the handlers of SIGINT and SIGTERM after every test.

    A command that fails as one of several processes goes on ignoring SIGTERM, which is right where it ends after that.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def session_encoder():
    return build_encoder(RANDOM_TINY_ENCODER, 56)


@pytest.fixture
def tiny_encoder(session_encoder):
    """The encoder all tests share; a test that changes it fails itself, not another test far away."""
    before = state_sha256(session_encoder.state_dict())
    yield session_encoder
    assert state_sha256(session_encoder.state_dict()) == before, "this test changed the encoder that all tests share"


@pytest.fixture
def tiny_detector(tiny_encoder):
    """A float INP-Former of 32 channels on 4 x 4 patches, seeded."""
    torch.manual_seed(0)
    return build_inp_former(tiny_encoder, 6)


@pytest.fixture
def mvtec(tmp_path):
    """Root of a miniature MVTec-AD with the category bottle."""
    return make_mvtec(tmp_path / "data")


@pytest.fixture
def train(tmp_path):
    """Call an entry script in this process: flags -> exit code. Outputs go to tmp_path/runs."""

    def run(*flags: str, data: Path | None = None, dataset: str = "Folder", script=Binary_INP_Single_Class) -> int:
        return script.main(command_line(tmp_path, data, dataset, *flags))

    return run


@pytest.fixture
def train_multi(train):
    """`train` with the multi-class script."""
    return partial(train, script=Binary_INP_Multi_Class)


@pytest.fixture
def train_few(train):
    """`train` with the few-shot script."""
    return partial(train, script=Binary_INP_Few_Shot)


@pytest.fixture
def train_dinomaly(train):
    """`train` with Dinomaly's script."""
    return partial(train, script=Binary_Dinomaly)


@pytest.fixture(scope="session")
def compiler() -> str:
    """The system's C compiler."""
    found = find_compiler()
    if found is None:
        pytest.skip("there is no C compiler")
    return found


@pytest.fixture(scope="session")
def commands(tmp_path_factory, counted_costs):
    """Real commands, forked from a process that has imported everything (see `tests.commands`)."""
    started = Commands(tmp_path_factory.mktemp("commands"), counted_costs)
    yield started
    started.close()


def command_line(tmp_path: Path, data: Path | None, dataset: str, *flags: str) -> list[str]:
    """Flags of a tiny run below tmp_path/runs."""
    where = [] if data is None else ["--data_path", str(data)]
    return ["--dataset", dataset, *where, *TINY_FLAGS, "--save_dir", str(tmp_path / "runs"), *flags]


def run_folder(tmp_path: Path, save_name: str = "INP-Former-Single-Class", dataset: str | None = "Folder") -> Path:
    """Where such a run lies; without a data set in its name where several are joined."""
    data = "" if dataset is None else f"_dataset={dataset}"
    prototypes = "" if "inomaly" in save_name or "VarAD" in save_name else "_INP_num=6"  # only INP-Former has them
    return tmp_path / "runs" / f"{save_name}{data}_Encoder=random_vit_tiny_14_Resize=64_Crop=56{prototypes}"
