"""Disks that are full or read-only: exit code 4, sizes named, nothing lost and nothing left over."""

import re
import shutil
from pathlib import Path

import pytest

from tests.entry_scripts import INP_SINGLE, every_entry_script
from tests.miniature import make_mvtec
from tests.test_faults_of_processes import plug
from utils.checkpoint import load_checkpoint

ACTIONS = ("write", "fsync", "replace")
SIZES = re.compile(r"disk full: .* (needs more than \d+\.\d MB|could not be written), \d+\.\d MB are free; make room")


def files(folder: Path) -> dict[Path, bytes]:
    """Everything below a folder but the log and what says when and how a command ran."""
    return {
        path: path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("log.txt", "env.json", "run.lock")
    }


def temporary_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]


@pytest.fixture(scope="module")
def finished(commands, tmp_path_factory):
    """A folder with data and a run that nothing disturbed, and its model packed."""
    folder = tmp_path_factory.mktemp("finished")
    data = make_mvtec(folder / "data", good=2, defective=2)
    words = INP_SINGLE.words(folder, data, "--cache_features", "off")
    assert commands.run(*words).code == 0
    model = INP_SINGLE.model_folder(folder) / "model.pth"
    assert commands.run("scripts.export", "--checkpoint", str(model), "--output", str(folder / "packed.binaryad")).code == 0
    return folder


@pytest.mark.parametrize(
    ("action", "name", "number"),
    [
        ("write", "last.pth", 2),
        ("replace", "last.pth", 2),
        ("write", "model.pth", 1),
        ("write", "metrics.jsonl", 1),
        ("fsync", "env.json", 1),
    ],
)
def test_training_on_a_full_disk_keeps_what_it_has_and_goes_on_when_there_is_room(
    commands, finished, tmp_path, action, name, number
):
    data = finished / "data"
    words = INP_SINGLE.words(tmp_path, data, "--cache_features", "off", "--save_every", "2", "--quiet")
    full = commands.run(*words, plug=plug("disk_full", action, name, number))
    assert full.code == 4, full.err
    assert repr(str(next((tmp_path / "runs").iterdir()))) in full.sentence or name in full.sentence
    assert SIZES.search(full.sentence), full.sentence
    assert temporary_files(tmp_path / "runs") == []
    folder = INP_SINGLE.model_folder(tmp_path)
    assert not (folder / "model.pth").exists()
    if name in ("last.pth", "model.pth"):
        assert load_checkpoint(folder / "last.pth")["iteration"] == (2 if name == "last.pth" else 4)
    assert commands.run(*words, "--resume").code == 0
    expected = load_checkpoint(INP_SINGLE.model_folder(finished) / "model.pth")["model_sha256"]
    assert load_checkpoint(folder / "model.pth")["model_sha256"] == expected
    for table in ("results.csv", "bottle/scores.csv"):
        assert (INP_SINGLE.folder(tmp_path) / table).read_bytes() == (INP_SINGLE.folder(finished) / table).read_bytes()


@pytest.mark.parametrize(
    ("action", "name"),
    [
        *((action, "results.csv") for action in ACTIONS),
        ("write", "scores.csv"),
        ("replace", "report.html"),
        ("fsync", "contact_sheet.jpg"),
    ],
)
def test_evaluation_on_a_full_disk_leaves_the_old_files(commands, finished, action, name):
    before = files(finished)
    words = INP_SINGLE.words(finished, finished / "data", "--phase", "test", "--cache_features", "off", "--quiet")
    full = commands.run(*words, plug=plug("disk_full", action, name))
    assert full.code == 4, full.err
    assert name in full.sentence
    assert SIZES.search(full.sentence), full.sentence
    assert files(finished) == before
    assert temporary_files(finished) == []


@pytest.mark.parametrize(
    ("action", "name", "words"),
    [
        ("write", "packed.binaryad", ("scripts.export", "--checkpoint", "{model}", "--output", "{finished}/packed.binaryad")),
        ("write", "predictions.csv", ("scripts.predict", "{packed}", "--maps", "npy")),
        ("fsync", "000.png.jpg", ("scripts.predict", "{packed}")),
        ("write", "scale.json", ("scripts.predict", "{packed}", "--maps", "png16")),
        ("write", "report.md", ("scripts.report", "{run}", "--output", "{finished}/report.md")),
    ],
)
def test_tool_on_a_full_disk_leaves_the_old_file(commands, finished, action, name, words):
    """Each is called twice, so that there is an old file; a call that can write it begins predictions.csv anew."""
    out = finished / f"{action}-{name}"
    packed = ["--model", str(finished / "packed.binaryad"), "--output", str(out)]
    packed += ["--input", str(finished / "data" / "bottle" / "test" / "good" / "000.png")]
    places = {
        "model": INP_SINGLE.model_folder(finished) / "model.pth",
        "finished": finished,
        "run": INP_SINGLE.folder(finished),
    }
    line = [each for word in words for each in (packed if word == "{packed}" else [word.format(**places, packed="")])]
    assert commands.run(*line).code == 0
    before = files(finished)
    full = commands.run(*line, plug=plug("disk_full", action, name))
    assert full.code == 4, full.err
    assert name in full.sentence
    assert SIZES.search(full.sentence), full.sentence
    before, after = (
        {path: content for path, content in found.items() if path.name != "predictions.csv" or name == path.name}
        for found in (before, files(finished))
    )
    removed = {path for path in before if path not in after}
    assert removed <= {path for path in before if path.name.startswith("000.png.")}  # of the image that was in work
    assert {path: content for path, content in before.items() if path in after} == after
    assert temporary_files(finished) == []


