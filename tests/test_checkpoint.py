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
from common.plain_content import content_sha256
from tests.conftest import REPOSITORY
from tests.model_damages import Attack, flipped, positions
from utils.checkpoint import FORMAT_VERSION, atomic_write, load_checkpoint, save_checkpoint

CONTENT = {
    "model": {"weight": torch.arange(4000.0), "flag": torch.tensor(True)},
    "stage": 1,
    "config": {"dataset": "Folder"},
    "encoder": "tiny",
    "encoder_sha256": "0",
}


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


def flip_a_byte_of_the_description(path):
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Folder", b"Folded", 1))


def save_other_format(path):
    torch.save({**torch.load(path, weights_only=True), "format_version": FORMAT_VERSION + 1}, path)


def save_unchecked(path, **changes):
    content = {**torch.load(path, weights_only=True), **changes}
    torch.save({name: value for name, value in content.items() if value is not None}, path)


def nested() -> list:
    """A list of ten times the same list of ten times the same ...: few bytes, and more values than anybody can visit."""
    values: list = [0]
    for _ in range(24):
        values = [values] * 10
    return values


DAMAGES = {
    "is no file": lambda path: path.unlink(),
    "is empty": lambda path: path.write_bytes(b""),
    "no zip archive": lambda path: path.write_text("<html>404 Not Found</html>"),
    "cannot be read": lambda path: path.write_bytes(path.read_bytes()[:-3000]),
    "do not match their hash": flip_a_byte_of_the_tensors,
    "does not match its hash": flip_a_byte_of_the_description,
    "is larger than the file": lambda path: save_unchecked(path, model={"weight": torch.zeros(1).expand(10**6, 10**6)}),
    "is no ordinary tensor": lambda path: save_unchecked(path, model={"weight": torch.eye(3).to_sparse()}),
    "is nested without end": lambda path: save_unchecked(path, config=nested()),
    "'model_sha256' is missing": lambda path: save_unchecked(path, model_sha256=None),
    "model should be a mapping": lambda path: save_unchecked(path, model=[1]),
    "format_version should be an integer": lambda path: save_unchecked(path, format_version="2"),
    "of another program": lambda path: torch.save({"state_dict": CONTENT["model"]}, path),
    "too new": save_other_format,
}


@pytest.mark.parametrize("expected", DAMAGES)
def test_every_damage_has_its_sentence(path, expected):
    DAMAGES[expected](path)
    with pytest.raises(UserError, match=expected) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_no_flipped_bit_changes_what_is_read(path):
    """A bit that nobody reads, as in padding, may be any; every other one is noticed."""
    save_checkpoint(path, {**CONTENT, "model": {"weight": torch.arange(40.0)}})
    before, content = path.read_bytes(), load_checkpoint(path)
    refused = 0
    for position in positions(before, 600):
        path.write_bytes(flipped(before, position, position % 8))
        try:
            found = load_checkpoint(path)
        except UserError:
            refused += 1
            continue
        assert torch.equal(found.pop("model")["weight"], content["model"]["weight"])
        assert found == {name: value for name, value in content.items() if name != "model"}
    assert refused > 250


def test_checkpoints_of_the_first_format_are_read(path):
    content = torch.load(path, weights_only=True)
    del content["content_sha256"]
    torch.save({**content, "format_version": 1}, path)
    assert load_checkpoint(path)["config"] == CONTENT["config"]
    torch.save({**content, "format_version": 1, "model_sha256": "0" * 64}, path)
    with pytest.raises(UserError, match="do not match their hash"):
        load_checkpoint(path)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", 1j, torch.eye(2).to_sparse()])
def test_what_could_not_be_read_is_not_saved(path, value):
    before = path.read_bytes()
    with pytest.raises(TypeError, match="has no hash"):
        save_checkpoint(path, {**CONTENT, "extra": [value]})
    assert path.read_bytes() == before


def test_the_hash_depends_on_every_value_its_type_and_its_place():
    contents = [{"a": value} for value in (0, 1, 0.0, -0.0, "0", False, None, [], (), {}, [0], [[0]], "", "list 0\n")]
    contents += [{"a": torch.zeros(shape, dtype=kind)} for shape in (1, 2, (1, 1), ()) for kind in (torch.float32, torch.int32)]
    contents += [{}, {"b": 0}, {"a": [0], "b": 1}, {"a": 0, "b": [1]}, {"a": [0, 1]}, {"a": [[0], 1]}, {0: 1}, {"0": 1}]
    assert len({content_sha256(content) for content in contents}) == len(contents)
    assert content_sha256({"a": 1, "b": 2.0}) == content_sha256({"b": 2.0, "a": 1})


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
