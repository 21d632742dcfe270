"""Weights that are damaged, hostile, absent or not those of the training, and caches that are not as they were written."""

import hashlib
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.teacher import build_teacher
from models.weight_files import HASH_KEY, state_sha256
from tests.entry_scripts import INP_SINGLE, RAAD, EntryScript, every_entry_script
from tests.model_damages import CONTAINER_DAMAGES, Damage, flipped, positions, saved

ENCODER = "dinov2_vit_small_14"
REPOSITORY_OF_IT = "timm/vit_small_patch14_dinov2.lvd142m"
STATE = build_teacher("tiny", "random").network.state_dict()
HASHED = safetensors.torch.save(STATE, {HASH_KEY: state_sha256(STATE)})
FLIPPED = flipped(HASHED, len(HASHED) - 1000)


def training(script: EntryScript, tmp_path: Path, data: Path, *flags: str) -> list[str]:
    """A training whose encoder has weights."""
    encoder = [] if script is RAAD else ["--encoder", ENCODER]
    return script.words(tmp_path, data, *encoder, *flags)


@pytest.fixture
def refuses(commands, tmp_path, mvtec):
    """Write a file of weights, give it to a command, and return the sentence with which that ends."""

    def call(name: str, content: bytes, script: EntryScript) -> str:
        file = tmp_path / name
        file.write_bytes(content)
        flag = "--teacher_weights" if script is RAAD else "--encoder_weights"
        finished = commands.run(*training(script, tmp_path, mvtec, flag, str(file)))
        assert finished.code == 2, finished.err[-1000:]
        assert file.read_bytes() == content
        assert not (tmp_path / "marker").exists()
        assert not (tmp_path / "runs").exists()
        assert str(file) in finished.sentence
        return finished.sentence

    return call


@pytest.mark.parametrize("damage", CONTAINER_DAMAGES[:-1], ids=str)
def test_every_damage_of_a_torch_file_has_its_sentence(refuses, tmp_path, damage: Damage):
    """Cases 25 and 26; a bit that is flipped in a file without a hash is noticed by the hash in what was trained with it."""
    sentence = refuses("weights.pth", damage.make(saved(STATE), tmp_path / "marker"), RAAD)
    assert damage.said in sentence or "refused" in sentence


NOT_FINITE = {**STATE, "conv1.bias": torch.full_like(STATE["conv1.bias"], float("inf"))}
SAFETENSORS_DAMAGES = {
    "empty": (b"", "is damaged or no .safetensors file"),
    "web page": (b"<!DOCTYPE html><html>404</html>" * 9, "is damaged or no .safetensors file"),
    "torch file": (saved(STATE), "is damaged or no .safetensors file"),
    "cut short": (HASHED[:-1], "is damaged or no .safetensors file"),
    "enormous header": ((2**40).to_bytes(8, "little") + HASHED[8:], "is damaged or no .safetensors file"),
    "deep header": ((90_000).to_bytes(8, "little") + b'{"a":' + b"[" * 89_995, "is damaged or no .safetensors file"),
    "flipped bit": (FLIPPED, "do not match the sha256 in it"),
    "not finite": (safetensors.torch.save(NOT_FINITE), "not finite in ['conv1.bias']"),
}


@pytest.mark.parametrize("damage", SAFETENSORS_DAMAGES)
def test_every_damage_of_a_safetensors_file_has_its_sentence(refuses, damage):
    """Case 25."""
    content, said = SAFETENSORS_DAMAGES[damage]
    assert said in refuses("weights.safetensors", content, RAAD)


@every_entry_script
def test_every_training_refuses_changed_weights(refuses, script):
    """Case 40: the hash of the file is another."""
    assert "do not match the sha256 in it" in refuses("weights.safetensors", FLIPPED, script)


@pytest.mark.parametrize("beside", ["other hash", "no hash"])
def test_a_hash_beside_the_file_counts(refuses, tmp_path, beside):
    """Case 40."""
    hashed = hashlib.sha256(b"another file").hexdigest() if beside == "other hash" else "<html>"
    (tmp_path / "weights.pth.sha256").write_text(f"{hashed}  weights.pth\n")
    sentence = refuses("weights.pth", saved(STATE), RAAD)
    assert ("has the sha256 " if beside == "other hash" else "holds no sha256") in sentence


def test_a_tensor_that_says_it_is_larger_than_its_file(refuses):
    state = {**STATE, "conv1.weight": torch.zeros(1).expand(10**6, 10**6)}
    assert "'conv1.weight' with shape (1000000, 1000000) is larger than the file" in refuses("weights.pth", saved(state), RAAD)