@pytest.mark.parametrize("cache", ["features", "images"])
def test_cache_on_a_full_disk_is_said_with_its_size(commands, tmp_path, mvtec, cache):
    others = {"features": "images", "images": "features"}[cache]
    words = INP_SINGLE.words(tmp_path, mvtec, f"--cache_{cache}", "disk", f"--cache_{others}", "off")
    full = commands.run(*words, plug=plug("cache_full"))
    assert full.code == 4, full.err
    assert re.search(r"cannot write .* of \d\.\d MB \(No space left on device\)", full.sentence)
    assert temporary_files(tmp_path / "runs") == []
    assert commands.run(*words).code == 0


def test_distillation_on_a_full_disk_keeps_its_state(commands, tmp_path, mvtec):
    output = tmp_path / "teacher.safetensors"
    words = ("scripts.distill_teacher", "--images", str(mvtec), "--output", str(output), "--size", "tiny", "--image_size", "64")
    words += ("--batch_size", "2", "--iterations", "4", "--save_every", "2", "--num_workers", "0", "--resume")
    words += ("--source", "random_vit_tiny_14", "--statistics_images", "4")
    full = commands.run(*words, plug=plug("disk_full", "write", "teacher.safetensors.state.pth", 3))
    assert full.code == 4, full.err
    assert SIZES.search(full.sentence), full.sentence
    assert load_checkpoint(tmp_path / "teacher.safetensors.state.pth")["iteration"] == 2
    assert temporary_files(tmp_path) == []
    full = commands.run(*words, plug=plug("disk_full", "fsync", "teacher.safetensors"))
    assert full.code == 4, full.err
    assert not output.exists()
    assert commands.run(*words).code == 0
    assert output.is_file()


def test_log_on_a_full_disk_ends_but_the_training_goes_on(commands, tmp_path, mvtec):
    folder = INP_SINGLE.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to("/dev/full")
    finished = commands.run(*INP_SINGLE.words(tmp_path, mvtec))
    assert finished.code == 0, finished.err
    assert finished.err.count("log.txt is not continued: [Errno 28] No space left on device") == 1
    assert "Traceback" not in finished.err


def test_small_disk(commands, finished, tmp_path):
    """A real one of some kilobytes, where this system lets a process mount one."""
    words = INP_SINGLE.words(tmp_path, finished / "data", "--cache_features", "off", "--save_every", "1", "--quiet")
    (tmp_path / "runs").mkdir()
    full = commands.run(*words, plug=plug("mounted", "small", tmp_path / "runs"))
    if full.code == 77:
        pytest.skip(full.err)
    assert full.code == 4, full.err
    assert SIZES.search(full.sentence), full.sentence
    left = tmp_path / "runs.left"
    assert not temporary_files(left)
    assert not list(left.rglob("model.pth"))
    shutil.copytree(left, tmp_path / "runs", dirs_exist_ok=True)
    assert commands.run(*words, "--resume").code == 0


@every_entry_script
def test_read_only_disk(commands, tmp_path, mvtec, script):
    (tmp_path / "runs").mkdir()
    refused = commands.run(*script.words(tmp_path, mvtec), plug=plug("mounted", "read_only", tmp_path / "runs"))
    if refused.code == 77:
        pytest.skip(refused.err)
    assert refused.code == 4, refused.err
    assert "Read-only file system" in refused.sentence
    assert str(tmp_path / "runs") in refused.sentence


@pytest.mark.parametrize(
    "words",
    [
        ("scripts.export", "--checkpoint", "{model}", "--output", "{file}/x.binaryad"),
        ("scripts.predict", "--model", "{finished}/packed.binaryad", "--input", "{image}", "--output", "{file}"),
        ("scripts.report", "{run}", "--output", "{file}/report.md"),
        ("scripts.make_buttons", "--output", "{file}/buttons", "--image_size", "64", "--train", "1", "--classes", "1"),
        ("scripts.distill_teacher", "--images", "{finished}/data", "--output", "{file}/teacher.safetensors"),
    ],
    ids=lambda words: words[0],
)
def test_output_below_a_file(commands, finished, tmp_path, words):
    file = tmp_path / "thesis.txt"
    file.write_text("two years of work")
    places = {
        "file": file,
        "finished": finished,
        "model": INP_SINGLE.model_folder(finished) / "model.pth",
        "run": INP_SINGLE.folder(finished),
        "image": finished / "data" / "bottle" / "test" / "good" / "000.png",
    }
    refused = commands.run(*(word.format(**places) for word in words))
    assert refused.code in (2, 4), refused.err
    assert str(file) in refused.sentence
    assert file.read_text() == "two years of work"
