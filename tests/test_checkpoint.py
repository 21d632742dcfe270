"""Checkpoints: atomic, verified, and opened without running code."""

import os
import pickle
import random
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from common.errors import ResourceError, UserError
from tests.conftest import REPOSITORY
from utils.checkpoint import FORMAT_VERSION, atomic_write, load_checkpoint, save_checkpoint

CONTENT = {
    "model": {"weight": torch.arange(4000.0), "flag": torch.tensor(True)},
    "stage": 1,
    "config": {"dataset": "Folder"},
    "encoder": "tiny",
    "encoder_sha256": "0",
}


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def path(tmp_path):
    save_checkpoint(tmp_path / "model.pth", CONTENT)
    return tmp_path / "model.pth"


def test_round_trip(path):
    content = load_checkpoint(path)
    assert content["format_version"] == FORMAT_VERSION
    assert torch.equal(content["model"]["weight"], CONTENT["model"]["weight"])
    assert content["config"] == CONTENT["config"]


def flip_a_byte_of_the_tensors(path):
    content = bytearray(path.read_bytes())
    place = bytes(content).index(torch.tensor([2000.0, 2001.0]).numpy().tobytes())
    content[place + 2] ^= 4
    path.write_bytes(content)


def save_other_format(path):
    torch.save({**torch.load(path, weights_only=True), "format_version": FORMAT_VERSION + 1}, path)


DAMAGES = {
    "is no file": lambda path: path.unlink(),
    "is empty": lambda path: path.write_bytes(b""),
    "no zip archive": lambda path: path.write_text("<html>404 Not Found</html>"),
    "cannot be read": lambda path: path.write_bytes(path.read_bytes()[:-3000]),
    "do not match their hash": flip_a_byte_of_the_tensors,
    "of another program": lambda path: torch.save({"state_dict": CONTENT["model"]}, path),
    "too new": save_other_format,
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_every_damage_has_its_sentence(path, expected):
    DAMAGES[expected](path)
    with pytest.raises(UserError, match=expected) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_safetensors_under_another_name(path):
    safetensors.torch.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="no zip archive"):
        load_checkpoint(path)


@pytest.mark.parametrize("protocol", ["zip", "plain"])
def test_hostile_pickle_runs_nothing(path, tmp_path, protocol):
    marker = tmp_path / "marker"
    if protocol == "zip":
        torch.save({**CONTENT, "attack": Attack(marker)}, path)
    else:
        path.write_bytes(pickle.dumps(Attack(marker)))
    marker.unlink(missing_ok=True)
    with pytest.raises(UserError, match="not opened" if protocol == "zip" else "no zip archive"):
        load_checkpoint(path)
    assert not marker.exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(13, "Permission denied"), ValueError("x")])
def test_failed_write_keeps_the_old_file(path, error):
    before = path.read_bytes()

    def fail(file):
        file.write(b"half of it")
        raise error

    expected = ValueError if isinstance(error, ValueError) else ResourceError
    with pytest.raises(expected, match="disk full" if getattr(error, "errno", 0) == 28 else None):
        atomic_write(path, fail)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_torch_hides_a_full_disk_and_we_find_it(path):
    class FullDisk:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def flush(self):
            pass

    with pytest.raises(ResourceError, match="disk full"):
        atomic_write(path, lambda file: torch.save(CONTENT, FullDisk()))
    assert torch.equal(load_checkpoint(path)["model"]["weight"], CONTENT["model"]["weight"])


def test_kill_in_the_middle_of_saving_never_breaks_the_file(tmp_path):
    path = tmp_path / "last.pth"
    program = (
        "import sys, torch; from pathlib import Path; from utils.checkpoint import save_checkpoint\n"
        "content = dict(model={'w': torch.zeros(2_000_000)}, stage=0, config={}, encoder='', encoder_sha256='')\n"
        "while True: save_checkpoint(Path(sys.argv[1]), content)"
    )
    generator = random.Random(0)
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=REPOSITORY)
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.05, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(load_checkpoint(path)["model"]["w"]) == 2_000_000