def test_right_hashes_are_no_hindrance(commands, tmp_path, mvtec):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(HASHED)
    (tmp_path / "weights.safetensors.sha256").write_text(f"{hashlib.sha256(HASHED).hexdigest()}  weights.safetensors\n")
    finished = commands.run(*RAAD.words(tmp_path, mvtec, "--teacher_weights", str(file)))
    assert finished.code == 0, finished.err[-1000:]
    file.write_bytes(safetensors.torch.save({name: value + 1 for name, value in STATE.items()}))
    (tmp_path / "weights.safetensors.sha256").unlink()
    resumed = commands.run(*RAAD.words(tmp_path, mvtec, "--teacher_weights", str(file), "--resume"))
    assert (resumed.code, "encoder weights of sha256" in resumed.sentence) == (2, True)


@every_entry_script
def test_no_network_and_no_weights(commands, tmp_path, mvtec, script):
    """Case 40."""
    flags = [] if script is not RAAD else ["--teacher_weights", ""]
    finished = commands.run(*training(script, tmp_path, mvtec, *flags), plug=f"tests.plugs:no_network:{tmp_path}")
    assert finished.code == 2, finished.err[-1000:]
    target = tmp_path / "weights" / ("pdn_tiny.safetensors" if script is RAAD else f"{ENCODER}.safetensors")
    assert str(target) in finished.sentence
    if script is RAAD:
        assert "give --teacher_weights FILE" in finished.sentence
    else:
        assert f"https://huggingface.co/{REPOSITORY_OF_IT}/resolve/main/model.safetensors" in finished.sentence
        assert "give --encoder_weights FILE" in finished.sentence


@pytest.mark.parametrize("place", ["hub", "weights"])
def test_weights_that_were_downloaded_before_are_verified(commands, tmp_path, mvtec, place):
    """Case 40: what the hub's cache calls by its sha256, and what our own tools wrote with one, must have it."""
    if place == "hub":
        cache = tmp_path / "hub" / f"models--{REPOSITORY_OF_IT.replace('/', '--')}"
        blob = cache / "blobs" / hashlib.sha256(HASHED).hexdigest()
        link = cache / "snapshots" / ("0" * 40) / "model.safetensors"
        for folder in (blob.parent, link.parent, cache / "refs"):
            folder.mkdir(parents=True)
        (cache / "refs" / "main").write_text("0" * 40)
        blob.write_bytes(FLIPPED)
        os.symlink(blob, link)
    else:
        (tmp_path / "weights").mkdir()
        (tmp_path / "weights" / f"{ENCODER}.safetensors").write_bytes(FLIPPED)
    finished = commands.run(*training(INP_SINGLE, tmp_path, mvtec), plug=f"tests.plugs:no_network:{tmp_path}")
    assert finished.code == 2, finished.err[-1000:]
    assert "damaged" in finished.sentence
    assert ("its name in the hub's cache" if place == "hub" else "do not match the sha256 in it") in finished.sentence


def test_a_source_of_features_is_read_as_safely(commands, tmp_path, mvtec):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(FLIPPED)
    words = [
        "scripts.distill_teacher",
        "--size",
        "tiny",
        "--images",
        str(mvtec),
        "--output",
        str(tmp_path / "teacher.safetensors"),
    ]
    finished = commands.run(*words, "--source", str(file))
    assert (finished.code, "do not match the sha256 in it" in finished.sentence) == (2, True), finished.err[-1000:]


CACHES = {"feature": ("--cache_features", "disk"), "image": ("--cache_features", "off", "--cache_images", "disk")}


@pytest.mark.parametrize("kind", CACHES)
def test_a_changed_cache_is_made_anew(commands, tmp_path, mvtec, kind):
    """A bit that is flipped anywhere in it; `tests.test_array_file` tries every byte of a small one."""

    def results(*flags: str) -> tuple[bytes, str]:
        finished = commands.run(*INP_SINGLE.words(tmp_path, mvtec, *CACHES[kind], "--overwrite", *flags))
        assert finished.code == 0, finished.err[-1000:]
        return (INP_SINGLE.folder(tmp_path) / "bottle" / "scores.csv").read_bytes(), finished.err

    first, _ = results()
    files = sorted((tmp_path / "runs" / f"{kind}_cache").iterdir())
    assert len(files) == 2
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(flipped(content, positions(content, 1)[0], 6))
    again, said = results()
    assert again == first
    assert all(f"{file} is damaged or of an earlier version, and is made anew" in said for file in files)
    assert [file.read_bytes() for file in files] == contents
    assert "found in" in results()[1]
